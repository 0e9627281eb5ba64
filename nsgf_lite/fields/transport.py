"""Fields of optimal transport: the Sinkhorn divergence's, the exact plan's, and its average over lines."""

from dataclasses import dataclass

import ot
import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Formula, Warm
from nsgf_lite.inputs import exact, read_clouds, read_generator, read_parameters, read_weights
from nsgf_lite.transport.sinkhorn import barycentric_map
from nsgf_lite.transport.solver import centre, gathered


@dataclass(frozen=True)
class Sinkhorn:
    """Velocity of the Wasserstein gradient flow of the Sinkhorn divergence to the data.

    ``v(z) = T_xy(z) - T_xx(z)``, a difference of two barycentric projections: towards the data, away from the crowd.

    Parameters
    ----------
    eps : float
        Temperature, in units of squared length (the cost is ``|x - y|^2 / 2``).
    tol : float
        L1 marginal error at which the two solves stop; a :class:`nsgf_lite.ConvergenceWarning` where one does not.

    Raises
    ------
    ValueError
        If eps or tol is not positive; when called, as :func:`nsgf_lite.potentials`.

    Source
    ------
    Zhu et al. (2024), Theorem 1 and equation 13.

    Used in
    -------
    :prf:ref:`thm-first-variation`, :prf:ref:`thm-sinkhorn-velocity`, :prf:ref:`thm-velocity-lipschitz`,
    :prf:ref:`thm-velocity-stability`, :prf:ref:`thm-gaussian-stays-gaussian`, :prf:ref:`thm-overshoot`,
    :prf:ref:`thm-two-modes-sinkhorn`, :prf:ref:`thm-loop-work`, :prf:ref:`thm-second-variation`
    """

    eps: float
    tol: float = 1e-4

    def __post_init__(self) -> None:
        read_parameters(self, positive="eps tol")

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
        """Velocity (n, d) of the particles x towards the data y, or (k, d) at the points `at`.

        ``warm``, a dict, is read for potentials to start from and left with the new ones: keep one along a path.
        """
        read_clouds(**{"x": x, "y": y} | ({} if at is None else {"points": at}))
        read_generator(generator)
        if warm is not None and not isinstance(warm, dict):
            raise ValueError(f"warm must be a dict, got {type(warm).__name__}")
        memory: Warm = {} if warm is None else warm
        # both images may be far from zero, and near each other
        weights = None if b is None else read_weights("b", b, y)
        origin = centre(y if weights is None or bool((weights > 0).all()) else gathered(y, weights))
        moved = x - origin
        x, y, at = moved, moved if y is x else y - origin, None if at is None else at - origin

        def images(role: str, z: Tensor, weights: Tensor | None) -> Tensor:
            T = barycentric_map(x, z, self.eps, a, weights, tol=self.tol, init=memory.get(role))
            memory[role] = T.solution
            return T(at)

        return images("towards", y, b) - images("away", x, a)


@dataclass(frozen=True)
class Wasserstein:
    """Velocity of the flow of ``W_2^2 / 2``: the exact plan's barycentric projection minus the particle.

    Defined at the particles only: the exact potential has kinks between them.

    Raises
    ------
    ValueError
        When called, as :func:`exact_plan`, or if `at` is given.

    Source
    ------
    Ambrosio, Gigli, Savaré (2008), Theorem 8.4.7; the plan by POT's network simplex.

    Used in
    -------
    :prf:ref:`thm-geometric-approach`, :prf:ref:`thm-two-modes-wasserstein`, :doc:`/book/optimal_transport`,
    :doc:`/book/mean_field_limit`, :prf:ref:`thm-second-variation`
    """

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
        """Velocity (n, d) of the particles x (n, d) towards the data y (m, d); particles of weight zero rest."""
        if at is not None:
            raise ValueError("at must be None: the exact plan gives a velocity at the particles only")
        read_generator(generator)
        P = exact_plan(x, y, a, b)
        y = y if b is None else gathered(y, read_weights("b", b, y))
        origin = centre(y)
        x, y = x - origin, y - origin
        mass = P.sum(1, keepdim=True)
        return torch.where(mass > 0, P @ y.to(P) / mass.clamp_min(1e-300) - x.to(P), 0.0).to(x)


@dataclass(frozen=True)
class SlicedWasserstein(Formula):
    """Velocity of the flow of half the sliced distance: the mean over directions θ of ``θ (T_θ(<θ,x>) - <θ,x>)``.

    T_θ is the barycentric projection of the optimal plan on the line, exact for unequal sizes and weights too. In units
    of length. Defined at the particles only.

    Parameters
    ----------
    directions : int
        Number of random directions, uniform on the sphere, drawn from the generator in each call.

    Raises
    ------
    ValueError
        If directions is not a positive integer; when called, as :func:`nsgf_lite.potentials`, without a generator, or
        if `at` is given.

    Source
    ------
    Cozzi and Santambrogio (2025); the note on drifting (2026), equation 53, for ``SW_2^2 / 2``.

    Used in
    -------
    :prf:ref:`thm-sliced-variation`, :prf:ref:`thm-second-variation`
    """

    directions: int = 64
    anywhere = False

    def __post_init__(self) -> None:
        read_parameters(self, counts="directions")

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        if at is not None:
            raise ValueError("at must be None: the plans on the lines give a velocity at the particles only")
        if not isinstance(generator, Generator):
            raise ValueError(f"generator must be a torch.Generator, for the directions, got {generator!r}")
        d = x.shape[-1]
        theta = torch.randn(self.directions, d, generator=generator, device=generator.device, dtype=x.dtype).to(x)
        theta = theta / theta.norm(dim=-1, keepdim=True)
        u, v = (x @ theta.T).mT.contiguous(), (y @ theta.T).mT.contiguous()  # (…, directions, n) and (…, directions, m)
        return (_images_on_line(u, v, a.unsqueeze(-2).expand(u.shape), b.unsqueeze(-2).expand(v.shape)) - u).mT @ (
            theta / self.directions
        )


def _images_on_line(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Barycentric projection (…, n) of the monotone plan from the points u with masses a to v with masses b."""
    order_u, order_v = u.argsort(-1), v.argsort(-1)
    v = v.gather(-1, order_v)
    if u.shape[-1] == v.shape[-1] and bool((a == b[..., :1]).all()) and bool((b == b[..., :1]).all()):
        return torch.empty_like(v).scatter(-1, order_u, v)  # as many, all alike: the plan is a permutation
    # A particle that holds the quantiles from s to t goes to the mean of the data's quantile function there: the
    # increment of its integral, which is linear between the data's cumulative masses.
    a, b = (w.gather(-1, o).double() for w, o in ((a, order_u), (b, order_v)))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    levels = torch.cat([torch.zeros_like(b[..., :1]), b.cumsum(-1)], -1)
    integral = torch.cat([torch.zeros_like(b[..., :1]), (b * v).cumsum(-1)], -1)
    ends = torch.cat([torch.zeros_like(a[..., :1]), a.cumsum(-1)], -1).clamp_max(levels[..., -1:])
    k = torch.searchsorted(levels[..., 1:].contiguous(), ends.contiguous()).clamp_max(v.shape[-1] - 1)
    at_ends = integral.gather(-1, k) + (ends - levels.gather(-1, k)) * v.gather(-1, k)
    images = at_ends.diff(dim=-1) / a.clamp_min(1e-300)
    # rounding, which a tiny mass blows up, leaves no image outside the data that it is a mean of
    images = images.clamp(v.gather(-1, k[..., :-1]).double(), v.gather(-1, k[..., 1:]).double())
    images = torch.where(a > 0, images, u.gather(-1, order_u).double())
    return torch.zeros_like(u).scatter(-1, order_u, images.to(u.dtype))


@exact
def exact_plan(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Optimal coupling (n, m) for the squared distance, in float64 on the CPU, by POT's network simplex.

    Raises
    ------
    ValueError
        As :func:`nsgf_lite.potentials`, or if the clouds are batches.

    Used in
    -------
    :doc:`/book/sinkhorn_divergence`
    """
    read_clouds(x=x, y=y)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (n, d), one cloud, got {tuple(x.shape)}")
    a, b, device = read_weights("a", a, x), read_weights("b", b, y), x.device
    x, y, a, b = (t.detach().double().cpu() for t in (x, y, a, b))
    # The plan is that of minus the inner products, which are small where points are near the centre: a far point leaves
    # the rest accurate. The simplex has tolerances that suppose costs of order one: hence the unit.
    x, y = (gathered(z, w) for z, w in ((x, a), (y, b)))
    origin = centre(y)
    x, y = x - origin, y - origin
    size = torch.cat([x, y]).norm(dim=1)
    unit = size.median() if size.median() > 0 else size.amax().clamp_min(1e-300)
    plan = ot.emd((a / a.sum()).numpy(), (b / b.sum()).numpy(), -((x / unit) @ (y / unit).T).numpy(), 10_000_000)
    return torch.from_numpy(plan).to(device)
