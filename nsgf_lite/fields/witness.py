"""Fields that descend a witness function of a kernel space: maximum mean discrepancy, its χ² relative, and KALE."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from nsgf_lite.fields.base import Formula, log_kernel, median_distance, warn_underflow
from nsgf_lite.inputs import read_clouds, read_parameters, read_positive
from nsgf_lite.transport.problem import ConvergenceWarning, _outside
from nsgf_lite.transport.solver import centre

Bandwidth = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Kernel:
    """A sum of Gaussian kernels ``exp(-|x-y|^2 / (2h^2))`` or of Laplace kernels ``exp(-|x-y| / h)``.

    Parameters
    ----------
    h : float, tuple of float, or None
        Bandwidth, or bandwidths to sum over, in units of length; None for the median distance between distinct points.
    kernel : str
        ``gaussian`` or ``laplace``.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Source
    ------
    Gretton et al. (2012), for the median heuristic.

    Used in
    -------
    :class:`MMD`, :class:`DrMMD`, :class:`KALE`
    """

    h: Bandwidth = None
    kernel: str = "gaussian"

    def __post_init__(self) -> None:
        if self.kernel not in ("gaussian", "laplace"):
            raise ValueError(f"kernel must be 'gaussian' or 'laplace', got {self.kernel!r}")
        if isinstance(self.h, tuple) and not self.h:
            raise ValueError("h must name at least one bandwidth, got ()")
        if isinstance(self.h, tuple):
            object.__setattr__(self, "h", tuple(read_positive(h=h)[0] for h in self.h))
        elif self.h is not None:
            read_parameters(self, positive="h")

    def widths(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> list[float | Tensor]:
        """The bandwidths to sum over; for a batch, the median heuristic gives one for each problem."""
        if self.h is None:
            h = median_distance(x, y, a, b)
            return [h.squeeze() if x.ndim == 2 else h]
        return list(self.h) if isinstance(self.h, tuple) else [self.h]

    def gram(self, x: Tensor, y: Tensor, widths: list[float | Tensor], own: bool = False) -> Tensor:
        """Values k(x_i, y_j), shape (…, n, m)."""
        read_clouds(x=x, y=y)
        return torch.stack([log_kernel(x, y, h, self.kernel, own).exp() for h in widths]).sum(0)

    def descend(
        self, z: Tensor, atoms: Tensor, c: Tensor, widths: list[float | Tensor], own: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Minus the gradient of ``Σ_l c_l k(·, atoms_l)`` at z (…, k, d), zero at a Laplace kernel's kink; and the
        largest exponent of each problem."""
        origin = centre(atoms)
        z, atoms = z - origin, atoms - origin
        velocity, largest = torch.zeros_like(z), z.new_full(z.shape[:-2], -torch.inf)
        for h in widths:
            E = log_kernel(z, atoms, h, self.kernel, own)
            pull = E.exp() * c.unsqueeze(-2)
            if self.kernel == "laplace":  # E is -|z - w| / h
                pull = torch.where(E < 0, pull / (-E).clamp_min(1e-30), 0)
            velocity = velocity + (pull.sum(-1, keepdim=True) * z - pull @ atoms) / h / h
            largest = torch.maximum(largest, E.detach().amax((-2, -1)))
        return velocity, largest


class _Witness(Formula):
    """A field ``-scale x gradient of Σ_j α_j k(·, y_j) + Σ_i a_i k(·, x_i)``."""

    h: Bandwidth
    kernel: str
    double: ClassVar[bool] = False  # whether to work in float64 whatever the particles are in

    def _velocity(
        self, x: Tensor, y: Tensor, at: Tensor | None, a: Tensor, b: Tensor, generator: Generator | None
    ) -> Tensor:
        kernel, points = Kernel(self.h, self.kernel), x if at is None else at
        z = points
        if self.double:
            x, y, z, a, b = (t.double() for t in (x, y, z, a, b))
        widths = kernel.widths(x, y, a, b)
        alpha, scale = self._coefficients(kernel, widths, x, y, a, b)
        towards, largest = kernel.descend(z, y, alpha, widths)
        away, _ = kernel.descend(z, x, a, widths, own=at is None)
        warn_underflow(largest, points, y.to(points))
        return (scale * (towards + away)).to(points)

    def _coefficients(
        self, kernel: Kernel, widths: list[float | Tensor], x: Tensor, y: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, float]:
        """Coefficients of the data's kernels, and the scale."""
        raise NotImplementedError


@dataclass(frozen=True)
class MMD(_Witness):
    """Velocity of the Wasserstein gradient flow of MMD²: ``-2 grad ∫k(·, y) d(q - p)(y)``, one over length.

    Parameters
    ----------
    h, kernel :
        As :class:`Kernel`.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`ScoreDifference`. An :class:`UnderflowWarning` where
        no particle sees any data.

    Source
    ------
    Arbel et al. (2019); the note on drifting (2026), equations 48 to 52.

    Used in
    -------
    :prf:ref:`thm-lone-particle`, :prf:ref:`thm-kernel-descent`, :prf:ref:`thm-mmd-variation`,
    :prf:ref:`thm-second-variation`
    """

    h: Bandwidth = None
    kernel: str = "gaussian"

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", Kernel(self.h, self.kernel).h)

    def _coefficients(
        self, kernel: Kernel, widths: list[float | Tensor], x: Tensor, y: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, float]:
        return -b, 2.0


@dataclass(frozen=True)
class DrMMD(_Witness):
    """Velocity of the flow of the regularised χ² divergence ``(1+λ) |(Σ_p + λ)^(-1/2) (m_q - m_p)|²``, closed form.

    m_q, m_p are the mean embeddings, Σ_p the uncentred covariance operator of the data: between MMD², for large λ, and
    the χ² divergence, for small λ. Solved in float64. One over length.

    Parameters
    ----------
    lam : float
        Regularisation λ, without unit.
    h, kernel :
        As :class:`Kernel`.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`MMD`, or if λ is lost beside the rounding of float64.

    Source
    ------
    Chen et al. (2025), (De)-regularised maximum mean discrepancy gradient flow.

    Used in
    -------
    :prf:ref:`thm-lone-particle`, :prf:ref:`thm-kernel-descent`, :prf:ref:`thm-drmmd-variation`,
    :prf:ref:`thm-second-variation`
    """

    lam: float
    h: Bandwidth = None
    kernel: str = "gaussian"
    double = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", Kernel(self.h, self.kernel).h)
        read_parameters(self, positive="lam")

    def _coefficients(
        self, kernel: Kernel, widths: list[float | Tensor], x: Tensor, y: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, float]:
        K = kernel.gram(y, y, widths, own=True)
        crowd = (kernel.gram(y, x, widths) @ a.unsqueeze(-1)).squeeze(-1)
        f = crowd - (K @ b.unsqueeze(-1)).squeeze(-1)
        # g = (Σ_p + λ)^(-1) f solves λ g + K (b g) = f on the data; f carries -b, so the data's coefficients add up.
        g = solve_ridge(K, b.sqrt(), f, self.lam)
        return -(b * (1 + g)), 2 * (1 + self.lam) / self.lam


def solve_ridge(K: Tensor, root: Tensor, f: Tensor, lam: float) -> Tensor:
    """Solve ``λ g + K (root² g) = f`` by Cholesky's factors of the symmetric ``λ + root K root``."""
    A = root.unsqueeze(-1) * K * root.unsqueeze(-2)
    A = A + lam * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    factor, failed = torch.linalg.cholesky_ex(A)
    if bool(failed.any()):
        raise ValueError(f"lam must be larger, or the bandwidth smaller, for a kernel matrix in float64, got {lam:g}")
    u = torch.cholesky_solve((root * f).unsqueeze(-1), factor)
    rest = (f - (K @ (root.unsqueeze(-1) * u)).squeeze(-1)) / lam
    # u is root g: where root is large it tells g, and where it is small nothing cancels in the rest
    return torch.where(root * root > lam, u.squeeze(-1) / root.clamp_min(lam**0.5), rest)


@dataclass(frozen=True)
class KALE(_Witness):
    """Velocity of the KALE flow, ``-(1+λ) grad h*``: h* maximises ``1 + E_q h - E_p e^h - (λ/2) |h|²`` in kernel space.

    Between the flow of KL(q | p) for small λ and that of MMD² / 2 for large λ. Solved in float64 by damped Newton
    steps. One over length.

    Parameters
    ----------
    lam : float
        Regularisation λ, without unit.
    h, kernel :
        As :class:`Kernel`.
    tol : float
        Newton's decrement ``<gradient, step>`` at which to stop: twice what the objective still has to gain; a
        :class:`nsgf_lite.ConvergenceWarning` if it is not reached.
    max_iter : int
        Largest number of Newton steps.

    Raises
    ------
    ValueError
        If a parameter is out of range; when called, as :class:`DrMMD`.

    Source
    ------
    Glaser, Arbel, Gretton (2021); the note on drifting (2026), equation 54.

    Used in
    -------
    :prf:ref:`thm-lone-particle`, :prf:ref:`thm-kernel-descent`, :prf:ref:`thm-kale-variation`,
    :prf:ref:`thm-second-variation`
    """

    lam: float
    h: Bandwidth = None
    kernel: str = "gaussian"
    tol: float = 1e-10
    max_iter: int = 100
    double = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", Kernel(self.h, self.kernel).h)
        read_parameters(self, positive="lam tol", counts="max_iter")

    def _coefficients(
        self, kernel: Kernel, widths: list[float | Tensor], x: Tensor, y: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, float]:
        # Every iterate is h = (s m_q - Σ_j β_j k(·, y_j)) / λ, and s and β are all there is to know of it.
        K, A = kernel.gram(y, y, widths, own=True), a.unsqueeze(-1)
        crowd = (kernel.gram(y, x, widths) @ A).squeeze(-1)
        alone = (A.mT @ kernel.gram(x, x, widths, own=True) @ A).squeeze(-1).squeeze(-1)

        def look(s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            """Values h(y) and the objective."""
            data = (K @ beta.unsqueeze(-1)).squeeze(-1)
            at_y = (s.unsqueeze(-1) * crowd - data) / self.lam
            cross = (beta * crowd).sum(-1)
            norm = (s * s * alone - 2 * s * cross + (beta * data).sum(-1)) / self.lam / self.lam
            gain = (s * alone - cross) / self.lam - (b * at_y.exp()).sum(-1) - self.lam / 2 * norm
            return at_y, gain

        def newton(at_y: Tensor) -> tuple[Tensor, Tensor]:
            """Masses of the data under e^h, and Newton's step on the data."""
            mass = b * at_y.exp()
            rise = crowd - (K @ mass.unsqueeze(-1)).squeeze(-1) - self.lam * at_y  # the gradient, on the data
            return mass, solve_ridge(K, mass.sqrt(), rise, self.lam)

        with torch.no_grad():
            s, beta = torch.zeros_like(alone), torch.zeros_like(b)
            at_y, value = look(s, beta)
            for _ in range(self.max_iter):
                mass, step = newton(at_y)
                to_s, to_beta = 1 - s, mass * (1 + step) - beta
                # <gradient, step> = E_q step - E_p e^h step - λ<h, step>, each term by the reproducing property
                at_q = (to_s * alone - (to_beta * crowd).sum(-1)) / self.lam
                decrement = (1 - s) * at_q + ((beta - mass) * step).sum(-1)
                if bool((decrement.abs() <= self.tol).all()):  # negative where rounding has the last word
                    break
                length = torch.ones_like(s)
                for _ in range(40):
                    new_at, new_value = look(s + length * to_s, beta + length.unsqueeze(-1) * to_beta)
                    short = ~(new_value >= value + 0.25 * length * decrement - 1e-14 * (1 + value.abs()))
                    if not bool(short.any()):
                        break
                    length = torch.where(short, length / 2, length)
                s, beta = s + length * to_s, beta + length.unsqueeze(-1) * to_beta
                at_y, value = new_at, new_value
            else:
                warnings.warn(
                    f"KALE stopped after {self.max_iter} Newton steps at decrement {float(decrement.abs().max()):.2g}, "
                    f"not {self.tol:.2g}; a larger lam = {self.lam:g} or bandwidth would help.",
                    ConvergenceWarning,
                    stacklevel=_outside(),
                )
        if crowd.requires_grad or K.requires_grad:  # Newton's step from the solution has the solution's derivative
            mass, step = newton(look(s, beta)[0])
        # The last whole step: it makes s one, so that the particles enter with their weights.
        return -mass * (1 + step), (1 + self.lam) / self.lam
