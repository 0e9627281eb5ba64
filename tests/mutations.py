# ruff: noqa: E501
"""Truth has teeth: spoil one formula of the library at a time, and see which tests notice.

    python tests/mutations.py            # each mutation against tests that the recorded table says notice it
    python tests/mutations.py --record   # against all that reach it, and write book/results/mutations.json, which the book shows
    python tests/mutations.py --record --quick   # the same, against as few as show that each is noticed, and each notices
    python tests/mutations.py --record --new     # only mutations that the record does not have, which keeps its other rows

Each mutation of a formula must be noticed by at least one ``test_thm_…``, and each ``test_thm_…`` must notice at least
one mutation. What no theorem speaks of (networks, trainings, pools, checkpoints) has mutations too: each names the
ordinary test that must notice it, which runs every time.
Without --record only as many tests run as show that once more: for each test one mutation that it noticed, for each
mutation one test. A record that is not of these mutations and tests is an error.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import provenance, writable, write_record  # noqa: E402

RECORD = ROOT / "book" / "results" / "mutations.json"
SECONDS = 240


@dataclass(frozen=True)
class Mutation:
    """One change: `old`, which stands once in `file`, becomes `new`; theorem tests notice, or `test`, file::name."""

    name: str
    file: str
    old: str
    new: str
    test: str = ""


MUTATIONS = [
    # closed forms
    Mutation("Gaussian map without its one half", "closed_forms/gaussians", "slope = 2 * (half / (", "slope = 4 * (half / ("),
    Mutation("Gaussian map as C A^-1, not symmetric", "closed_forms/gaussians", "return (slope + slope.T) / 2", "return A @ slope @ torch.linalg.inv(A)"),
    Mutation("Gaussian cost with log of eps for 2 eps", "closed_forms/gaussians", "torch.log1p(excess / (2 * eps))", "torch.log1p(excess / eps)"),
    Mutation("Gaussian cost without tr D", "closed_forms/gaussians", "A.trace() + B.trace() - excess.sum()", "A.trace() + B.trace()"),
    Mutation("Gaussian divergence, self terms whole", "closed_forms/gaussians", "gaussian_ot(b, B, b, B, eps)) / 2", "gaussian_ot(b, B, b, B, eps))"),
    Mutation("Gaussian velocity without its self slope", "closed_forms/gaussians", "gaussian_map(A, B, eps) - gaussian_map(A, A, eps)", "gaussian_map(A, B, eps) - torch.eye(len(gaussian_map(A, A, eps)))"),
    Mutation("Gaussian flow without its self slope", "closed_forms/gaussians", "_slope(now, target, eps) - _slope(now, now, eps)", "_slope(now, target, eps) - torch.eye(d, dtype=torch.float64)"),
    Mutation("Gaussian flow, covariance moved on one side", "closed_forms/gaussians", "return (K @ now + now @ K.T).reshape", "return (K @ now).reshape"),
    Mutation("Gaussian flow, means at twice the rate", "closed_forms/gaussians", "torch.exp(-clock)[:, None]", "torch.exp(-2 * clock)[:, None]"),
    Mutation("two atoms with kappa for kappa squared", "closed_forms/atoms", "-(distance**2) / eps,", "-(distance**2) / (2 * eps),"),
    Mutation("OU covariance, decay without its 2", "closed_forms/diffusions", "torch.expm1(-2 * rates * t)", "torch.expm1(-rates * t)"),
    Mutation("OU mean falls to the origin", "closed_forms/diffusions", "return b + decay @ (start - b)", "return decay @ start"),
    Mutation("Barenblatt profile of twice the slope", "closed_forms/diffusions", "beta = (m - 1) * alpha / (2 * m * d)", "beta = (m - 1) * alpha / (m * d)"),
    Mutation("Barenblatt profile with C = 1, mass not one", "closed_forms/diffusions", "math.exp(-log_mass / (p + d / 2))", "1.0"),
    Mutation("KL of Gaussians without its logarithm", "closed_forms/jko", "(excess - torch.log1p(excess)).sum() / 2", "excess.sum() / 2"),
    Mutation("chi2 of Gaussians with half of the squared distance", "closed_forms/jko", "spectrum.log().sum() / 2 + shift)", "spectrum.log().sum() / 2 + shift / 2)"),
    Mutation("chi2 of Gaussians finite for every width", "closed_forms/jko", "room = 2 * B - S", "room = 4 * B - S"),
    Mutation("JKO step of Gaussians without the entropy", "closed_forms/jko", "(spread.sqrt() + (spread + 4 * own).sqrt()) / 2", "spread.sqrt()"),
    Mutation("JKO step of Gaussians, mean by the explicit step", "closed_forms/jko", "torch.linalg.solve(M, (eye - frozen) @ (m - b))", "(2 * eye - frozen - M) @ (m - b)"),
    Mutation("Crank-Nicolson step with its frozen half at full weight", "closed_forms/jko", "frozen = (1 - share) * a *", "frozen = 2 * (1 - share) * a *"),
    Mutation("explicit step of Gaussians without the score of its law", "closed_forms/jko", "slope = eye + a * (torch.cholesky_inverse(torch.linalg.cholesky(S)) - precision)", "slope = eye - a * precision"),
    Mutation("trapezoidal step with a whole explicit step", "closed_forms/jko", "_explicit(*start, b, precision, a / 2), b", "_explicit(*start, b, precision, a), b"),
    # costs and their gradients
    Mutation("divergence with self terms whole", "transport/divergence", "cost - (own_x + own_y) / 2", "cost - (own_x + own_y)"),
    Mutation("divergence without self terms", "transport/divergence", "cost - (own_x + own_y) / 2", "cost"),
    Mutation("divergence with self terms added", "transport/divergence", "cost - (own_x + own_y) / 2", "cost + (own_x + own_y) / 2"),
    Mutation("cost from one potential only", "transport/divergence", "return (a * f).sum(-1) + (b * g).sum(-1)", "return (a * f).sum(-1)"),
    Mutation("gradient in positions ignores the weights", "transport/divergence", "(weight * a).unsqueeze(-1)", "(weight / a.shape[-1]).unsqueeze(-1)"),
    Mutation("self term's derivative moves one marginal only", "transport/divergence", "(2 if ctx.own else 1)", "1"),
    Mutation("gradient in weights with the wrong sign", "transport/divergence", "da = weight * f", "da = -weight * f"),
    # potentials, plans, maps
    Mutation("plan ignores the source weights", "transport/sinkhorn", "rows * problem.a.unsqueeze(-1)", "rows / problem.a.shape[-1]"),
    Mutation("plan ignores the target weights", "transport/sinkhorn", "rows = softmax(exponent + problem.b.log().unsqueeze(-2))", "rows = softmax(exponent + 0.0)"),
    Mutation("plan at twice the temperature", "transport/problem", "H.add_(g.unsqueeze(-2)).div_(self.eps)", "H.add_(g.unsqueeze(-2)).div_(2 * self.eps)"),
    Mutation("plan transposed", "transport/sinkhorn", "(problem.b > 0).unsqueeze(-2))", "(problem.b > 0).unsqueeze(-2)).mT"),
    Mutation("potentials swapped", "transport/problem", "return Potentials(f + tilt, g - tilt, steps", "return Potentials(f - tilt, g - tilt, steps"),
    Mutation("extended map ignores the weights", "transport/problem", "yield softmax(S + self.b.log().unsqueeze(-2))", "yield softmax(S + 0)"),
    Mutation("extended potential with the wrong sign", "transport/problem", "p - self.eps * torch.logsumexp(S + self.b", "p + self.eps * torch.logsumexp(S + self.b"),
    # fields
    Mutation("velocity without the self term", "fields/transport", 'images("towards", y, b) - images("away", x, a)', 'images("towards", y, b) - (x if at is None else at)'),
    Mutation("velocity uphill", "fields/transport", 'images("towards", y, b) - images("away", x, a)', 'images("away", x, a) - images("towards", y, b)'),
    Mutation("velocity ignores the data's weights", "fields/transport", 'images("towards", y, b)', 'images("towards", y, None)'),
    Mutation("velocity's self term forgets the weights", "fields/transport", 'images("away", x, a)', 'images("away", x, None)'),
    Mutation("velocity with half the self term", "fields/transport", '- images("away", x, a)', '- images("away", x, a) / 2'),
    # the iterations
    Mutation("cost without its one half", "transport/solver", "H = (gap * gap).mul_(-0.5) if k == 0 else H.addcmul_(gap, gap, value=-0.5)", "H = (gap * gap).mul_(-1.0) if k == 0 else H.addcmul_(gap, gap, value=-1.0)"),
    Mutation("row step ignores the weights", "transport/solver", "row = _times(K, b * v)", "row = _times(K, v / b.shape[-1])"),
    Mutation("self problem not averaged", "transport/solver", "u = (u / row).sqrt_()", "u = 1 / row"),
    Mutation("over-relaxation by the wrong root", "transport/solver", "2 / (1 + math.sqrt(max(0.0, 1 - plain)))", "2 / (1 + max(0.0, 1 - plain))"),
    Mutation("Newton's direction reversed", "transport/solver", "(b - columns).unsqueeze(-1)", "(columns - b).unsqueeze(-1)"),
    # particles and metrics
    Mutation("particles step backwards", "particles", "return x + step * sum(", "return x - step * sum("),
    Mutation("particles forget their weights on the way", "particles", 'given = {"a": a, "b": b, "generator": generator}', 'given = {"a": None, "b": b, "generator": generator}'),
    Mutation("fourth-order weights spoiled", "particles", "[1 / 6, 1 / 3, 1 / 3, 1 / 6]", "[1 / 6, 1 / 6, 1 / 3, 1 / 3]"),
    Mutation("W_2 squared for W_2", "metrics", "return unit * math.sqrt(float((P * (distance / unit).square()).sum()))", "return unit * float((P * (distance / unit).square()).sum())"),
    # trajectories, the pool, and what is regressed on and sampled
    Mutation("pool pairs each velocity with the next position", "models/pool", "        positions.append(x)\n        velocities.append(v)\n        x = x + step * v if pilot is None else pilot(x, k)\n", "        velocities.append(v)\n        x = x + step * v if pilot is None else pilot(x, k)\n        positions.append(x)\n"),
    Mutation("pool stores the velocity of the gradient's sign", "models/pool", "velocities.append(v)", "velocities.append(-v)"),
    Mutation("pool draws velocities of other rows", "models/pool", "self._v.view(-1, d)[here]", "self._v.view(-1, d)[here.flip(0)]"),
    Mutation("pool counts its steps from one", "models/nsgf", "return x, k / self.steps, self.step", "return x, (k + 1) / self.steps, self.step"),
    Mutation("velocity not rescaled to the network's time", "models/nsgf", "self.step * self.steps * v, labels", "self.step * v, labels"),
    Mutation("sampler's clock one step ahead", "models/flow", "rows[-1], k / steps, 1 / steps, solver", "rows[-1], (k + 1) / steps, 1 / steps, solver"),
    Mutation("sampler's steps twice as long", "models/flow", "rows[-1], k / steps, 1 / steps, solver", "rows[-1], k / steps, 2 / steps, solver"),
    # straight segments and the two phases
    Mutation("segments' covariance interpolated linearly", "closed_forms/segments", "(1 - t) ** 2 * S + t**2 * B", "(1 - t) * S + t * B"),
    Mutation("straight velocity, source with the wrong sign", "closed_forms/segments", "t * end[1] - (1 - t) * start[1]", "t * end[1] + (1 - t) * start[1]"),
    Mutation("density of the time without its determinant", "closed_forms/segments", " - w.log().sum(1) / 2", ""),
    Mutation("stretching without its one half", "closed_forms/segments", "math.exp(radius**2 / 2 * (", "math.exp(radius**2 * ("),
    Mutation("W_2 of Gaussians with half the cross term", "closed_forms/segments", "B.trace() - 2 * cross", "B.trace() - cross"),
    Mutation("segments run backwards", "models/straight", "return (1 - t) * x0 + t * x1, x1 - x0", "return t * x0 + (1 - t) * x1, x1 - x0"),
    Mutation("straight velocity with its slope transposed", "closed_forms/segments", "(x - mean.to(x)) @ slope.to(x)", "(x - mean.to(x)) @ slope.T.to(x)"),
    Mutation("second phase always of length one", "models/two_phase", "length = (1 - begin) / steps", "length = torch.ones_like(begin) / steps"),
    # witnesses, critics, slices
    Mutation("witness descended without one over h squared", "fields/witness", "(pull.sum(-1, keepdim=True) * z - pull @ atoms) / h / h", "(pull.sum(-1, keepdim=True) * z - pull @ atoms) / h"),
    Mutation("MMD's velocity without its 2", "fields/witness", "return -b, 2.0", "return -b, 1.0"),
    Mutation("witness of the data alone", "fields/witness", "return (scale * (towards + away)).to(points)", "return (scale * towards).to(points)"),
    Mutation("regularised chi-squared: data's coefficients without their one", "fields/witness", "return -(b * (1 + g)),", "return -(b * g),"),
    Mutation("regularised chi-squared without 1 + lambda", "fields/witness", "2 * (1 + self.lam) / self.lam", "2 / self.lam"),
    Mutation("ridge of twice the size", "fields/witness", "A = A + lam * torch.eye", "A = A + 2 * lam * torch.eye"),
    Mutation("KALE linearised", "fields/witness", "mass = b * at_y.exp()", "mass = b * (1 + at_y)"),
    Mutation("KALE without 1 + lambda", "fields/witness", "return -mass * (1 + step), (1 + self.lam) / self.lam", "return -mass * (1 + step), 1 / self.lam"),
    Mutation("reverse KL's critic with the sign of the ratio turned", "fields/critic", "lambda s: -(-s).exp(), lambda s: s - 1", "lambda s: -s.exp(), lambda s: s - 1"),
    Mutation("KL's critic uphill", "fields/critic", "return -slope", "return slope"),
    Mutation("Jensen and Shannon's critic without its one half", "fields/critic", "lambda s: (math.log(2) + logsigmoid(s)) / 2", "lambda s: math.log(2) + logsigmoid(s)"),
    Mutation("slices summed and not averaged", "fields/transport", "theta / self.directions", "theta"),
    Mutation("slices: the line's monotone plan reversed", "fields/transport", "order_u, order_v = u.argsort(-1), v.argsort(-1)", "order_u, order_v = u.argsort(-1), v.argsort(-1, descending=True)"),
    Mutation("slices in directions that are not of length one", "fields/transport", "theta = theta / theta.norm(dim=-1, keepdim=True)", "theta = theta / theta.norm(dim=-1, keepdim=True) ** 2"),
    # interactions
    Mutation("interaction uphill", "fields/interaction", "return -(a.unsqueeze(-1)", "return (a.unsqueeze(-1)"),
    Mutation("interaction of all pairs, without its one half", "fields/interaction", "return -(a.unsqueeze(-1)", "return -2 * (a.unsqueeze(-1)"),
    Mutation("interaction blind to weights", "fields/interaction", "(a.unsqueeze(-1).unsqueeze(-3) * slope).sum(-2)", "slope.mean(-2)"),
    Mutation("interaction of a particle with itself", "fields/interaction", "slope = torch.where(together, torch.zeros_like(slope), slope)", "slope = slope + 0"),
    # one-step generators, smoothed scores
    Mutation("mean shift without the crowd", "fields/scores", "        return towards - away", "        return towards - z"),
    Mutation("mean shift blind to the data's weights", "fields/scores", "log_kernel(z, y, self.h) + b.log().unsqueeze(-2), y", "log_kernel(z, y, self.h), y"),
    Mutation("Gaussian kernel of twice its variance", "fields/base", "exponent = cost / -(h * h)", "exponent = cost / -(2 * h * h)"),
    Mutation("smoothed flow with the scores unsmoothed", "fields/scores", "moved = z + self.h * noise", "moved = z + 0 * noise"),
    Mutation("smoothed flow in units of length", "fields/scores", "return velocity / self.h / self.h", "return velocity"),
    Mutation("drifting away from the goal", "models/drifting", "(here + step * v).detach()", "(here - step * v).detach()"),
    Mutation("drifting with a step of its own", "models/drifting", "(here + step * v).detach()", "(here + v).detach()"),
    Mutation("Laplace displacements over the sum of their weights", "fields/scores", "K + torch.log1p(-K) + log_weights", "K + log_weights"),
    Mutation("Laplace displacements towards the data blind to weights", "fields/scores", "_mean_shift(K + log_weights, points)", "_mean_shift(K, points)"),
    # one normalisation and cross weights
    Mutation("proxy without cross weights", "fields/scores", "factor = log_towards + log_away", "factor = log_towards"),
    Mutation("proxy, columns not normalised", "fields/scores", "(u - row) / 2, (v - column) / 2", "(u - row) / 2, v"),
    Mutation("proxy, whole steps for half ones", "fields/scores", "(u - row) / 2, (v - column) / 2, (w - at_row) / 2", "u - row, v - column, w - at_row"),
    Mutation("proxy, columns ignore the particles' weights", "fields/scores", "torch.logsumexp(K + (u + a.log()).unsqueeze(-1), -2)", "torch.logsumexp(K + u.unsqueeze(-1), -2)"),
    Mutation("proxy never normalises twice", "fields/scores", "for _ in range(self.iterations):", "for _ in range(1):"),
    Mutation("proxy with eps for its root", "fields/scores", "h = self.eps**0.5", "h = self.eps"),
    Mutation("proxy's self term transposes its weights", "fields/scores", "self._images(x, x, at, a, a, own=True)", "self._images(x, x, at, a, a.flip(-1), own=True)"),
    Mutation("Algorithm 2, softmaxes without the root", "fields/scores", "K - (row.unsqueeze(-1) + column.unsqueeze(-2)) / 2", "K - (row.unsqueeze(-1) + column.unsqueeze(-2))"),
    Mutation("Algorithm 2, rows never concatenated", "fields/scores", "rows = [torch.logaddexp(*rows)] * 2", "rows = list(rows)"),
    Mutation("Algorithm 2, self-affinities kept", "fields/scores", "device=x.device), -torch.inf)", "device=x.device), 0.0)"),
    # two modes: closed forms and the fields at the right one
    Mutation("two modes, scores by the model's crowd twice", "closed_forms/atoms", "gap / (here * there)", "gap / (there * there)"),
    Mutation("two modes, proxy without the kernel in its column", "closed_forms/atoms", "math.sqrt((beta + right * k) * here)", "math.sqrt(beta * here)"),
    Mutation("two modes, exact transport's share of everything", "closed_forms/atoms", "return -distance * gap / right", "return -distance * gap"),
    Mutation("two modes, Sinkhorn without its self plan", "closed_forms/atoms", "float(moved - own) / right", "float(moved) / right"),
    Mutation("exact plan's image not divided by the mass", "fields/transport", "P @ y.to(P) / mass.clamp_min(1e-300)", "P @ y.to(P)"),
    Mutation("drift's affinities without their floor", "fields/scores", "A.exp().clamp_min(self.floor)", "A.exp()"),
    # the cross, in closed form
    Mutation("cross's curl without the product of its tangents", "closed_forms/atoms", "torch.tanh(u) * torch.tanh(v) - points[..., 0]", "-points[..., 0]"),
    Mutation("cross's factor without its constant", "closed_forms/atoms", "torch.exp(log_mix - log_scale)", "torch.exp(log_mix)"),
    Mutation("cross, the data's pull turned", "closed_forms/atoms", "[-torch.tanh(u), torch.tanh(v)], -1)", "[-torch.tanh(u), -torch.tanh(v)], -1)"),
    # models, trainings, pools, networks and checkpoints: no theorem speaks of them, an ordinary test does
    Mutation("renewals that never ask the network", "models/nsgf", "self._build(self.together, generator, self.on_policy)", "self._build(self.together, generator)", "test_models.py::test_renewed_minibatches_are_moved_by_the_network"),
    Mutation("network's moves by the flow's step", "models/nsgf", "each).view_as(z) / self.steps", "each).view_as(z) * self.step", "test_models.py::test_renewed_minibatches_are_moved_by_the_network"),
    Mutation("every block begins with the first class", "models/nsgf", "[(turn + k) % max(1, self.classes)", "[k % max(1, self.classes)", "test_models.py::test_minibatches_take_turns_at_the_classes"),
    Mutation("every class starts from the first one's source", "models/flow", "generator, c).to(device)", "generator, 0).to(device)", "test_models.py::test_a_class_starts_from_its_own_source"),
    Mutation("network standardised to the target alone", "models/flow", "torch.cat(first))", "first[-1])", "test_models.py::test_a_network_is_standardised_to_source_and_target"),
    Mutation("longest move in units of length", "models/ept", "self.longest * (network.spread if isinstance(network, MLP) else 1.0)", "self.longest", "test_models.py::test_no_particle_of_an_ept_leaps"),
    Mutation("minibatches matched at the greatest cost", "models/straight", "linear_sum_assignment(cost)[1]", "linear_sum_assignment(-cost)[1]", "test_models.py::test_pairs_are_optimal"),
    Mutation("loss divided by the unit and not by its square", "training/together", "/ unit**2", "/ unit", "test_models.py::test_the_loss_is_the_squared_distance_of_velocities_in_units_of_the_data"),
    Mutation("loss averaged over coordinates", "training/together", ".square().sum(-1).mean(-1)", ".square().mean((-1, -2))", "test_models.py::test_the_loss_is_the_squared_distance_of_velocities_in_units_of_the_data"),
    Mutation("second model's chance left out of the checkpoint", "training/together", "enumerate(chances[1:], 1)", "enumerate(chances[:0], 1)", "test_training.py::test_models_fitted_together_go_on_to_the_bit"),
    Mutation("average that forgets what it should keep", "training/loop", "get_ema_multi_avg_fn(training.ema)", "get_ema_multi_avg_fn(1 - training.ema)", "test_training.py::test_the_average_is_the_recursion"),
    Mutation("chance not taken up again", "training/loop", 'self.generator.set_state(tensors["generator"])', "pass", "test_training.py::test_an_interrupted_run_goes_on_to_the_bit[FM]"),
    Mutation("pool not taken up again", "training/loop", 'thing.restore(_under(f"part/{part}", tensors))', "pass", "test_training.py::test_an_interrupted_run_goes_on_to_the_bit[NSGF]"),
    Mutation("hash of the bytes alone", "training/checkpoints", 'f"\\0{name} {t.dtype} {tuple(t.shape)}\\0"', 'f"\\0{name}\\0"', "test_streams.py::test_the_hash_sees_how_numbers_are_read"),
    Mutation("a method's data unseen", "training/streams", "if isinstance(value, MethodType):", "if value is MethodType:", "test_streams.py::test_data_in_functions_are_told_apart"),
    Mutation("global data unseen", "training/streams", "**read.nonlocals, **own}", "**read.nonlocals}", "test_streams.py::test_data_in_functions_are_told_apart"),
    Mutation("every ascent asks for the density", "models/turns", "told=not left", "told=True", "test_jko.py::test_only_the_last_ascent_of_a_turn_asks_for_the_density"),
    Mutation("file held by nobody", "training/checkpoints", "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "test_training.py::test_two_runs_on_one_path[file]"),
    Mutation("half precision about the origin", "models/pool", "x, v = x * unit + mean, v * pace", "x, v = x * unit, v * pace", "test_streams.py::test_half_precision_has_three_digits_in_every_unit_and_everywhere"),
    Mutation("pool takes any run's files", "models/pool", "mapped=True, mark=mark)", "mapped=True)", "test_streams.py::test_a_pool_on_disk_takes_only_its_own_files"),
    Mutation("pool keeps its oldest minibatches", "models/pool", "slot = self.added % self.capacity", "slot = min(self.added, self.capacity - 1)", "test_streams.py::test_the_pool_is_bounded_and_keeps_the_newest"),
    Mutation("code of time with twice the frequency", "networks/perceptrons", "angle = math.pi * t", "angle = 2 * math.pi * t", "test_training.py::test_the_code_of_time"),
    Mutation("weights of one seed for all", "networks/perceptrons", "torch.manual_seed(seed)", "torch.manual_seed(0)", "test_training.py::test_weights_are_the_generators_also_from_two_threads"),
    Mutation("samples in training mode", "networks/perceptrons", "module.training = False", "pass", "test_training.py::test_samples_are_drawn_in_evaluation_mode"),
    Mutation("first member's weights for all", "networks/stack", "{name: value[k] for", "{name: value[0] for", "test_training.py::test_a_stack_is_its_members"),
    Mutation("KL's critic without its one", "functionals/divergences", "return 1 + s + reference.log_density(x)", "return s + reference.log_density(x)", "test_jko.py::test_kl[0.0]"),
    Mutation("KL, the reference's density turned", "functionals/divergences", "1 + s + reference.log_density(x) -", "1 + s - reference.log_density(x) -", "test_jko.py::test_kl[0.0]"),
    Mutation("KL, a critic of another conjugate", "functionals/divergences", "return softplus(s) ** self.m", "return softplus(s) ** (self.m - 1)", "test_jko.py::test_entropy[3.0]"),
    Mutation("Jensen and Shannon's divergence once", "functionals/divergences", "math.log(4) + logsigmoid(-s)", "math.log(2) + logsigmoid(-s) / 2", "test_jko.py::test_kl_of_samples_and_jensen_shannon"),
    Mutation("entropy without its power before the critic", "functionals/divergences", "return self.m / (self.m - 1) * softplus(s)", "return 1 / (self.m - 1) * softplus(s)", "test_jko.py::test_entropy[2.0]"),
    Mutation("entropy in units of the volume", "functionals/divergences", "math.exp((1 - self.m) * reference.log_volume)", "math.exp(-reference.log_volume)", "test_jko.py::test_entropy[3.0]"),
    Mutation("ball of another dimension's volume", "functionals/references", "math.lgamma(d / 2 + 1)", "math.lgamma(d / 2)", "test_jko.py::test_the_uniform_law_on_the_ball"),
    Mutation("ball crowded at its centre", "functionals/references", "dtype=torch.float32) ** (1 / d)", "dtype=torch.float32)", "test_jko.py::test_the_uniform_law_on_the_ball"),
    Mutation("interaction without its one half", "functionals/energies", ") / others / 2", ") / others", "test_jko.py::test_energies_without_a_critic"),
    Mutation("free energy that the map's expansion raises", "functionals/energies", "return -value - gain", "return -value + gain", "test_jko.py::test_free_energy_is_the_change_of_variables"),
    Mutation("reference with the second moments about zero", "functionals/references", "apart = wide - wide.mean(0)", "apart = wide", "test_jko.py::test_kl[0.0]"),
    Mutation("convex network without its strong convexity", "networks/maps", "quadratic = self.strong * u.square().sum(-1) + (u", "quadratic = (u", "test_jko.py::test_a_convex_network_is_the_gradient_of_a_convex_function[2]"),
    Mutation("convex network with weights of any sign", "networks/maps", "z @ self.between[k - 1].exp()", "z @ self.between[k - 1]", "test_jko.py::test_a_convex_network_is_the_gradient_of_a_convex_function[2]"),
    Mutation("determinant of the factor alone", "networks/maps", "2 * factor.diagonal(", "factor.diagonal(", "test_jko.py::test_a_convex_network_is_the_gradient_of_a_convex_function[2]"),
    Mutation("conjugate gradients that stop after one", "networks/maps", "u.shape[-1] if iterations is None", "1 if iterations is None", "test_jko.py::test_the_sampled_determinant_has_the_exact_one_s_gradient_on_average"),
    Mutation("JKO step of twice the length", "models/turns", "/ (2 * self.model.step) + value", "/ (4 * self.model.step) + value", "test_jko.py::test_a_step_of_kl_between_gaussians[crowd]"),
    Mutation("trapezoid of two halves whole", "models/turns", "(slope * (moved - here)).sum(1).mean()) / 2", "(slope * (moved - here)).sum(1).mean())", "test_jko.py::test_schemes_are_told_apart[trapezoid]"),
    Mutation("first variation at the end of the step", "models/turns", "z = here.clone()", "z = moved.clone()", "test_jko.py::test_schemes_are_told_apart[trapezoid]"),
    Mutation("transport paid for from the source", "models/turns", "if model.whole else self.now)[row], self.now[row]", "if model.whole else self.now)[row], self.first[row]", "test_jko.py::test_a_step_of_kl_between_gaussians[crowd]"),
    Mutation("maps applied in the wrong order", "models/turns", "x = step(x)\n        return x\n\n    # --- within", "x = step(x)\n        return self.model.kept[0](x)\n\n    # --- within", "test_jko.py::test_a_step_of_kl_between_gaussians[fresh]"),
    Mutation("density that forgets a determinant", "models/jko", "change = change + wide.log_det(points)", "change = wide.log_det(points)", "test_jko.py::test_density"),
    Mutation("reference that stays where the step began", "models/turns", "rival.reference.follow(moved)", "pass", "test_jko.py::test_a_law_sixty_times_narrower_needs_a_reference_that_follows"),
    Mutation("followed moments without the shift of the mean", "functionals/references", "+ self.share * covariance + between", "+ self.share * covariance", "test_jko.py::test_a_reference_follows_as_a_mixture_does"),
    Mutation("critic's Adam not taken up again", "models/turns", "rival.optimizer.load_state_dict(memory)", "pass", "test_jko.py::test_an_interrupted_flow_goes_on_to_the_bit[5-particles]"),
    # targets that are known by their density
    Mutation("Stein's particles attract each other", "fields/stein", "push = K.sum(-1, keepdim=True) * z - K @ x", "push = K @ x - K.sum(-1, keepdim=True) * z", "test_targets.py::test_stein_is_the_sum_that_it_is_written_as"),
    Mutation("Stein's bandwidth without its one half", "fields/stein", "median / (2 * math.log(len(z) + 1))", "median / math.log(len(z) + 1)", "test_targets.py::test_stein_is_the_sum_that_it_is_written_as"),
    Mutation("Langevin's noise without its root of two", "particles", "(2 * step) ** 0.5 * noise", "step**0.5 * noise", "test_targets.py::test_langevin_has_the_law_of_its_recursion"),
    Mutation("discrepancy with its diagonal", "metrics", "values.sum() - values.diagonal().sum() if k == l", "values.sum() if k == l", "test_targets.py::test_ksd_is_the_sum_over_pairs"),
    Mutation("discrepancy without the kernel's second derivative", "metrics", "+ cross + d - square)", "+ cross)", "test_targets.py::test_ksd_is_the_sum_over_pairs"),
    Mutation("discrepancy of Gaussians at half the distance", "closed_forms/diffusions", "T = torch.linalg.solve(one + 2 * A / square, 2 * A)", "T = torch.linalg.solve(one + A / square, A)", "test_targets.py::test_ksd_of_gaussians_in_closed_form"),
    Mutation("KL of Gaussians, its determinants exchanged", "closed_forms/jko", "(excess - torch.log1p(excess)).sum() / 2", "(excess + torch.log1p(excess)).sum() / 2", "test_targets.py::test_divergences_of_gaussians"),
    Mutation("mixture's density unnormalised", "targets", "math.log(2 * math.pi) / 2 + math.log(self.scale)", "math.log(2 * math.pi) / 2", "test_targets.py::test_mixtures_have_their_density_and_moments"),
    Mutation("Barenblatt's distances by m - 1 alone", "targets", "betaincinv(self.d / 2, self.m / (self.m - 1)", "betaincinv(self.d / 2, 1 / (self.m - 1)", "test_targets.py::test_barenblatt_is_sampled_by_its_radial_law"),
    Mutation("precision's density without its Jacobian", "logistic", "self.shape * log_alpha - self.rate * alpha", "(self.shape - 1) * log_alpha - self.rate * alpha", "test_targets.py::test_the_precision_can_be_integrated_out"),
    Mutation("weights' prior without the precision's power", "logistic", "q / 2 * (log_alpha - math.log(2 * math.pi))", "-q / 2 * math.log(2 * math.pi)", "test_targets.py::test_the_posterior_is_prior_times_likelihood"),
    Mutation("mean of logarithms for the logarithm of the mean", "logistic", "torch.logsumexp(logsigmoid(part[:, :-1] @ signed.T), 0)", "logsigmoid(part[:, :-1] @ signed.T).mean(0) + math.log(len(part))", "test_targets.py::test_the_predictive_probability_is_the_samples_mean"),
    Mutation("Jensen and Shannon's divergence doubled", "metrics", "for half in halves) / 2, error", "for half in halves), error", "test_targets.py::test_divergences_from_densities_at_points"),
    Mutation("porous step as long as its start allows", "closed_forms/jko", "-(1 + r) * math.expm1(", "-(1 + r / 2) * math.expm1("),
    Mutation("porous step by the exponent of the density", "closed_forms/jko", "gamma, share = 1 / (d * (m - 1) + 2)", "gamma, share = d / (d * (m - 1) + 2)"),
    Mutation("symmetric floor without the mean's part", "metrics", "return d * (d + 3) * (n - 1)", "return d * (d + 1) * (n - 1)"),
    Mutation("Crank and Nicolson's old variation forgotten", "models/turns", "return (value + rival.on_particles(moved, move, past=True)) / 2", "return value", "test_jko.py::test_schemes_are_told_apart[crank-nicolson]"),
    Mutation("critic's chance left to the machine", "models/turns", "chance_of_dropout(critics, self.generator, step)", "chance_of_dropout(network, self.generator, step)", "test_jko.py::test_an_interrupted_flow_goes_on_to_the_bit[5-dropout]"),
]  # fmt: skip


def theorem_tests() -> dict[str, Path]:
    """Names of all ``test_thm_…`` functions, with their files."""
    files = sorted((ROOT / "tests").glob("test_thm_*.py"))
    return {
        name: file
        for file in files
        for name in re.findall(r"^def (test_thm_\w+)", file.read_text(encoding="utf-8"), re.M)
    }


def enough(rows: list[dict]) -> list[list[str]]:
    """For each recorded row the tests that have to run: together all tests, and for each mutation at least one."""
    chosen: list[list[str]] = [[] for _ in rows]
    for test in theorem_tests():
        noticed = [k for k, row in enumerate(rows) if test in row["killed_by"]]
        if noticed:  # the mutation that fewest tests notice is most its own
            chosen[min(noticed, key=lambda k: len(rows[k]["killed_by"]))].append(test)
    return [tests or row["killed_by"][:1] for tests, row in zip(chosen, rows, strict=True)]


def renewing(rows: dict[str, dict], found: list[set[str]] | None = None) -> list[list[str]]:
    """For each mutation the tests that have to run to renew a record, whose rows have the mutations' names.

    First as for :func:`enough`, and each test that the record does not know against all that its chapter's tests
    notice. Then, where something has not been `found` yet, whatever the record lists of it.
    """
    files, listed = theorem_tests(), [rows.get(m.name, {"killed_by": []})["killed_by"] for m in MUTATIONS]
    listed = [[name for name in names if name in files] for names in listed]
    if found is not None:
        done = set().union(*found)
        late = [[name for name in names if name not in done] for names in listed]
        return [names if not seen else rest for names, seen, rest in zip(listed, found, late, strict=True)]
    chosen = [set(names) for names in enough([{"killed_by": names} for names in listed])]
    unknown = [name for name in files if not any(name in names for names in listed)]
    for m, names, mine in zip(MUTATIONS, listed, chosen, strict=True):
        homes = {files[name] for name in names}
        mine |= {name for name in unknown if not m.test and (files[name] in homes or m.name not in rows)}
    return [sorted(mine) for mine in chosen]


def shares() -> dict[str, float]:
    """For each theorem test with a bound the largest share of it that it reaches; fails if a test does."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shares"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            os.environ.get("NSGF_WORKERS", "2"),
        ]
        tests = map(str, sorted(set(theorem_tests().values())))
        subprocess.run([*command, *tests], check=True, cwd=ROOT, env=os.environ | {"NSGF_SHARP": str(file)})
        largest: dict[str, float] = {}
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            name = re.search(r"::(test_\w+)", line["test"])[1]
            largest[name] = round(max(largest.get(name, 0.0), line["ratio"]), 4)
        return dict(sorted(largest.items()))


def reaching() -> list[list[str]]:
    """For each mutation the theorem tests that run the function it spoils; all, if it spoils none (a table, a default)."""
    with tempfile.TemporaryDirectory() as folder:
        rules, data = Path(folder) / "rules", Path(folder) / "data"
        rules.write_text(
            f"[run]\ndynamic_context = test_function\nsource = {ROOT}/nsgf_lite\ndata_file = {data}\n", encoding="utf-8"
        )
        command = ["coverage", "run", f"--rcfile={rules}", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        files = map(str, sorted(set(theorem_tests().values())))
        subprocess.run([sys.executable, "-m", *command, *files], check=True, cwd=ROOT)
        seen = CoverageData(basename=str(data))
        seen.read()
        reached = []
        for mutation in MUTATIONS:
            if mutation.test:
                reached.append([])
                continue
            file = ROOT / "nsgf_lite" / f"{mutation.file}.py"
            text = file.read_text(encoding="utf-8")
            line = text[: text.index(mutation.old)].count("\n") + 1
            functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
            homes = [n for n in functions if n.body[0].lineno <= line <= n.end_lineno]
            if not homes:
                reached.append(list(theorem_tests()))
                continue
            home = max(homes, key=lambda n: n.lineno)
            contexts = seen.contexts_by_lineno(str(file))
            found = {
                c.rsplit(".")[-1] for k, names in contexts.items() if home.lineno < k <= home.end_lineno for c in names
            }
            reached.append([name for name in theorem_tests() if name in found])
    return reached


def misplaced() -> list[str]:
    """Mutations whose text does not stand once in its file, which has changed since."""
    texts = {m.file: (ROOT / "nsgf_lite" / f"{m.file}.py").read_text(encoding="utf-8") for m in MUTATIONS}
    return [
        f"{m.name!r}: {m.old!r} must stand once in {m.file}.py" for m in MUTATIONS if texts[m.file].count(m.old) != 1
    ]


def failing(mutation: Mutation, names: list[str]) -> list[str]:
    """Those of the theorem tests, or of the mutation's own, that fail under it, or do not end in time."""
    files = theorem_tests()
    tests = [str(ROOT / "tests" / mutation.test)] if mutation.test else [f"{files[name]}::{name}" for name in names]
    if not tests:
        return []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "nsgf_lite", Path(folder) / "nsgf_lite", ignore=shutil.ignore_patterns("__pycache__"))
        source = Path(folder) / "nsgf_lite" / f"{mutation.file}.py"
        text = source.read_text(encoding="utf-8")
        source.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        options = ["-v", "-o", "addopts=", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", folder]
        command = [sys.executable, "-u", "-m", "pytest", *options, *tests]
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=SECONDS
            )
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            output, code = (late.stdout or b"").decode() + " FAILED", 1  # the last line is the test that did not end
    if code not in (0, 1):
        raise SystemExit(f"mutation {mutation.name!r}: pytest could not run\n{output}\n{done.stderr}")
    return sorted(set(re.findall(r"::(test_\w+)\S*(?: <.*?>)? (?:FAILED|ERROR)", output)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    parser.add_argument("--quick", action="store_true", help="with --record: only as much as shows all once more")
    parser.add_argument("--new", action="store_true", help="with --record: only what the record does not have")
    options = parser.parse_args()
    start, tests = time.perf_counter(), list(theorem_tests())
    if lost := misplaced():
        raise SystemExit("\n".join(lost))
    if options.record:
        writable(RECORD)
    whats = [f"{m.old}  →  {m.new}" for m in MUTATIONS]
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if RECORD.exists() else []
    known = {name for row in recorded for name in row["killed_by"] if name.startswith("test_thm_")}
    if options.new and not recorded:
        parser.error(f"--new keeps the rows of a record, and there is no {RECORD.relative_to(ROOT)}")
    if not options.record and ([row["what"] for row in recorded] != whats or known != set(tests)):
        print(f"{RECORD.relative_to(ROOT)} is not of these mutations and tests: run with --record")
        return 1
    found: list[set[str]] = [set() for _ in MUTATIONS]
    by_name = {row["mutation"]: row for row in recorded}
    sharp = shares() if options.record else {}

    def look(wanted: list[list[str]]) -> None:
        with ThreadPoolExecutor(int(os.environ.get("NSGF_WORKERS", "2"))) as pool:
            rows = zip(MUTATIONS, wanted, found, strict=True)
            jobs = [(m, names) if names or (m.test and not seen) else None for m, names, seen in rows]
            each = list(pool.map(lambda job: failing(*job) if job else [], jobs))
            for seen, killed in zip(found, each, strict=True):
                seen |= set(killed)

    if options.new:
        for seen, m, what in zip(found, MUTATIONS, whats, strict=True):
            row = by_name.get(m.name, {"what": ""})
            seen |= set(row["killed_by"]) if row["what"] == what else set()
        for wanted in (sorted(set(tests) - known), tests):
            look([[] if seen else wanted for seen in found])
    elif options.quick:
        look(renewing(by_name))
        look(renewing(by_name, found))
    else:
        look(reaching() if options.record else enough(recorded))
    killers = [sorted(seen) for seen in found]
    for m, killed in zip(MUTATIONS, killers, strict=True):
        print(f"{m.name}: {', '.join(killed) or 'NOT NOTICED'}")
    unnoticed = [m.name for m, killed in zip(MUTATIONS, killers, strict=True) if not killed]
    toothless = sorted(set(tests) - {name for killed in killers for name in killed})
    if options.record:
        rows = [
            {"mutation": m.name, "file": f"{m.file}.py", "what": what, "killed_by": killed}
            for m, what, killed in zip(MUTATIONS, whats, killers, strict=True)
        ]
        source = provenance("python tests/mutations.py", time.perf_counter() - start, ["nsgf-lite", "torch", "pytest"])
        if options.new:
            before = json.loads(RECORD.read_text(encoding="utf-8"))["provenance"]
            source["rows kept from"] = [*before.get("rows kept from", []), before["commit"]]
        write_record(RECORD, {"provenance": source, "sharp": sharp, "rows": rows})
    for complaint, items in (("mutations no test notices", unnoticed), ("tests no mutation kills", toothless)):
        if items:
            print(f"{complaint}: {', '.join(items)}")
    print(
        f"{len(MUTATIONS) - len(unnoticed)} of {len(MUTATIONS)} mutations noticed, {len(toothless)} tests without teeth"
    )
    return int(bool(unnoticed or toothless))


if __name__ == "__main__":
    sys.exit(main())
