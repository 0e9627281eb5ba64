"""Every public function under every kind of input that a reader may bring: nothing hangs, nothing is silently wrong.

A row is a function with arguments that it takes; a column a kind of change to them, made wherever it applies. What
comes out is the answer that the unchanged arguments in float64 give, or a warning that it may not be, or a ValueError
or TypeError. A public name that no row uses makes the last test fail: give it a row.
"""

import inspect
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

import nsgf_lite as nl
from nsgf_lite import closed_forms, fields, logistic, metrics, networks, plots, targets, toy

F64, REFUSED = torch.float64, (ValueError, TypeError)
NAN, INF = float("nan"), float("inf")
N, M, MORE = 6, 9, {8: 6, 12: 9}  # points, and how many of more there are without padding


def grid(n, d, seed):
    """Points with few binary digits: sums with whole numbers up to 2**19 are exact in float32."""
    z = torch.randn(n, d, generator=Generator().manual_seed(seed), dtype=F64)
    return (16 * z).round() / 16


def simplex(n, seed):
    a = 0.2 + torch.rand(n, generator=Generator().manual_seed(seed), dtype=F64)
    return a / a.sum()


@dataclass
class Row:
    """A function with arguments that it takes. `moves` says what a shift of all clouds does to what comes out."""

    call: object
    given: dict
    moves: bool | None = False  # with the points (True), not at all (False), or otherwise (None)
    seeded: bool = False
    tol: float = 1e-6

    def __call__(self, **changes):
        given = self.given | changes | ({"generator": Generator().manual_seed(3)} if self.seeded else {})
        return flat(self.call(**given))

    @property
    def clouds(self):
        return {k: v for k, v in self.given.items() if isinstance(v, Tensor) and v.ndim > 1 and k != "label"}

    @property
    def tensors(self):
        return {k: v for k, v in self.given.items() if isinstance(v, Tensor)}

    @property
    def numbers(self):
        return {k: v for k, v in self.given.items() if type(v) in (int, float)}

    def floats(self):
        return {k: v.float() for k, v in self.tensors.items()}


def flat(out):
    """All numbers of a result, as a list of tensors."""
    if isinstance(out, Tensor):
        return [out.detach()]
    if isinstance(out, int | float):
        return [torch.tensor(out, dtype=F64)]
    if isinstance(out, nl.Potentials):
        return [out.f, out.g]
    return [t for part in out for t in flat(part)]


def agree(these, those, tol, trim=False):
    """Equal up to tol times the largest entry of the point; with `trim`, where there is no padding."""
    assert len(these) == len(those)
    for one, other in zip(these, those, strict=True):
        one, other = one.double(), other.double()
        if trim:
            for axis in range(one.ndim):
                one = one.narrow(axis, 0, MORE.get(one.shape[axis], one.shape[axis]))
        assert one.shape == other.shape and bool(torch.isfinite(one).all()), (one, other)
        size = other.abs().amax(-1, keepdim=True) if other.ndim > 1 else other.abs().max()
        worst = float(((one - other).abs() / (1 + size)).max())
        assert worst <= tol, f"{worst:.2g} apart: {one.flatten()[:4]} for {other.flatten()[:4]}"


# The rows -----------------------------------------------------------------------------------------------------------

FIELDS = {
    "Sinkhorn": lambda eps, tol: fields.Sinkhorn(eps, tol),
    "ScoreDifference": lambda h: fields.ScoreDifference(h),
    "ScoreDifference, laplace": lambda h: fields.ScoreDifference(h, "laplace"),
    "SmoothedKL": lambda h, nodes: fields.SmoothedKL(h, nodes),
    "SmoothedKL, draws": lambda h, draws: fields.SmoothedKL(h, draws=draws),
    "SinkhornProxy": lambda eps, iterations: fields.SinkhornProxy(eps, iterations),
    "Drift": lambda tau: fields.Drift((tau,)),
    "Drift, floor": lambda tau, floor: fields.Drift((tau, 2 * tau) if tau == 0.9 else (tau,), floor=floor),
    "MMD": lambda h: fields.MMD(h),
    "MMD, median": lambda: fields.MMD(),
    "MMD, laplace": lambda h: fields.MMD((h, 3.0), "laplace"),
    "DrMMD": lambda lam, h: fields.DrMMD(lam, h),
    "KALE": lambda lam, h, max_iter: fields.KALE(lam, h, max_iter=max_iter),
    "SlicedWasserstein": lambda directions: fields.SlicedWasserstein(directions),
    "Wasserstein": lambda: fields.Wasserstein(),
    "Interaction": lambda: fields.Interaction(lambda z: z.square().sum(-1) / 2 - (z**4).sum(-1).sqrt()),
}
PARAMETERS = {"eps": 0.5, "tol": 1e-9, "h": 0.75, "nodes": 2, "draws": 3, "iterations": 2, "tau": 0.5, "floor": 0.125}
PARAMETERS |= {"lam": 0.25, "max_iter": 30, "directions": 5}


def rows(d):
    """Functions of two clouds in dimension d."""
    x, y, at = grid(N, d, 1), grid(M, d, 2) + 0.25, grid(4, d, 3)
    two = {"x": x, "y": y, "a": simplex(N, 4), "b": simplex(M, 5)}
    solver = two | {"eps": 0.5, "tol": 1e-9, "max_iter": 5000}
    plain = {"x": x, "y": y}

    def velocity(name):
        make = FIELDS[name]
        names = list(inspect.signature(make).parameters)

        def call(x, y, a, b, at=None, generator=None, **parameters):
            return make(**parameters)(x, y, at=at, a=a, b=b, generator=generator)

        return call, {k: PARAMETERS[k] for k in names}

    def slope(x, y, a, b, eps, tol, max_iter):
        x = x.detach().requires_grad_() if isinstance(x, Tensor) and x.dtype.is_floating_point else x
        value = nl.sinkhorn_divergence(x, y, eps, a, b, tol=tol, max_iter=max_iter)
        return torch.autograd.grad(value.sum(), x)[0]

    out = {
        "potentials": Row(nl.potentials, solver),
        "plan": Row(nl.plan, solver),
        "entropic_cost": Row(nl.entropic_cost, solver),
        "sinkhorn_divergence": Row(nl.sinkhorn_divergence, solver),
        "gradient of the divergence": Row(slope, solver),
        "barycentric_map": Row(lambda **given: nl.barycentric_map(**given)(), solver, moves=True),
        "map at points": Row(lambda at, **given: nl.barycentric_map(**given)(at), solver | {"at": at}, moves=True),
        "extended potential": Row(lambda at, **given: nl.barycentric_map(**given).potential(at), solver | {"at": at}),
        "exact_plan": Row(fields.exact_plan, two),
        "w2": Row(metrics.w2, two),
        "mmd2": Row(metrics.mmd2, plain | {"bandwidth": 0.5}),
        "mmd2, median": Row(metrics.mmd2, plain),
        "Kernel": Row(lambda x, y, h: fields.Kernel(h).gram(x, y, [fields.Kernel(h).h]), plain | {"h": 0.75}),
        "follow": Row(
            lambda eps, **given: nl.follow(fields.Sinkhorn(eps, 1e-6), **given),
            two | {"eps": 0.5, "step": 0.25, "steps": 2, "stop_below": 1e-9},
            moves=True,
        ),
        "trajectories": Row(
            lambda x, y, eps, **given: nl.trajectories(fields.Sinkhorn(eps, 1e-6), x, y, **given)[1],
            plain | {"eps": 0.5, "step": 0.25, "steps": 1},
        ),
    }
    for name in FIELDS:
        if d > 8 and name == "SmoothedKL":
            continue
        call, parameters = velocity(name)
        seeded = name in ("SmoothedKL, draws", "SlicedWasserstein")
        # KALE's and the floor's sums of the whole kernel are stated to a tolerance of their own
        out[name] = Row(call, two | parameters, seeded=seeded, tol=1e-4 if name == "KALE" else 3e-6)
        if name not in ("SlicedWasserstein", "Wasserstein", "MMD, median"):
            out[name + ", at points"] = Row(call, two | parameters | {"at": at}, seeded=seeded, tol=out[name].tol)
    return out


PLANE, SPACE = rows(2), {f"{name}, in 20 dimensions": row for name, row in rows(20).items()}
PAIRS = PLANE | SPACE

LAW = {"m": [0.0, 1.0], "S": [[1.0, 0.25], [0.25, 2.0]], "mean": [1.0, -1.0], "goal": [[2.0, 0.0], [0.0, 0.5]]}
MS, TG = (LAW["m"], LAW["S"]), (LAW["mean"], LAW["goal"])
KL = dict(zip(("mean", "covariance", "target_mean", "target_covariance"), MS + TG, strict=True))
AT = {"x": grid(5, 2, 6)}
CLASSES = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=F64)
CASES = {"x": grid(5, 3, 7), "X": grid(6, 2, 8)}


def quartic(x):
    return -(x**4).sum(1) / 4 + x[:, 0] * x[:, 1] / 4


POINTS = {
    "cross_velocity": Row(lambda x, h: closed_forms.cross_velocity(x, h), AT | {"h": 0.5}, None),
    "cross_curl": Row(lambda x, h: closed_forms.cross_curl(x, h), AT | {"h": 0.5}, None),
    "barenblatt": Row(closed_forms.barenblatt, AT | {"t": 1.5, "m": 2.0}, None),
    "gaussian_velocity": Row(lambda x, eps: closed_forms.gaussian_velocity(*MS, *TG, eps)(x), AT | {"eps": 0.5}, None),
    "segment_velocity": Row(lambda x, t: closed_forms.segment_velocity(t, *MS, *TG)(x), AT | {"t": 0.5}, None),
    "Stein": Row(lambda x, h: fields.Stein(quartic, h)(x), AT | {"h": 0.5}, None),
    "Stein, median": Row(lambda x: fields.Stein(quartic)(x), AT, None),
    "score": Row(lambda x: fields.score(quartic, x), AT, None),
    "langevin": Row(
        lambda x, step, steps, generator: nl.langevin(quartic, x, step, steps, generator=generator),
        AT | {"step": 0.0625, "steps": 2},
        None,
        seeded=True,
    ),
    "ksd": Row(lambda x, h: metrics.ksd(x, lambda z: -z, h), AT | {"h": 0.5}, None),
    "ksd, median": Row(lambda x: metrics.ksd(x, lambda z: -z), AT, None),
    "GaussianMixture, density": Row(
        lambda x, means, scale: targets.GaussianMixture(means, scale).log_density(x),
        AT | {"means": grid(3, 2, 9), "scale": 0.5},
        None,
    ),
    "Barenblatt, density": Row(
        lambda x, t, m: targets.Barenblatt(2, t, m).log_density(x).exp(), AT | {"t": 256.0, "m": 2.0}, None
    ),
    "LogisticPosterior": Row(
        lambda x, X, shape, rate: logistic.LogisticPosterior(X, CLASSES, shape, rate).log_density(x),
        CASES | {"shape": 1.5, "rate": 0.25},
        None,
    ),
    "predictive": Row(lambda x, X: logistic.predictive(x, X, CLASSES), CASES, None),
    "segment_time": Row(lambda x, nodes: closed_forms.segment_time(x, *MS, *TG, nodes), AT | {"nodes": 40}, None),
}
MATRICES = {
    "gaussian_map": Row(closed_forms.gaussian_map, {"A": LAW["S"], "B": LAW["goal"], "eps": 0.5}, None),
    "gaussian_ot": Row(
        closed_forms.gaussian_ot, {"a": LAW["m"], "A": LAW["S"], "b": LAW["mean"], "B": LAW["goal"], "eps": 0.5}, None
    ),
    "gaussian_divergence": Row(
        closed_forms.gaussian_divergence,
        {"a": LAW["m"], "A": LAW["S"], "b": LAW["mean"], "B": LAW["goal"], "eps": 0.5},
        None,
    ),
    "gaussian_w2": Row(
        closed_forms.gaussian_w2, {"a": LAW["m"], "A": LAW["S"], "b": LAW["mean"], "B": LAW["goal"]}, None
    ),
    "gaussian_ksd": Row(
        closed_forms.gaussian_ksd, {"a": LAW["m"], "A": LAW["S"], "b": LAW["mean"], "B": LAW["goal"], "h": 0.5}, None
    ),
    "symmetric_kl": Row(metrics.symmetric_kl, {"a": LAW["m"], "A": LAW["S"], "b": LAW["mean"], "B": LAW["goal"]}, None),
    "barenblatt_radius": Row(closed_forms.barenblatt_radius, {"t": 1.5, "d": 3, "m": 2.0}, None),
    "gaussian_flow": Row(
        closed_forms.gaussian_flow,
        {
            "m": LAW["m"],
            "S": LAW["S"],
            "target_mean": LAW["mean"],
            "target_covariance": LAW["goal"],
            "eps": 0.5,
            "times": [0.0, 0.5],
        },
        None,
    ),
    "segment_law": Row(
        closed_forms.segment_law,
        {"t": 0.25, "m": LAW["m"], "S": LAW["S"], "target_mean": LAW["mean"], "target_covariance": LAW["goal"]},
        None,
    ),
    "gaussian_kl": Row(closed_forms.gaussian_kl, KL, None),
    "gaussian_chi2": Row(closed_forms.gaussian_chi2, KL | {"covariance": [[1.0, 0.25], [0.25, 0.5]]}, None),
    "jko_gaussian": Row(closed_forms.jko_gaussian, KL | {"step": 0.25}, None),
    "jko_gaussian, crank-nicolson": Row(
        closed_forms.jko_gaussian, KL | {"step": 0.25, "scheme": "crank-nicolson"}, None
    ),
    "jko_barenblatt": Row(closed_forms.jko_barenblatt, {"t": 1.5, "step": 0.25, "d": 3, "m": 2.0}, None),
    "symmetric_kl_floor": Row(metrics.symmetric_kl_floor, {"n": 100, "d": 3}, None),
    "ou_moments": Row(closed_forms.ou_moments, {"t": 0.5, "A": LAW["S"], "b": LAW["m"]}, None),
    "two_atom_mass": Row(closed_forms.two_atom_mass, {"alpha": 0.75, "beta": 0.5, "distance": 2.0, "eps": 0.5}, None),
    "two_atom_velocity": Row(
        closed_forms.two_atom_velocity,
        {"field": "proxy", "alpha": 0.75, "beta": 0.5, "distance": 2.0, "h": 0.5, "order": 2},
        None,
    ),
    "handover_constant": Row(closed_forms.handover_constant, {"tau": 0.5, "sigma": 0.5, "radius": 1.5}, None),
}


def kind(name):
    return next(getattr(home, name) for home in (toy, targets, logistic) if hasattr(home, name))


def law(kind):
    return lambda n, generator, dtype=torch.float32, **given: kind(**given).sample(n, generator, dtype)


LAWS = {
    name: Row(law(kind(name)), {"n": 5, "dtype": F64} | given, None, seeded=True)
    for name, given in {
        "Moons": {"noise": 0.25, "scale": 3.0, "shift": -1.0},
        "EightGaussians": {"radius": 5.0, "sigma": 0.5},
        "SCurve": {"noise": 0.25, "scale": 1.5},
        "Checkerboard": {"side": 4.0},
        "Circles": {"ratio": 0.3, "noise": 0.25, "scale": 3.0},
        "Spiral": {"turns": 1.5, "noise": 0.25, "scale": 0.3},
        "Gaussian": {"mean": (1.0, 2.0), "covariance": ((2.0, 0.5), (0.5, 1.0))},
        "Barenblatt": {"d": 2, "t": 0.5, "m": 2.0},
        "Twonorm": {"d": 4},
        "Ringnorm": {"d": 4},
        "Waveform": {},
    }.items()
}
LAWS["floor"] = Row(
    lambda n, generator, pairs: metrics.floor(toy.Moons(), n, generator, pairs=pairs),
    {"n": 5, "pairs": 2},
    None,
    seeded=True,
)

LAWS["random_mixture"] = Row(
    lambda d, side, components, generator: targets.random_mixture(d, side, generator, components).means,
    {"d": 3, "side": 5.0, "components": 4},
    None,
    seeded=True,
)
LAWS["GaussianMixture"] = Row(
    lambda means, scale, n, generator: targets.GaussianMixture(means, scale).sample(n, generator, F64),
    {"means": grid(3, 2, 9), "scale": 0.5, "n": 5},
    None,
    seeded=True,
)
LAWS["LogisticPosterior, prior"] = Row(
    lambda X, shape, rate, n, generator: logistic.LogisticPosterior(X, CLASSES, shape, rate).prior(n, generator, F64),
    {"X": CASES["X"], "shape": 1.5, "rate": 0.25, "n": 5},
    None,
    seeded=True,
)

SHORT = nl.Training(steps=2, batch=4, warmup=0, ema=0.0)


def critic(x, y, penalty):
    return fields.Critic(penalty=penalty, training=SHORT).fit(x, y)(x, y)


LEARN = {"Critic": Row(critic, {"x": grid(N, 2, 1).float(), "y": grid(M, 2, 2).float(), "penalty": 0.5}, None)}


def narrow(d, classes):
    return networks.MLP(d, width=4, depth=1, classes=classes)


def ratio(d, classes):
    return networks.MLP(d, out=1, width=4, depth=1)


def fitted(kind, n=3, steps=2):
    """Samples of a model that has made two optimiser steps."""

    def call(x, y, seed, at=None, **parameters):
        model = kind(**parameters).fit(x, y, SHORT, seed=seed, progress=False)
        return model.sample(n if at is None else len(at), parameters.get("steps", steps), start=at)

    return call


def descended(x, y, seed, at, **parameters):
    nets = {"transport": lambda d: networks.ResidualMap(d, 4, 1), "critic": lambda d: networks.LogRatio(d, 4, 1)}
    model = nl.JKOFlow(nl.functionals.JSD(y), **nets, **parameters).fit(x, SHORT, seed=seed, progress=False)
    return model.sample(len(at), start=at)


def side_by_side(x, y, seed, smallest):
    models = [nl.FlowMatching(narrow, smallest=smallest) for _ in "ab"]
    nl.fit_together(models, [x, x], [y, y], SHORT, seeds=[seed, seed + 1], progress=False)
    return [model.sample(3, 2) for model in models]


def pooled(x, v, capacity, n, generator):
    pool = nl.Pool(capacity)
    pool.add(x, v)
    return pool.sample(n, generator)[:3]


def one_step():
    return networks.seeded(lambda: networks.Residual(2, 2, width=4, depth=1), Generator().manual_seed(1))


def drifted(y, tau, noise, **given):
    net = one_step()
    nl.drifting.train(net, fields.Drift((tau,)), y, SHORT, noise=noise, progress=False, **given)
    return nl.drifting.sample(net, 3, noise)


def weights(make):
    """The first weights of a network, and its buffers."""

    def call(**sizes):
        return list(networks.seeded(lambda: make(**sizes), Generator().manual_seed(1)).state_dict().values())

    return call


def standardised(net):
    def call(points):
        net.standardise(points)
        return [net.centre, net.spread]

    return Row(call, {"points": grid(N, 2, 1)}, None)


FLOWS = {"x": grid(N, 2, 1).float(), "y": grid(M, 2, 2).float(), "seed": 3, "network": narrow}
SINKHORN = {"eps": 0.5, "step": 0.5, "steps": 2, "minibatch": 4, "pool": 2, "together": 2, "tol": 1e-3}
FIT = {
    "NSGF": Row(fitted(nl.NSGF), FLOWS | SINKHORN | {"at": grid(4, 2, 3).float()}, None),
    "NSGF, on policy": Row(fitted(nl.NSGF), FLOWS | SINKHORN | {"renew": 1, "on_policy": True, "half": True}, None),
    "NSGFPlusPlus": Row(fitted(nl.NSGFPlusPlus), FLOWS | SINKHORN | {"predictor": ratio}, None),
    "FlowMatching": Row(fitted(nl.FlowMatching), FLOWS | {"smallest": 0.25}, None),
    "StochasticInterpolant": Row(fitted(nl.StochasticInterpolant), FLOWS, None),
    "OTCFM": Row(fitted(nl.OTCFM), FLOWS | {"minibatch": 4, "matched": 2}, None),
    "RectifiedFlow": Row(fitted(nl.RectifiedFlow), FLOWS | {"pairs": 8, "teacher_steps": 2}, None),
    "EPT": Row(
        fitted(nl.EPT), FLOWS | {"network": ratio, "step": 0.25, "steps": 2, "particles": 5, "longest": 0.5}, None
    ),
    "JKOFlow": Row(
        descended,
        {k: FLOWS[k] for k in ("x", "y", "seed")}
        | {"at": grid(4, 2, 3).float(), "step": 0.5, "steps": 2, "ascents": 1, "descents": 1, "particles": 5},
        None,
    ),
    "fit_together": Row(side_by_side, {k: FLOWS[k] for k in ("x", "y", "seed")} | {"smallest": 0.25}, None),
    "train": Row(drifted, {"y": FLOWS["y"], "seed": 3, "step": 0.5, "tau": 0.5, "data": 5, "noise": 2}, None),
    "velocity": Row(
        lambda x, y, tau, generator: nl.drifting.velocity([fields.Drift((tau,))], x, y, generator),
        {"x": grid(N, 2, 1)[None], "y": grid(M, 2, 2)[None], "tau": 0.5},
        None,
        seeded=True,
    ),
    "MLP, standardised": standardised(narrow(2, 0)),
    "ResidualMap, standardised": standardised(networks.ResidualMap(2, 4, 1)),
    "LogRatio, standardised": standardised(networks.LogRatio(2, 4, 1)),
    "ICNN, standardised": standardised(networks.ICNN(2, 4, 1)),
    "Residual, standardised": standardised(networks.Residual(3, 2, width=4, depth=1)),
}
MADE = {
    "Pool": Row(
        pooled,
        {"x": grid(N, 2, 1)[None, None], "v": grid(N, 2, 2)[None, None], "capacity": 2, "n": 5},
        None,
        seeded=True,
    ),
    "Training": Row(
        lambda **given: [nl.Training(**given).rate_at(k) for k in range(4)],
        {"steps": 4, "batch": 8, "rate": 0.25, "decay": 1, "warmup": 2, "clip": 1.0, "ema": 0.5, "every": 2},
        None,
    ),
    "sample": Row(
        lambda n, noise, generator: nl.drifting.sample(one_step(), n, noise, chance=generator),
        {"n": 3, "noise": 2},
        None,
        seeded=True,
    ),
    "MLP": Row(
        weights(networks.MLP), {"dimension": 2, "out": 3, "width": 4, "depth": 1, "frequencies": 2, "classes": 2}
    ),
    "ResidualMap": Row(weights(networks.ResidualMap), {"dimension": 2, "width": 4, "depth": 1}),
    "LogRatio": Row(weights(networks.LogRatio), {"dimension": 2, "width": 4, "depth": 1}),
    "ICNN": Row(weights(networks.ICNN), {"dimension": 2, "width": 4, "depth": 1, "rank": 2, "strong": 0.25}),
    "Residual": Row(weights(networks.Residual), {"inputs": 3, "out": 2, "width": 4, "depth": 1}),
    "Stack": Row(
        weights(lambda size, width: networks.Stack([networks.Residual(2, 2, width, 1) for _ in range(size)])),
        {"size": 2, "width": 4},
    ),
    "seeded": Row(
        lambda make, generator: networks.seeded(make, generator), {"make": lambda: torch.ones(2)}, seeded=True
    ),
}


EVERY = PAIRS | POINTS | MATRICES | LAWS | LEARN | FIT | MADE
DATA = PAIRS | POINTS | LEARN | FIT  # those that take clouds
ALL = pytest.mark.parametrize("name", EVERY)
CLOUDS = pytest.mark.parametrize("name", DATA)
TWO = pytest.mark.parametrize("name", PAIRS)
WEIGHED = pytest.mark.parametrize("name", [name for name, row in PAIRS.items() if "a" in row.given])


def warned(call):
    """What comes out, and whether there was a warning that it may not be right."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = call()
    kinds = (nl.ConvergenceWarning, fields.UnderflowWarning)
    return out, any(issubclass(w.category, kinds) for w in caught)


def right_or_refused(row, **changes):
    """Finite numbers, or an error of the right kind."""
    try:
        out, told = warned(lambda: row(**changes))
    except (*REFUSED, FloatingPointError):
        return
    assert told or all(bool(torch.isfinite(t).all()) for t in out), out


# The kinds ----------------------------------------------------------------------------------------------------------


@TWO
def test_offset(name):
    """Map coordinates in float32: half a million away, where neighbouring numbers are 1/32 apart."""
    row, far = PAIRS[name], 2.0**19
    here = row(**row.floats())
    there = row(**row.floats() | {k: v.float() + far for k, v in row.clouds.items()})
    if row.moves:
        agree([t - far for t in there], here, 1 / 16)
    else:
        agree(there, here, 3e-6)


@WEIGHED
@pytest.mark.parametrize("far", [1e4, 1e10, -9999.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_padding(name, far, dtype):
    """Rows of weight zero, wherever they are, change nothing at the others."""
    row = PAIRS[name]
    given = {k: v.to(dtype) for k, v in row.tensors.items()}
    x, y, a, b = (given[k] for k in "xyab")
    more = {
        "x": torch.cat([x, torch.full((2, x.shape[1]), far, dtype=dtype)]),
        "y": torch.cat([y, torch.full((3, x.shape[1]), far, dtype=dtype)]),
        "a": torch.cat([a, a.new_zeros(2)]),
        "b": torch.cat([b, b.new_zeros(3)]),
    }
    agree(row(**given | more), row(**given), 1e-5 if dtype == torch.float32 else row.tol, trim=True)


@TWO
@pytest.mark.parametrize("fill", [-9999.0, 1e6])
def test_fill_values(name, fill):
    """A row of -9999 that counts: float32 gives what float64 gives, or warns."""
    row = PAIRS[name]
    if row.seeded and name.endswith("20 dimensions"):
        return  # so many normal numbers are other ones in float32
    y = row.given["y"].clone()
    y[-1] = fill
    exact, told = warned(lambda: row(y=y))
    out, also = warned(lambda: row(**row.floats() | {"y": y.float()}))
    if not (told or also):
        agree(out, exact, 1e-3)


@CLOUDS
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e20), (torch.float32, 1e18), (F64, 1e160)])
def test_overflow(name, dtype, large):
    """What cannot be squared is refused, by the argument's name and size."""
    row = DATA[name]
    given = {k: v.to(dtype) for k, v in row.tensors.items()}
    for cloud in row.clouds:
        spoiled = given[cloud].clone()
        spoiled[0, 0] = large
        with pytest.raises(ValueError, match=rf"must lie within .* got {large:g}".replace("+", r"\+")):
            row(**given | {cloud: spoiled})


@ALL
@pytest.mark.parametrize("value", [1e160, 1e20, 1e-20, 1e-160, 10**400])
def test_extreme_numbers(name, value):
    row = EVERY[name]
    for k, v in row.numbers.items():
        if isinstance(v, float):
            right_or_refused(row, **{k: value})


@TWO
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_large_temperatures(name, dtype):
    """As eps grows beyond all costs, values and velocities tend to those of the limit, to rounding."""
    row = PAIRS[name]
    if "eps" in row.given and name.split(",")[0] not in ("plan", "SinkhornProxy"):
        given = {k: v.to(dtype) for k, v in row.tensors.items()}
        agree(row(**given, eps=1e7), row(eps=1e7), 1e-5)
        agree(row(**given, eps=1e25), row(eps=1e9), 1e-5)


LENGTH = {"h", "tau", "bandwidth"}


@TWO
@pytest.mark.parametrize("power", [-27, 27])
def test_units(name, power):
    """Lengths in another unit, a power of two: the same plans; values, images and velocities by their dimension."""
    row, unit = PAIRS[name], 2.0**power
    if name.split(",")[0] in ("SmoothedKL", "KALE", "DrMMD", "MMD", "gradient of the divergence", "Drift"):
        pytest.skip("in other units than lengths; test_fields.test_the_unit_of_length")
    changes = {k: v * unit for k, v in row.clouds.items()}
    changes |= {k: v * unit for k, v in row.numbers.items() if k in LENGTH}
    changes |= {k: v * unit**2 for k, v in row.numbers.items() if k == "eps"}
    if "stop_below" in row.given:
        changes["stop_below"] = row.given["stop_below"] * unit
    kind = name.split(",")[0]
    dimension = 0 if kind in ("plan", "exact_plan", "mmd2", "Kernel") else 1
    if kind in ("potentials", "entropic_cost", "sinkhorn_divergence", "extended potential"):
        dimension = 2
    agree([t / unit**dimension for t in row(**changes)], row(), 1e-9)


@ALL
def test_autocast(name):
    """Under a caller's autocast the arithmetic stays what it is."""
    row = EVERY[name]
    given = row.floats()
    with torch.autocast("cpu", torch.bfloat16):
        out = row(**given)
    agree(out, row(**given), 1e-6)


@ALL
def test_inference_mode(name):
    row = EVERY[name]
    expected = row()
    with torch.inference_mode():
        if name.startswith("gradient"):
            return  # which is what inference mode forbids
        agree(row(**{k: v.clone() for k, v in row.tensors.items()}), expected, 1e-12)


@ALL
def test_default_dtype(name):
    """A caller's default of float64 changes neither numbers nor types."""
    row = EVERY[name]
    given = row.floats()
    if "dtype" in row.given:
        given["dtype"] = torch.float32
    expected = row(**given)
    torch.set_default_dtype(F64)
    try:
        out = row(**given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in out] == [t.dtype for t in expected]
    agree(out, expected, 1e-6)


@CLOUDS
def test_not_contiguous(name):
    row = DATA[name]
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in row.tensors.items()}
    turned = {k: v.mT.contiguous().mT for k, v in row.clouds.items()}
    assert not any(v.is_contiguous() for v in turned.values())
    expected = row()
    agree(row(**strided), expected, 1e-6)
    agree(row(**turned), expected, 1e-6)


@ALL
def test_numpy_scalars(name):
    row = EVERY[name]
    expected = row()
    for kinds in ({float: np.float64, int: np.int64}, {float: np.float32, int: np.int32}):
        out = row(**{k: kinds[type(v)](v) for k, v in row.numbers.items()})
        agree(out, expected, 1e-5 if kinds[float] is np.float32 else 1e-12)
        assert [t.dtype for t in out] == [t.dtype for t in expected]


@CLOUDS
def test_integer_tensors(name):
    row = DATA[name]
    for k, v in row.tensors.items():
        with pytest.raises(REFUSED):
            row(**{k: v.long()})
    with pytest.raises(REFUSED):
        row(**{k: v.long() for k, v in row.tensors.items()})


def test_integer_matrices():
    """Whole numbers for means and covariances are numbers."""
    whole = torch.tensor([[2, 1], [1, 3]])
    agree(
        flat(closed_forms.gaussian_map(whole, whole, 1)), flat(closed_forms.gaussian_map(whole.double(), whole, 1.0)), 0
    )


@ALL
@pytest.mark.parametrize("wrong", ["text", object(), {"a": 1}, 1j], ids=["text", "object", "dict", "complex"])
def test_wrong_types(name, wrong):
    row = EVERY[name]
    for k in row.given:
        with pytest.raises(REFUSED):
            row(**{k: wrong})


@ALL
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_not_finite(name, value):
    """In a tensor, in a list, as a number."""
    row = EVERY[name]
    for k, v in row.given.items():
        if isinstance(v, Tensor):
            bad = v.clone()
            bad.view(-1)[0] = value
        elif isinstance(v, list | tuple):
            bad = (value, *v[1:]) if isinstance(v[0], float) else [[value, *v[0][1:]], *v[1:]]
        elif type(v) in (int, float):
            bad = value
        else:
            continue
        with pytest.raises(REFUSED):
            row(**{k: bad})


@CLOUDS
def test_empty(name):
    row = DATA[name]
    for k, v in row.tensors.items():
        with pytest.raises(ValueError):
            row(**{k: v[:0]})


@CLOUDS
def test_requires_grad(name):
    """Inputs that ask for gradients change no value."""
    row = DATA[name]
    if name.startswith("gradient"):
        return
    asking = {k: v.clone().requires_grad_() for k, v in row.tensors.items()}
    agree(row(**asking), row(), 1e-12)


@pytest.mark.parametrize("name", [name for name in PAIRS if "cost" in name or "divergence" in name or ", at" in name])
def test_gradients_that_are_given_are_right(name):
    """In every tensor whose gradient autograd gives, along one direction, by a central difference."""
    row = PAIRS[name]
    if name.startswith("gradient"):
        return
    for k in ("x", "y", "at"):
        if k not in row.given:
            continue
        z = row.given[k].clone().requires_grad_()
        given = row.given | {k: z} | ({"generator": Generator().manual_seed(3)} if row.seeded else {})
        out = row.call(**given | ({"tol": 1e-12} if "tol" in given else {}))
        if not out.requires_grad:
            continue
        weight, step = grid(out.numel(), 1, 7).reshape(out.shape), 1e-5
        way = grid(z.numel(), 1, 8).reshape(z.shape)
        (slope,) = torch.autograd.grad((out * weight).sum(), z, allow_unused=True)
        slope = 0.0 if slope is None else float((slope * way).sum())

        def value(t, k=k, way=way, weight=weight):
            tight = {"tol": 1e-12} if "tol" in row.given else {}
            return float((row(**{k: row.given[k] + t * way} | tight)[0] * weight).sum())

        expected = (value(step) - value(-step)) / (2 * step)
        assert abs(slope - expected) <= 1e-4 * (1 + abs(expected)), (k, slope, expected)


BATCHES = [n for n in PLANE if n not in ("exact_plan", "w2", "mmd2", "mmd2, median", "Wasserstein", "Kernel")]


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_different_scales(name):
    """One problem far wider than another: each is as alone."""
    row = PLANE[name]
    wide = {k: torch.stack([v, v / 64 if k in row.clouds else v]).float() for k, v in row.tensors.items()}
    both = row(**wide)
    for j in (0, 1):
        alone = row(**{k: v[j] for k, v in wide.items()})
        axis = 1 if name in ("follow", "trajectories") else 0
        agree([t.select(axis, j) for t in both], alone, 1e-5)


# Not every kind fits a row -------------------------------------------------------------------------------------------


def test_options_of_the_wrong_kind():
    x, y = grid(N, 2, 1), grid(M, 2, 2)
    pot = nl.potentials(x, y, 0.5)
    for init in ("text", 3, (pot.f, pot.g), nl.Potentials("f", "g", 1, 0.0, True)):
        with pytest.raises(ValueError, match="init must be the Potentials"):
            nl.potentials(x, y, 0.5, init=init)
    with pytest.raises(ValueError, match="init must be finite"):
        nl.barycentric_map(x, y, 0.5, init=nl.Potentials(pot.f, pot.g * NAN, 1, 0.0, True))
    for field in (fields.Sinkhorn(0.5), fields.Wasserstein(), fields.MMD(0.5)):
        with pytest.raises(ValueError, match="generator must be"):
            field(x, y, generator=3)
    with pytest.raises(ValueError, match="warm must be a dict"):
        fields.Sinkhorn(0.5)(x, y, warm=[])
    with pytest.raises(ValueError, match="field must be"):
        nl.follow("euler", x, y, 0.1, 1)
    with pytest.raises(ValueError, match="law must have sample"):
        metrics.floor("moons", 4, Generator())
    with pytest.raises(ValueError, match="metric must be"):
        metrics.floor(toy.Moons(), 4, Generator(), metric="w2")
    for wrong in ({"make": 3}, {"training": "short"}):
        with pytest.raises(ValueError, match="must be None or"):
            fields.Critic(**wrong)


@pytest.mark.parametrize("d", [2, 9])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_max_iter_is_kept(d, steps):
    """Also on the way down from large temperatures."""
    with pytest.warns(nl.ConvergenceWarning):
        pot = nl.potentials(grid(N, d, 1), 100 * grid(M, d, 2), 1e-3, tol=1e-12, max_iter=steps)
    assert pot.iterations == steps and not pot.converged


def test_figures(monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        plt.rcParams["text.usetex"] = True  # a reader's matplotlibrc
        plots.use()
        figure, ax = plt.subplots()
        plots.cloud(ax, grid(N, 2, 1).long())
        figure.canvas.draw()
        for x in ("points", [[0.0, 1.0]], None, NAN * grid(N, 2, 1)):
            with pytest.raises(ValueError, match="x must be"):
                plots.cloud(ax, x)
            with pytest.raises(ValueError, match="v must be"):
                plots.arrows(ax, grid(N, 2, 1), x)
        with pytest.raises(ValueError, match="alt must"):
            plots.frames(lambda v: figure, [1, 2], "n", 3)
        plt.close(figure)


# Completeness -------------------------------------------------------------------------------------------------------

# names that are tried elsewhere, or nothing is given to
ELSEWHERE = {
    "nl": {
        "Flow",  # what the models have in common
        *("check", "scale"),  # test_bad_input.test_checks
        *("BarycentricMap", "ConvergenceWarning", "Potentials"),  # what functions return or tell
        *("closed_forms", "drifting", "fields", "functionals", "logistic"),  # modules: below
        *("metrics", "networks", "plots", "targets", "toy"),
    },
    "fields": {"Field", "UnderflowWarning"},
    "closed_forms": set(),
    "metrics": {"sampled_kl", "sampled_js"},  # test_targets.test_divergences_from_densities_at_points
    "targets": set(),
    "logistic": {"Labelled"},
    "drifting": set(),
    "networks": {"call", "valued", "evaluating", "lent_chance"},  # a network's value as it is; what a block is run in
    "plots": {"use", "cloud", "arrows", "frames"},  # test_figures
    "toy": {"Law"},
}


def public(module):
    """Functions and classes of a module that are its own and have no underscore."""
    named = getattr(module, "__all__", None)
    if named is not None:
        return set(named)
    kept = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__)
    return {name for name in kept if not name.startswith("_")}


def test_every_public_name_has_a_row():
    tried = {name.split(",")[0] for name in EVERY}
    modules = {"nl": nl, "fields": fields, "closed_forms": closed_forms, "metrics": metrics, "networks": networks}
    modules |= {"drifting": nl.drifting, "plots": plots, "toy": toy, "targets": nl.targets, "logistic": nl.logistic}
    for where, module in modules.items():
        assert public(module) - tried - ELSEWHERE[where] == set(), f"no row for these of {where}"
        assert ELSEWHERE[where] <= public(module) | {"use"}, "no such name any more"
