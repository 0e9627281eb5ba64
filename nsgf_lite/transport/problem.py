"""A problem of entropic transport as it is solved: the frame and the precision of its arithmetic, and what it leaves.

Points of weight zero are put out of the way; in high dimension the origin is moved into the data; costs too large for
float32 to resolve beside eps are computed in float64, and a warning is given where that does not suffice.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsgf_lite.inputs import LARGEST, read_clouds, read_counts, read_positive, read_weights
from nsgf_lite.transport.solver import PLANE, affinity, alternate, averaged, centre, gathered, hot, softmax


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached its tolerance, or float64 does not resolve the costs; the message says
    where it stands."""


@dataclass(frozen=True)
class Potentials:
    """Dual potentials ``f`` (n,) or (b, n) and ``g`` (m,) or (b, m); unpacks as ``f, g``.

    ``marginal_error`` is the L1 distance between the plan's marginals and the weights (the largest in the batch),
    ``iterations`` the number of Sinkhorn and Newton steps. Normalised so that the weighted means of f and g agree.
    """

    f: Tensor
    g: Tensor
    iterations: int
    marginal_error: float
    converged: bool

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.f, self.g))


def _outside() -> int:
    """Stack level, seen from the caller, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("nsgf_lite", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


@dataclass(frozen=True)
class Extension:
    """What extends f, and the images of points, to all of R^d: data y (b, m, d), their weights, and g less their norms.

    Above the dimension `plane`, where costs are inner products, points and data are seen from `origin` (b, 1, d).
    """

    y: Tensor
    b: Tensor
    g: Tensor
    eps: float
    origin: Tensor | None
    plane: int

    def seen(self, points: Tensor) -> Tensor:
        """The points in the precision and from the origin of the data."""
        return points.to(self.y) if self.origin is None else points.to(self.y) - self.origin

    def blocks(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Exponents of the kernel, a few million entries at a time, and the norms left outside."""
        for block in points.split(max(1, 2**24 // self.y[..., 0].numel()), -2):
            H, p, _ = affinity(self.seen(block), self.y, self.plane)
            yield (H + self.g.unsqueeze(-2)) / self.eps, p

    def rows(self, points: Tensor) -> Iterator[Tensor]:
        """Rows of the plan from each of the points, with sum one."""
        for S, _ in self.blocks(points):
            yield softmax(S + self.b.log().unsqueeze(-2))

    def images(self, points: Tensor) -> Tensor:
        """Mean of y given each of the points, as y is seen; differentiable in them."""
        return torch.cat([rows @ self.y for rows in self.rows(points)], -2)

    def displacement(self, points: Tensor) -> Tensor:
        """The gradient of f, points less their images, without the rounding of what may be far from zero."""
        origin = centre(self.y)
        return self.seen(points) - origin - torch.cat([rows @ (self.y - origin) for rows in self.rows(points)], -2)

    def potential(self, points: Tensor) -> Tensor:
        """The potential f at the points, differentiable in them."""
        parts = []
        for S, p in self.blocks(points):
            if float(S.detach().abs().amax()) < 1 / 32:  # as in :func:`hot`
                parts.append(p - self.eps * torch.log1p((torch.expm1(S) @ self.b.unsqueeze(-1)).squeeze(-1)))
            else:
                parts.append(p - self.eps * torch.logsumexp(S + self.b.log().unsqueeze(-2), -1))
        return torch.cat(parts, -1)


@dataclass(frozen=True)
class Solved:
    """The solution of a problem, batched, in the precision it took: f (b, n), g (b, m); the plan's exponent
    ``(g - c) / eps`` up to a term in x; half the difference of their means; and what extends f and g."""

    f: Tensor
    g: Tensor
    exponent: Tensor
    tilt: Tensor
    towards: Extension
    back: Extension
    iterations: int
    marginal_error: float
    converged: bool


@dataclass(frozen=True)
class Problem:
    """Two clouds with weights, (b,n,d), (b,m,d), (b,n), (b,m), checked; `own` if they are one and the same."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: float
    own: bool
    single: bool

    @torch.no_grad()
    def solve(self, tol: float, max_iter: int, init: Potentials | None = None) -> Solved:
        """Solve in the dtype of the clouds, or in float64 where that would not resolve the kernel."""
        start = None if init is None else self._read_start(init)
        idle = bool((self.a == 0).any() or (self.b == 0).any())
        x, y = (gathered(self.x, self.a), gathered(self.y, self.b)) if idle else (self.x, self.y)
        x, y, a, b, plane = x.detach(), y.detach(), self.a.detach(), self.b.detach(), PLANE
        origin = centre(y) if x.shape[-1] > plane else None
        H, p, q = affinity(*((x, y) if origin is None else (x - origin, y - origin)), plane)
        widest = p.amax(-1) + q.amax(-1) - H.amin((-2, -1))
        if not self._resolves(H.dtype, float(widest.max())):
            x, y, a, b, origin, plane = x.double(), y.double(), a.double(), b.double(), None, x.shape[-1]
            H, p, q = affinity(x, y, plane)
            widest = -H.amin((-2, -1))
        elif origin is not None:
            x, y = x - origin, y - origin
        goal = max(tol, 10 * torch.finfo(self.x.dtype).eps)
        start = -q if start is None else start.to(q) - q
        start = gathered(start.unsqueeze(-1), b).squeeze(-1) if idle else start
        f, g, steps, error, mean_cost = self._iterate(H, p, q, a, b, start, widest, goal, max_iter, init is not None)
        towards = Extension(y, b, g, self.eps, origin, plane)
        back = Extension(x, a, f, self.eps, origin, plane)
        if idle:  # which may be far from where they were put
            H = affinity(towards.seen(self.x), y, plane)[0]
        exponent = H.add_(g.unsqueeze(-2)).div_(self.eps)
        f, g = f + p, g + q
        tilt = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / 2
        if idle:  # there the potentials are extended
            f = torch.where(self.a > 0, f, towards.potential(self.x))
            g = torch.where(self.b > 0, g, back.potential(self.y))
        self._warn(float(widest.max()), H.dtype, mean_cost, steps, error, goal)
        return Solved(f, g, exponent, tilt, towards, back, steps, error, error <= goal)

    def _iterate(
        self,
        H: Tensor,
        p: Tensor,
        q: Tensor,
        a: Tensor,
        b: Tensor,
        start: Tensor,
        widest: Tensor,
        goal: float,
        max_iter: int,
        warm: bool,
    ) -> tuple[Tensor, Tensor, int, float, float]:
        """f and g less the norms, the number of steps, the error reached, and the mean cost."""
        mean_cost = float((p.mean(-1) + q.mean(-1) - H.mean(-1).mean(-1)).max())
        steps, error, f, g = 0, 0.0, start, start
        least, most = (float(t) for t in torch.aminmax(widest))
        if most > self.eps / 32:
            if self.own:
                f, g, steps, error = averaged(H, a, self.eps, start, goal, max_iter)
            else:
                first = self.eps if warm else max(self.eps, mean_cost)
                f, g, steps, error = alternate(H, a, b, self.eps, start, first, goal, max_iter)
        if least <= self.eps / 32:
            gentle = widest <= self.eps / 32
            *found, more, rest = hot(H[gentle], a[gentle], b[gentle], self.eps, start[gentle], goal, max_iter)
            found = [(found[0] + found[1]) / 2] * 2 if self.own else found
            f = found[0] if most <= self.eps / 32 else f.index_put((gentle,), found[0])
            g = found[1] if most <= self.eps / 32 else g.index_put((gentle,), found[1])
            steps, error = max(steps, more), max(error, rest)
        return f, g, steps, error, mean_cost

    def _resolves(self, dtype: torch.dtype, widest: float) -> bool:
        """Whether the rounding of the largest cost leaves the kernel ``exp(-c / eps)`` right to two parts in 1000."""
        return widest * torch.finfo(dtype).eps <= 2**-9 * self.eps

    def _read_start(self, init: Potentials) -> Tensor:
        """The potential g to start from, (b, m)."""
        g = getattr(init, "g", None)
        if not isinstance(init, Potentials) or not isinstance(g, Tensor):
            raise ValueError(f"init must be the Potentials of a problem solved before, got {type(init).__name__}")
        if not (g.numel() == self.b.numel() and g.dtype == self.b.dtype and g.device == self.b.device):
            raise ValueError(
                f"init must be the potentials of a problem of this size and dtype, with g of shape "
                f"{tuple(self.b.shape)[self.single :]} and {self.b.dtype}, got {tuple(g.shape)} and {g.dtype}"
            )
        if not bool(torch.isfinite(g).all()):
            raise ValueError("init must be finite, got potentials with NaN or inf")
        return g.reshape(self.b.shape)

    def _warn(self, widest: float, dtype: torch.dtype, mean_cost: float, steps: int, error: float, goal: float) -> None:
        ratio = f"eps = {self.eps:g} is {self.eps / max(mean_cost, 1e-300):.1g} of the mean cost {mean_cost:.3g}; "
        if not error <= goal:
            message = f"potentials stopped after {steps} steps at marginal error {error:.2g}, not {goal:.2g}. {ratio}"
            message += "a larger eps or max_iter, or float64, would help."
        elif not self._resolves(dtype, widest):
            message = f"costs up to {widest:.3g} are rounded in {dtype} by more than eps allows. {ratio}"
            message += "a larger eps would help, or to leave out points that are far from all others."
        else:
            return
        warnings.warn(message, ConvergenceWarning, stacklevel=_outside())

    def potentials(self, solved: Solved) -> Potentials:
        """The potentials of a solution, as the input is shaped."""
        f, g, tilt = (self.unbatch(t).to(self.x.dtype) for t in (solved.f, solved.g, solved.tilt))
        steps, error, converged = solved.iterations, solved.marginal_error, solved.converged
        return Potentials(f + tilt, g - tilt, steps, error, converged)

    def unbatch(self, t: Tensor) -> Tensor:
        return t.squeeze(0) if self.single else t


def read_problem(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, eps: float, tol: float, max_iter: int
) -> tuple[Problem, float, int]:
    """The problem, the tolerance and the largest number of steps."""
    eps, tol = read_positive(eps=eps, tol=tol)
    (max_iter,) = read_counts(max_iter=max_iter)
    read_clouds(x=x, y=y)
    most = LARGEST[x.dtype] ** 2
    if not 1 / most <= eps <= most:
        raise ValueError(f"eps must lie between {1 / most:g} and {most:g} for points in {x.dtype}, got {eps!r}")
    own, single = y is x and b is a, x.ndim == 2
    a, b = read_weights("a", a, x), read_weights("b", b, y)
    if single:
        x, y, a, b = (t.unsqueeze(0) for t in (x, y, a, b))
    return Problem(x, y, a, b, float(eps), own, single), tol, max_iter
