"""A field that must learn: the gradient of a neural critic, which estimates the first variation of a divergence."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid

from nsgf_lite.fields.base import Warm
from nsgf_lite.inputs import exact, read_clouds, read_generator, read_parameters
from nsgf_lite.networks import Residual, evaluating, seeded, valued
from nsgf_lite.training import Training, train

# For D(q | p) = E_p f(q/p), in terms of the log ratio s: f'(e^s), and the conjugate there, e^s f'(e^s) - f(e^s).
_FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda s: 1 + s, lambda s: s.exp()),
    "reverse_kl": (lambda s: -(-s).exp(), lambda s: s - 1),
    "js": (
        lambda s: (math.log(2) + logsigmoid(s)) / 2,
        lambda s: -(math.log(2) + logsigmoid(-s)) / 2,
    ),
}


@dataclass(eq=False)
class Critic:
    """Velocity ``-grad f'(e^s)`` of an f-divergence D(q | p), with the log density ratio s = log q/p a neural network.

    :meth:`fit` trains the network on particles and data by the variational formula, ``D = max E_q T - E_p f*(T)``
    over ``T = f'(e^s)``; the maximiser T is the first variation. The call then reads the network and learns nothing.

    Parameters
    ----------
    divergence : str
        ``kl`` for KL(q | p), ``reverse_kl`` for KL(p | q), ``js`` for Jensen and Shannon's divergence, the *mean* of
        KL(q | m) and KL(p | m), m = (p + q) / 2 (the JSD of some papers is their sum, twice as much).
    penalty : float
        λ of the term ``-(λ/2) E|grad s|²`` (over particles and data alike) in the objective, in units of squared
        length; 0 for none. With ``kl`` this is a neural KALE.
    make : callable
        ``make(d)`` makes the network, a module from (n, d) to (n, 1); None for :class:`nsgf_lite.networks.Residual`.
    training : Training
        The budget of each fit that is given none; None for 200 steps at a rate of 1e-3.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, before :meth:`fit`, or as :func:`nsgf_lite.potentials`, if the
        points are not of the dimension and dtype it was fitted to, or if weights are given.
    FloatingPointError
        When called, if the velocity is not finite: the critic diverged, or a ratio of densities overflows.

    Source
    ------
    Nowozin, Cseke, Tomioka (2016); Galashov, De Bortoli, Gretton (2025) for the flow.

    Used in
    -------
    :prf:ref:`thm-f-divergence-critic`
    """

    divergence: str = "kl"
    penalty: float = 0.0
    make: Callable[[int], nn.Module] | None = None
    training: Training | None = None
    network: nn.Module | None = field(init=False, default=None, repr=False)
    dimension: int = field(init=False, default=0, repr=False)
    losses: list[float] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.divergence not in _FORMS:
            raise ValueError(f"divergence must be one of {', '.join(_FORMS)}, got {self.divergence!r}")
        if self.penalty != 0:
            read_parameters(self, positive="penalty")
        if self.make is not None and not callable(self.make):
            raise ValueError(f"make must be None or a function make(d), got {self.make!r}")
        if not isinstance(self.training, Training | None):
            raise ValueError(f"training must be None or a Training, got {self.training!r}")

    @exact
    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(
        self,
        x: Tensor,
        y: Tensor,
        training: Training | None = None,
        *,
        generator: Generator | None = None,
        progress: bool = False,
    ) -> Self:
        """Train the critic to tell the particles x (n, d) from the data y (m, d), on from where it stands.

        Parameters
        ----------
        x, y : Tensor
            One cloud each; minibatches of ``training.batch`` are drawn from larger ones.
        training : Training
            The budget; by default the critic's own.
        generator : Generator
            Chance of the first weights and of the minibatches, on the points' device; by default a fresh one with
            seed 0.

        Raises
        ------
        ValueError
            If the clouds do not fit one another or the network.
        FloatingPointError
            If the critic diverges; the message says at which step.
        """
        read_clouds(x=x, y=y)
        if x.ndim != 2:
            raise ValueError(f"x must have shape (n, d), one cloud, got {tuple(x.shape)}")
        self._read(x)
        read_generator(generator)
        if not isinstance(training, Training | None):
            raise ValueError(f"training must be None or a Training, got {training!r}")
        x, y = x.clone(), y.clone()  # which may have been made in inference mode, where nothing is differentiated
        training = training or self.training or Training(steps=200, rate=1e-3, decay=0, warmup=0, ema=0.0)
        chance = generator or torch.Generator(x.device).manual_seed(0)
        if self.network is None:
            self.network = self._made(x, chance)
        value, conjugate = _FORMS[self.divergence]

        def rows(z: Tensor) -> Tensor:
            z = z.detach()
            if len(z) <= training.batch:
                return z
            return z[torch.randperm(len(z), generator=chance, device=chance.device)[: training.batch].to(z.device)]

        def loss(network: nn.Module, step: int) -> Tensor:
            here, there = rows(x), rows(y)
            if not self.penalty:
                return conjugate(_ratio(network, there)).mean() - value(_ratio(network, here)).mean()
            both = torch.cat([here, there]).requires_grad_()
            s = _ratio(network, both)
            (slope,) = torch.autograd.grad(s.sum(), both, create_graph=True)
            size = slope.square().sum(-1)
            gain = value(s[: len(here)]).mean() - conjugate(s[len(here) :]).mean()
            return self.penalty / 4 * (size[: len(here)].mean() + size[len(here) :].mean()) - gain

        self.losses = train(self.network, loss, training, chance, progress=progress, name="critic")
        self.network.to(x.device)
        return self

    def _made(self, x: Tensor, chance: Generator) -> nn.Module:
        make, d = self.make or (lambda d: Residual(d, 1)), x.shape[-1]
        self.dimension = d
        return seeded(lambda: make(d), chance).to(x)

    def _read(self, points: Tensor) -> None:
        """Check that the points are such as the network, if there is one, was fitted to."""
        if self.network is None:
            return
        dtype = next(self.network.parameters()).dtype
        if points.shape[-1] != self.dimension or points.dtype != dtype:
            raise ValueError(
                f"the critic was fitted to {dtype} points of dimension {self.dimension}, "
                f"got {points.dtype} points of dimension {points.shape[-1]}"
            )

    def state(self) -> dict[str, Tensor]:
        """The network, for a checkpoint of what is trained with it; nothing before the first fit."""
        if self.network is None:
            return {}
        weights = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        return weights | {"like": next(self.network.parameters()).new_empty(1, self.dimension)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take it up again."""
        self.network = None
        if state:
            network = self._made(state["like"], Generator().manual_seed(0))
            weights = {name.removeprefix("network/"): value for name, value in state.items() if name != "like"}
            network.load_state_dict(weights)
            self.network = network

    @exact
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        at: Tensor | None = None,
        a: Tensor | None = None,
        b: Tensor | None = None,
        generator: Generator | None = None,
        warm: Warm | None = None,
    ) -> Tensor:
        """Velocity (n, d) at the particles x, or (k, d) at the points `at`, by the critic as :meth:`fit` left it."""
        points = x if at is None else at
        read_clouds(x=x, y=y, at=points)
        if self.network is None:
            raise ValueError("the critic has not been fitted: call fit(x, y) first")
        if a is not None or b is not None:
            raise ValueError("a and b must be None: the critic learns from points of equal weight")
        self._read(points)
        value, _ = _FORMS[self.divergence]
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self.network):
            z = points.clone().detach().requires_grad_()
            (slope,) = torch.autograd.grad(value(_ratio(self.network, z)).sum(), z)
        if not bool(torch.isfinite(slope).all()):
            raise FloatingPointError(
                f"the critic's velocity is not finite at {int((~torch.isfinite(slope)).any(-1).sum())} points: it has "
                f"diverged, or, where the density ratio is extreme, {self.divergence}'s first variation overflows"
            )
        return -slope


def _ratio(network: nn.Module, z: Tensor) -> Tensor:
    """Log ratio (n, 1) at the points z (n, d)."""
    return valued(network(z), z, 1)
