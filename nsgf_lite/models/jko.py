"""Variational JKO flows: each implicit step of a gradient flow is a map, found against a critic."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.functionals import Functional, Samples, read_values
from nsgf_lite.inputs import exact, read_clouds, read_counts, read_flags, read_generator, read_parameters
from nsgf_lite.models.saved import Saved, made, told
from nsgf_lite.models.turns import CROWD, JKOStep, Rival, Run
from nsgf_lite.networks import ICNN, LogRatio, ResidualMap, evaluating
from nsgf_lite.training import Stream, Training, machine, train
from nsgf_lite.training.loop import read_seed, read_training
from nsgf_lite.training.machines import chance_of_dropout

SCHEMES = ("jko", "trapezoid", "crank-nicolson")


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
    particles: int | None = CROWD
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
        crowd = self.source.many(self.particles or CROWD, generator)
        self.dimension = crowd.shape[1]
        network = self._make(generator, crowd)
        rivals = [
            Rival(factor, term, self._critic(generator, crowd), training.rate)
            for factor, term in self.functional.terms()
        ]
        run = Run(self, network, rivals, crowd, training, turn, generator)
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
        return told(torch.stack(rows))

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
        return told(x)

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
