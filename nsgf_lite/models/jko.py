"""Variational JKO flows: each implicit step of a gradient flow is a map, found against a critic."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from nsgf_lite.functionals import Functional, Move, Reference, Samples, read_values
from nsgf_lite.inputs import exact, read_clouds, read_counts, read_flags, read_generator, read_parameters
from nsgf_lite.models.saved import Saved, made
from nsgf_lite.networks import ICNN, LogRatio, ResidualMap, evaluating, valued
from nsgf_lite.training import Part, Stream, Training, machine, train
from nsgf_lite.training.loop import read_seed, read_training
from nsgf_lite.training.machines import chance_of_dropout

SCHEMES = ("jko", "trapezoid", "crank-nicolson")
_CROWD, _SHOWN, _LAW = 100_000, 10_000, 10_000  # particles: of a crowd that is not kept, for a value, of a law


class JKOStep(nn.Module):
    """One step of the flow: points first follow the explicit functional, if there is one, then go through the map.

    The law that the explicit functional's first variation needs is a crowd (m, d), which is kept.
    """

    crowd: Tensor

    def __init__(self, network: nn.Module, explicit: Functional | None, length: float, dimension: int) -> None:
        super().__init__()
        self.map, self.explicit, self.length = network, explicit, length
        self.register_buffer("crowd", torch.zeros(_LAW if explicit else 0, dimension, dtype=torch.float32))

    def before(self, x: Tensor) -> Tensor:
        """Points (n, d) after the explicit step."""
        return x if self.explicit is None else x - self.length * self.explicit.slope(x, self.crowd)

    def forward(self, x: Tensor) -> Tensor:
        """Points (n, d) after the step."""
        return valued(self.map(self.before(x)), x, None)


@dataclass
class JKOFlow(Saved):
    """Wasserstein gradient flow of a functional F by the JKO scheme: ``P_{k+1} = T_k#P_k``, each T_k a network.

    T_k minimises ``E|X - T(X)|²/(2 step) + F(T#P_k)`` over X of law P_k, where F is the largest value that a critic can
    give it. Critic and map take turns, and both go on from where the step before has left them. After :meth:`fit` the
    attribute `values` has the critics' value of F after each JKO step, on ten thousand particles.

    Parameters
    ----------
    functional : Functional
        What the flow descends, such as ``nl.functionals.KL(log_density)``.
    step : float
        Length of a JKO step in time, squared units of length for each unit of F.
    steps : int
        Number of JKO steps; the training's budget is shared out among them.
    explicit : Functional
        A further functional, taken by an explicit step before each implicit one (forward-backward); None for none.
    scheme : str
        ``jko``; ``trapezoid``, half of F at the end of the step and half of it linearised at its beginning,
        ``E ∇(δF/δP)(X) · (T(X) - X)``, of second order in the step; or ``crank-nicolson``, the paper's, which has the
        first variation at T(X) there and is of first order. The last critic knows the first variation; the first step
        is one of ``jko``.
    ascents, descents : int
        Number of steps of the critic, and of the map, before the other's turn. The training counts the map's.
    particles : int
        Size of the crowd that goes through each map once and is what the next is trained on; None for fresh points of
        the source in every minibatch, which must go through all maps again.
    whole : bool
        Whether each network maps the source's points, at one evaluation a sample, and not those of the step before. The
        cost of the transport is the same, from where the last network sent a point to where this one sends it.
    transport, critic : callable
        ``transport(d)`` makes the map, from (n, d) to (n, d), ``critic(d)`` the critic, from (n, d) to (n, 1); None for
        :class:`nsgf_lite.networks.ResidualMap` and :class:`nsgf_lite.networks.LogRatio`.

    Raises
    ------
    ValueError
        If a parameter is out of its range, or the scheme does not fit the functional.

    Source
    ------
    Fan et al. (2022), Algorithm 1, Appendices B and C; Choi, Choi, Kang (2024) for `whole`.

    Used in
    -------
    :doc:`/book/variational_jko`
    """

    functional: Functional
    step: float
    steps: int
    explicit: Functional | None = None
    scheme: str = "jko"
    ascents: int = 3
    descents: int = 1
    particles: int | None = _CROWD
    whole: bool = False
    transport: Callable[[int], nn.Module] | None = None
    critic: Callable[[int], nn.Module] | None = None
    kept: list[JKOStep] = field(init=False, default_factory=list, repr=False)
    values: list[float] = field(init=False, default_factory=list, repr=False)
    source: Stream = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, make in (("transport", self.transport), ("critic", self.critic)):
            if make is not None and (isinstance(make, nn.Module) or not callable(make)):
                raise ValueError(f"{name} must be None or a function {name}(d), got {make!r}")
        for name, thing in (("functional", self.functional), ("explicit", self.explicit)):
            if not isinstance(thing, Functional) and not (thing is None and name == "explicit"):
                raise ValueError(f"{name} must be a Functional, got {type(thing).__name__}")
        read_parameters(self, positive="step", counts="steps ascents descents")
        read_flags(whole=self.whole)
        if self.particles is not None:
            (self.particles,) = read_counts(particles=self.particles)
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.scheme != "jko" and not all(_has_critic(term) for _, term in self.functional.terms()):
            raise ValueError(f"scheme must be jko for a functional without a critic, got {self.scheme!r}")
        if self.scheme != "jko" and self.explicit is not None:
            raise ValueError(f"scheme must be jko beside explicit steps, got {self.scheme!r}")
        if self.whole and self.explicit is not None:
            raise ValueError("explicit must be None if whole is True: a network of the source's points does both steps")

    # --- training -------------------------------------------------------------------------------------------------

    @exact
    def fit(
        self,
        source: Any,
        training: Training | None = None,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Self:
        """Train on a source, the law P_0: a law, a tensor or a data loader.

        Parameters
        ----------
        source : Law, Tensor or DataLoader
            As :class:`nsgf_lite.training.Stream` reads it.
        training : Training
            The budget: all steps of the maps together; weights are not averaged, and the rate falls once in each JKO
            step. The critic has the same rate and minibatch.
        seed, checkpoint, progress :
            As :meth:`nsgf_lite.Flow.fit`; the bar shows the JKO step and the critic's value of F.

        Raises
        ------
        ValueError
            If the training has fewer steps than the flow, the source has classes, a network returns another shape, or
            as the functional; the message names the JKO step. If there is more than one process.
        FloatingPointError
            If the critic or the map diverges, or a log-density is not finite; the message names the JKO step.
        """
        seed = read_seed(seed=seed)
        training = replace(read_training(training), ema=0.0, warmup=0, decay=self.steps)
        turn = self.descents * (training.steps // self.steps // self.descents)
        if turn == 0:
            need = self.steps * self.descents
            raise ValueError(
                f"training must have at least {need} steps, {self.descents} a JKO step, got {training.steps}"
            )
        training = replace(training, steps=turn * self.steps)
        where = machine()
        if where.num_processes > 1:
            raise ValueError(f"JKOFlow trains in one process: its critic is not shared, got {where.num_processes}")
        generator = torch.Generator(where.device).manual_seed(seed)
        self.source = Stream("source", source)
        if self.source.classes:
            raise ValueError(f"source must have no classes, got {self.source.classes}")
        crowd = self.source.many(self.particles or _CROWD, generator)
        self.dimension = crowd.shape[1]
        network = self._make(generator, crowd)
        rivals = [
            Rival(factor, term, self._critic(generator, crowd), training.rate)
            for factor, term in self.functional.terms()
        ]
        run = _Run(self, network, rivals, crowd, training, turn, generator)
        self.losses = train(
            network,
            run.loss,
            training,
            generator,
            start=run.begin,
            parts=run.parts(),
            identity=lambda: {
                "models": self.hyperparameters(),
                "data": [
                    repr(self.source),
                    *(repr(r.reference.stream) for r in rivals if isinstance(r.reference, Samples)),
                ],
                "seeds": seed,
                "networks": [str(network), str(rivals[0].network)],
            },
            checkpoint=checkpoint,
            progress=progress,
            name="JKOFlow",
            where=where,
            shown=run.shown,
        )
        with chance_of_dropout(network, generator, training.steps):
            run.close()
        return self

    @torch.inference_mode(False)
    def _make(self, generator: Generator, points: Tensor | None = None) -> nn.Module:
        make = self.transport or ResidualMap
        network = made("transport", lambda: make(self.dimension), generator).to(generator.device)
        _standardised(network, points)
        self.kept = [
            JKOStep(copy.deepcopy(network), self.explicit, self.step, self.dimension).to(generator.device)
            for _ in range(self.steps)
        ]
        return network

    @torch.inference_mode(False)
    def _critic(self, generator: Generator, points: Tensor) -> nn.Module:
        make = self.critic or LogRatio
        network = made("critic", lambda: make(self.dimension), generator).to(generator.device)
        _standardised(network, points)
        return network

    # --- sampling -------------------------------------------------------------------------------------------------

    @exact
    @torch.no_grad()
    def path(
        self, n: int, *, upto: int | None = None, start: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Positions (upto + 1, n, d) after each JKO step, the source's points first; arguments as :meth:`sample`."""
        x = self._start(n, upto, start, generator)
        rows = [x]
        for step in self.kept[: self.steps if upto is None else upto]:
            with evaluating(step):
                rows.append(step(x if self.whole else rows[-1]))
        return torch.stack(rows)

    @exact
    @torch.no_grad()
    def sample(
        self, n: int, *, upto: int | None = None, start: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Samples (n, d) of the flow after `upto` JKO steps.

        Parameters
        ----------
        n : int
            Number of samples.
        upto : int
            Number of JKO steps, from 0; None for all.
        start : Tensor
            Points (n, d) to start from, instead of a draw from the source; a loaded model has no source and needs it.
        generator : Generator
            Chance of the source; by default a fresh one with seed 0.

        Raises
        ------
        ValueError
            If the model has not been fitted, or the arguments do not fit.
        """
        x = self._start(n, upto, start, generator)
        steps = self.kept[: self.steps if upto is None else upto]
        for step in steps[-1:] if self.whole else steps:
            with evaluating(step):
                x = step(x)
        return x

    def _read(self, n: int, upto: int | None) -> int:
        if not self.kept:
            raise ValueError("the model has not been fitted: call fit or load first")
        (n,) = read_counts(n=n)
        if upto is not None and (isinstance(upto, bool) or not isinstance(upto, int) or not 0 <= upto <= self.steps):
            raise ValueError(f"upto must be None or an integer from 0 to {self.steps}, got {upto!r}")
        return n

    def _start(self, n: int, upto: int | None, start: Tensor | None, generator: Generator | None) -> Tensor:
        n = self._read(n, upto)
        read_generator(generator)
        device = self.kept[0].crowd.device
        if start is not None:
            read_clouds(start=start)
            if start.shape != (n, self.dimension):
                raise ValueError(f"start must have shape ({n}, {self.dimension}), got {tuple(start.shape)}")
            start = start.to(device, torch.float32)
            read_clouds(start=start)
            return start
        if not hasattr(self, "source"):
            raise ValueError("a loaded model has no source: give the points to start from as start=")
        return self.source.draw(n, generator or torch.Generator(device).manual_seed(0)).to(device)

    @exact
    def log_density(
        self, x: Tensor, *, start: Callable[[Tensor], Tensor], upto: int | None = None, tol: float = 1e-6
    ) -> Tensor:
        """Logarithm of the density (n,) at points x (n, d) after `upto` JKO steps, by inverting the maps; in float64.

        Parameters
        ----------
        x : Tensor
            The points.
        start : callable
            Logarithm of the source's density (n,) at points (n, d), minus infinity where there is none.
        upto : int
            As :meth:`sample`.
        tol : float
            As :meth:`~nsgf_lite.networks.ICNN.inverse`.

        Raises
        ------
        ValueError
            If a map is no gradient of a convex function, or there are explicit steps, or as :meth:`sample`.
        FloatingPointError
            If `start` is NaN or plus infinity somewhere.

        Source
        ------
        Fan et al. (2022), Appendix D, equations 18 and 19.
        """
        self._read(1, upto)
        read_clouds(x=x)
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"x must have shape (n, {self.dimension}), got {tuple(x.shape)}")
        if self.explicit is not None:
            raise ValueError(
                "a density needs maps that can be inverted, and the explicit steps cannot: explicit is set"
            )
        steps = self.kept[: self.steps if upto is None else upto]
        points = x.to(self.kept[0].crowd.device, torch.float64)
        change = points.new_zeros(len(x))
        for step in reversed(steps[-1:] if self.whole else steps):
            if not isinstance(step.map, ICNN):
                raise ValueError(
                    f"transport must make an ICNN for a density, a gradient, got {type(step.map).__name__}"
                )
            wide = copy.deepcopy(step.map).double()
            points = wide.inverse(points, tol)
            with torch.no_grad():
                change = change + wide.log_det(points)
        return read_values("start", start, points, void=True).double() - change

    def networks(self) -> dict[str, nn.Module]:
        """The JKO steps."""
        return {f"step{k}": step for k, step in enumerate(self.kept)}


def _has_critic(term: Functional) -> bool:
    return type(term).on_reference is not Functional.on_reference


def _standardised(network: nn.Module, points: Tensor | None) -> None:
    """Give the points' centre and spread to a network that asks for them."""
    if points is not None and isinstance(network, ResidualMap | LogRatio | ICNN):
        network.standardise(points)


class Rival:
    """One term of the functional in a training: its factor, its critic, the critic's Adam, and the reference law."""

    def __init__(self, factor: float, term: Functional, network: nn.Module, rate: float) -> None:
        self.factor, self.term, self.network = factor, term, network
        self.reference = term.reference()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
        self.last: tuple[nn.Module, Reference] | None = None  # critic and law of the JKO step before

    def unit(self, reference: Reference | None = None) -> float:
        """What the critic's gain is to be multiplied with to be a part of the functional."""
        return self.factor * self.term.unit(reference or self.reference)

    def on_particles(self, y: Tensor, move: Move, past: bool = False) -> Tensor:
        """Part of the functional that moved particles y (n, d) decide, by the critic as it is, or before if past."""
        if self.reference is None:
            return self.factor * self.term.on_particles(None, y, None, move).mean()
        network, reference = (self.network, self.reference)
        if past:
            assert self.last is not None
            network, reference = self.last
        held = {name: p.detach() for name, p in network.named_parameters()}
        s = valued(functional_call(network, held, (y,)), y, 1)[:, 0]
        return self.unit(reference) * self.term.on_particles(s, y, reference, move).mean()

    def gap(self, y: Tensor, z: Tensor, move: Move) -> Tensor:
        """The critic's gain, from moved particles y (n, d) and points z (m, d) of the reference."""
        assert self.reference is not None
        if z.shape[1:] != y.shape[1:]:
            raise ValueError(f"samples must have dimension {y.shape[1]}, as the source has, got {z.shape[1]}")
        s = valued(self.network(torch.cat([y, z])), torch.cat([y, z]), 1)[:, 0]
        here = self.term.on_particles(s[: len(y)], y, self.reference, move).mean()
        return here - self.term.on_reference(s[len(y) :], self.reference).mean()


class _Run:
    """A training of a JKO flow: which JKO step it is at, the crowd, the critics, the maps kept so far."""

    def __init__(
        self,
        model: JKOFlow,
        network: nn.Module,
        rivals: list[Rival],
        crowd: Tensor,
        training: Training,
        turn: int,
        generator: Generator,
    ) -> None:
        self.model, self.network, self.rivals, self.training, self.turn = model, network, rivals, training, turn
        self.generator, self.k, self.value = generator, 0, float("nan")
        self.now = self.first = crowd  # the crowd at the beginning of this JKO step, and at time zero

    # --- between JKO steps ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare the first JKO step."""
        self.model.values = []
        self._open()

    def _open(self) -> None:
        """Put the explicit step's law into place, and fit the references to the crowd."""
        step = self.model.kept[self.k]
        if self.model.explicit is not None:
            rows = torch.randperm(len(self.now), generator=self.generator, device=self.generator.device)[:_LAW]
            step.crowd.copy_(self.now[rows.repeat(-(-_LAW // len(rows)))[:_LAW]])
            with self._named():
                self.now = step.before(self.now)
        for rival in self.rivals:
            if rival.reference is not None:
                with self._named():
                    rival.reference.renew(self.now)

    def close(self) -> None:
        """Keep the map as that of this JKO step, with the critics' value, and take the crowd through it."""
        model, step = self.model, self.model.kept[self.k]
        step.map.load_state_dict(self.network.state_dict())
        critics = [rival.network for rival in self.rivals]
        with self._named(), torch.no_grad(), evaluating(step, *critics):
            here = self.first if model.whole else self.now
            parts = [step.map(part) for part in here.split(_SHOWN)]
            move = Move(here[:_SHOWN], step.map, self.generator, exact=True)
            value = torch.zeros(())
            for rival in self.rivals:
                if rival.reference is None:
                    value = value + rival.on_particles(parts[0], move).cpu()
                else:
                    z = rival.reference.draw(_SHOWN, self.generator)
                    value = value + rival.unit() * rival.gap(parts[0], z, move).cpu()
        model.values.append(float(value))
        self.now = torch.cat(parts)

    def _next(self) -> None:
        self.close()
        self.k += 1
        if self.model.scheme != "jko":
            for rival in self.rivals:
                if rival.reference is not None:
                    rival.last = copy.deepcopy(rival.network), rival.reference.frozen()
        if self.model.particles is None:
            crowd = self.model.source.many(_CROWD, self.generator)
            self.first, self.now = crowd, self._moved(crowd, self.k)
        self._open()

    @torch.no_grad()
    def _moved(self, x: Tensor, k: int) -> Tensor:
        """Points of the source (n, d) after k JKO steps."""
        steps = self.model.kept[max(k - 1, 0) : k] if self.model.whole else self.model.kept[:k]
        for step in steps:
            with evaluating(step):
                x = step(x)
        return x

    # --- within one -----------------------------------------------------------------------------------------------

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The map's loss on a minibatch, after the critics' turn if it is theirs; a new JKO step begins on its time."""
        if step and step % self.turn == 0 and step // self.turn > self.k:
            self._next()
        critics = nn.ModuleList([rival.network for rival in self.rivals])
        with self._named(), chance_of_dropout(critics, self.generator, step):
            if step % self.model.descents == 0:
                for _ in range(self.model.ascents):
                    self.value = sum(self._ascend(rival, network, step) for rival in self.rivals)
            start, here = self._minibatch()
            moved = valued(network(start), start, None)
            move = Move(start, network, self.generator)
            value = torch.stack([self._value(rival, moved, here, move) for rival in self.rivals]).sum()
            return (moved - here).square().sum(1).mean() / (2 * self.model.step) + value

    def _value(self, rival: Rival, moved: Tensor, here: Tensor, move: Move) -> Tensor:
        """The functional after the step, or half of it and half of what the scheme takes of the law before."""
        value = rival.on_particles(moved, move)
        if rival.last is None:
            return value
        if self.model.scheme == "crank-nicolson":
            return (value + rival.on_particles(moved, move, past=True)) / 2
        z = here.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(rival.on_particles(z, move, past=True) * len(z), z)
        return (value + (slope * (moved - here)).sum(1).mean()) / 2

    def _minibatch(self, places: bool = True) -> tuple[Tensor, Tensor]:
        """What the map is given (n, d), and, if the places are asked for, where it was before this JKO step."""
        n, model = self.training.batch, self.model
        if model.particles is None:
            x = model.source.draw(n, self.generator)
            if model.whole and not places:
                return x, x
            here = model.kept[self.k].before(self._moved(x, self.k))
            return (x if model.whole else here), here
        row = torch.randint(len(self.now), (n,), generator=self.generator, device=self.generator.device)
        return (self.first if model.whole else self.now)[row], self.now[row]

    def _ascend(self, rival: Rival, network: nn.Module, step: int) -> float:
        """One step of a critic up, and its part of the functional; nothing for a term without one."""
        if rival.reference is None:
            return 0.0
        start, _ = self._minibatch(places=False)
        with torch.no_grad():
            moved = valued(network(start), start, None)
        rival.reference.check(moved)
        z = rival.reference.draw(self.training.batch, self.generator)
        gain = rival.gap(moved, z, Move(start, network, self.generator))
        if not bool(torch.isfinite(gain)):
            raise FloatingPointError(f"the critic diverged: its gain is {float(gain.detach())}")
        for group in rival.optimizer.param_groups:
            group["lr"] = self.training.rate_at(step)
        rival.optimizer.zero_grad()
        (-gain).backward()
        nn.utils.clip_grad_norm_(rival.network.parameters(), self.training.clip)
        rival.optimizer.step()
        return rival.unit() * float(gain.detach())

    def _named(self) -> "_InStep":
        return _InStep(self.k, self.model.steps)

    def shown(self) -> dict[str, str]:
        """What the progress bar says."""
        return {"step": f"{self.k + 1}/{self.model.steps}", "F": f"{self.value:.4g}"}

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Part]:
        """What a checkpoint must hold."""
        return {"source": self.model.source, "run": self}

    def state(self) -> dict[str, Tensor]:
        """All that changes, but the map."""
        values = torch.tensor(self.model.values, dtype=torch.float64)
        out = {"k": torch.tensor(self.k), "values": values, "now": self.now}
        if self.model.whole:
            out["first"] = self.first
        for k, step in enumerate(self.model.kept[: self.k + 1]):
            out |= {f"kept/{k}/{name}": t for name, t in step.state_dict().items()}
        for k, rival in enumerate(self.rivals):
            for name, thing in self._whats(rival):
                out |= {f"rival/{k}/{name}/{key}": t for key, t in thing.items()}
        return out

    @staticmethod
    def _whats(rival: Rival) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if rival.reference is None:
            return
        yield "network", rival.network.state_dict()
        yield "reference", rival.reference.state()
        for p, memory in rival.optimizer.state_dict()["state"].items():
            yield f"adam/{p}", memory
        if rival.last is not None:
            yield "last/network", rival.last[0].state_dict()
            if rival.last[1] is not rival.reference:
                yield "last/reference", rival.last[1].state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take that up again."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) + 1 :]: t for name, t in state.items() if name.startswith(prefix + "/")}

        self.k, self.model.values = int(state["k"]), state["values"].tolist()
        self.now = state["now"].to(self.now)
        self.first = state["first"].to(self.first) if self.model.whole else self.first
        for k, step in enumerate(self.model.kept[: self.k + 1]):
            step.load_state_dict(under(f"kept/{k}"))
        for k, rival in enumerate(self.rivals):
            if rival.reference is None:
                continue
            rival.network.load_state_dict(under(f"rival/{k}/network"))
            rival.reference.restore(under(f"rival/{k}/reference"))
            memory = rival.optimizer.state_dict()
            count = {int(name.split("/")[0]) for name in under(f"rival/{k}/adam")}
            memory["state"] = {p: under(f"rival/{k}/adam/{p}") for p in sorted(count)}
            rival.optimizer.load_state_dict(memory)
            if last := under(f"rival/{k}/last/network"):
                network, reference = copy.deepcopy(rival.network), rival.reference.frozen()
                network.load_state_dict(last)
                if reference is not rival.reference:
                    reference.restore(under(f"rival/{k}/last/reference"))
                rival.last = network, reference


class _InStep:
    """An error of a JKO step as one that says in which."""

    def __init__(self, k: int, steps: int) -> None:
        self.where = f"in JKO step {k + 1} of {steps}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | FloatingPointError) and not str(error).startswith("in JKO step"):
            raise type(error)(f"{self.where}: {error}") from error
