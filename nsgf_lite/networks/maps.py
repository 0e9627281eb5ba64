"""What a JKO step trains: a map, residual or the gradient of a convex function, and the critic, a log ratio."""

import math
import warnings

import torch
from torch import Generator, Tensor, nn

from nsgf_lite.inputs import exact, read_clouds, read_counts, read_positive
from nsgf_lite.networks.perceptrons import _standardise


class _Standardised(nn.Module):
    """A network of points (n, d) that it takes in the unit, and about the centre, of the points it was shown."""

    centre: Tensor
    spread: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        read_counts(dimension=dimension)
        self.dimension = dimension
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("spread", torch.ones(()))

    def standardise(self, x: Tensor) -> None:
        """Set centre and spread to the mean and the root mean square deviation of the points x (n, d)."""
        _standardise(self.centre, self.spread, x=x)

    def _inner(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.spread


def _hidden(inputs: int, width: int, depth: int) -> list[nn.Module]:
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return layers


class ResidualMap(_Standardised):
    """Map ``x + spread * net((x - centre) / spread)`` of points (n, d), the identity before it is trained.

    Parameters
    ----------
    dimension : int
        d.
    width, depth : int
        Size and number of the hidden layers; depth 0 for an affine map.

    Raises
    ------
    ValueError
        If a size is not a positive integer, but for the depth, which may be zero.

    Source
    ------
    Fan et al. (2022), Section 3.2 and Appendix F (with PReLU units; ours are SiLU, so that the map is smooth).

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    def __init__(self, dimension: int, width: int = 64, depth: int = 2) -> None:
        super().__init__(dimension)
        read_counts(width=width, depth=depth + 1)
        last = nn.Linear(width if depth else dimension, dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*_hidden(dimension, width, depth), last)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, d) of the points x (n, d)."""
        return x + self.spread * self.layers(self._inner(x))


class LogRatio(_Standardised):
    """Critic (n, 1) of points (n, d): a perceptron plus a quadratic form, zero before it is trained.

    The logarithm of the ratio of two Gaussian densities is a quadratic form, which no perceptron has far out.

    Parameters
    ----------
    dimension : int
        d.
    width, depth : int
        Size and number of the hidden layers.
    spectral : bool
        Whether each layer's largest singular value is held at one, so that the perceptron cannot be steep.

    Raises
    ------
    ValueError
        If a size is not a positive integer.

    Source
    ------
    Fan et al. (2022), Appendix E.2 (spectral normalisation) and F; the quadratic form is ours.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    def __init__(self, dimension: int, width: int = 64, depth: int = 2, spectral: bool = False) -> None:
        super().__init__(dimension)
        read_counts(width=width, depth=depth)
        layers, last = _hidden(dimension, width, depth), nn.Linear(width, 1)
        if spectral:
            layers = [nn.utils.parametrizations.spectral_norm(f) if isinstance(f, nn.Linear) else f for f in layers]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)
        self.form = nn.Parameter(torch.zeros(dimension, dimension))
        self.slope = nn.Parameter(torch.zeros(dimension))

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, 1) at the points x (n, d)."""
        u = self._inner(x)
        quadratic = ((u @ self.form) * u).sum(-1, keepdim=True) / 2
        return self.layers(u) + quadratic + (u @ self.slope).unsqueeze(-1)


class ICNN(_Standardised):
    """Gradient of an input convex neural network: points (n, d) to points (n, d), the identity before it is trained.

    The convex function is, in the standardised unit,
    ``φ(u) = strong/2 |u|² + 1/2 |Lu|² + w · z_depth`` with ``z_0 = σ(q_0(u))``, ``z_l = σ(W_l z_{l-1} + q_l(u))``,
    σ softplus, the entries of w and W_l positive, each q_l affine plus `rank` squares of linear forms: so φ is smooth
    and ``φ - strong/2 |u|²`` is convex. Every linear map that is a gradient, and at least `strong`, is among them.

    Parameters
    ----------
    dimension : int
        d.
    width, depth : int
        Size and number of the hidden layers.
    rank : int
        Number of squares in each unit.
    strong : float
        Smallest curvature, in (0, 1): the smallest factor by which the map contracts.

    Raises
    ------
    ValueError
        If a size is not a positive integer, or strong is not in (0, 1).

    Source
    ------
    Amos, Xu, Kolter (2017); the squares are Korotin et al. (2021); Fan et al. (2022), Sections 3.2 and 5.4.

    Used in
    -------
    :class:`nsgf_lite.JKOFlow`
    """

    def __init__(self, dimension: int, width: int = 64, depth: int = 2, rank: int = 1, strong: float = 0.05) -> None:
        super().__init__(dimension)
        read_counts(width=width, depth=depth, rank=rank)
        (self.strong,) = read_positive(strong=strong)
        if strong >= 1:
            raise ValueError(f"strong must be below 1, so that the identity is among the maps, got {strong!r}")
        self.width, self.rank = width, rank
        self.affine = nn.ModuleList(nn.Linear(dimension, width) for _ in range(depth))
        squares = [nn.Linear(dimension, width * rank, bias=False) for _ in range(depth)]
        for layer in squares:
            nn.init.normal_(layer.weight, std=0.1 / math.sqrt(dimension))
        self.squares = nn.ModuleList(squares)
        # logarithms of positive weights, of mean size 1/width
        self.between = nn.ParameterList(
            nn.Parameter(torch.randn(width, width) * 0.1 - math.log(width)) for _ in range(depth - 1)
        )
        self.last = nn.Parameter(torch.full((width,), -math.log(width) - 4))
        self.root = nn.Parameter(math.sqrt(1 - self.strong) * torch.eye(dimension))
        self.slope = nn.Parameter(torch.zeros(dimension))
        self._begin_at_identity()

    def extra_repr(self) -> str:
        """What no weight shows."""
        return f"strong={self.strong:g}"

    @exact
    @torch.no_grad()
    def _begin_at_identity(self) -> None:
        """Set slope and root so that the gradient and the Hessian at the centre are those of the identity."""
        zero = torch.zeros(1, self.dimension)
        hessian = self.hessian(zero)[0] - self.root.T @ self.root
        self.slope.sub_(self(zero)[0])
        values, vectors = torch.linalg.eigh(torch.eye(self.dimension) - hessian)
        self.root.copy_(values.clamp_min(1e-3).sqrt().unsqueeze(1) * vectors.T)

    def _convex(self, u: Tensor) -> Tensor:
        """φ (n,) at the standardised points u (n, d)."""
        z = u.new_zeros(())
        for k, (affine, squares) in enumerate(zip(self.affine, self.squares, strict=True)):
            inner = affine(u) + squares(u).square().unflatten(-1, (self.width, self.rank)).sum(-1)
            z = nn.functional.softplus(inner + (z @ self.between[k - 1].exp() if k else 0))
        quadratic = self.strong * u.square().sum(-1) + (u @ self.root.T).square().sum(-1)
        return quadratic / 2 + u @ self.slope + z @ self.last.exp()

    def potential(self, x: Tensor) -> Tensor:
        """Convex function (n,), in squared units of length, whose gradient the map is, at the points x (n, d)."""
        return self.spread**2 * self._convex(self._inner(x)) + x @ self.centre

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, d) of the points x (n, d), differentiable in x and in the weights."""
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            u = self._inner(x.clone() if x.is_inference() else x)
            if not u.requires_grad:
                u.requires_grad_()
            (slope,) = torch.autograd.grad(self._convex(u).sum(), u, create_graph=grad)
        return self.centre + self.spread * (slope if grad else slope.detach())

    def hessian(self, x: Tensor) -> Tensor:
        """Derivatives (n, d, d) of the map at the points x (n, d), symmetric, every eigenvalue at least `strong`."""
        each = torch.func.hessian(lambda u: self._convex(u.unsqueeze(0))[0])
        return torch.func.vmap(each)(self._inner(x))

    def log_det(self, x: Tensor) -> Tensor:
        """Logarithms (n,) of the determinants of the map's derivatives at the points x (n, d), by Cholesky's factors.

        Of the order of n d³ operations, and d gradients; differentiable.
        """
        factor = torch.linalg.cholesky(self.hessian(x))
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_det_surrogate(self, x: Tensor, generator: Generator, iterations: int | None = None) -> Tensor:
        """A number (n,) for each point x (n, d) whose gradient in the weights is, on average, that of :meth:`log_det`.

        ``u · Hv`` with a random vector v of signs and ``u = H^{-1} v`` by conjugate gradients, taken for constant: its
        derivative is ``u · (dH) v``, and that of log det H is ``trace(H^{-1} dH)``. Its value has mean d, and no other
        meaning. With fewer `iterations` than d the gradient is biased.

        Source
        ------
        Huang et al. (2021); Fan et al. (2022), Section 3.3 (JKO-ICNN-a, ten iterations at most).
        """
        u = self._inner(x).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self._convex(u).sum(), u, create_graph=True)

        def times(v: Tensor, graph: bool) -> Tensor:
            (product,) = torch.autograd.grad(slope, u, v, create_graph=graph, retain_graph=True)
            return product

        signs = torch.randint(2, u.shape, generator=generator, device=generator.device).to(u) * 2 - 1
        solved, rest = torch.zeros_like(u), signs.clone()
        direction, size = rest.clone(), rest.square().sum(-1, keepdim=True)
        for _ in range(u.shape[-1] if iterations is None else iterations):
            image = times(direction, False)
            length = size / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
            solved, rest = solved + length * direction, rest - length * image
            new = rest.square().sum(-1, keepdim=True)
            if float(new.max()) <= 1e-12 * u.shape[-1]:
                break
            direction, size = rest + new / size.clamp_min(1e-30) * direction, new
        return (solved.detach() * times(signs, True)).sum(-1)

    @torch.no_grad()
    def inverse(self, y: Tensor, tol: float = 1e-6, max_iter: int = 500) -> Tensor:
        """Points (n, d) whose images are y (n, d): minimisers of ``φ(x) - x · y``, by L-BFGS.

        Parameters
        ----------
        y : Tensor
            The images.
        tol : float
            Largest distance of an image from its y, in units of the spread; a RuntimeWarning if it is not reached.
        max_iter : int
            Largest number of iterations.

        Source
        ------
        Fan et al. (2022), equation 18.
        """
        read_clouds(y=y)
        (tol,) = read_positive(tol=tol)
        read_counts(max_iter=max_iter)
        goal = self._inner(y)
        u = goal.clone()
        optimiser = torch.optim.LBFGS(
            [u],
            max_iter=max_iter,
            history_size=20,
            tolerance_grad=0.3 * tol,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            with torch.enable_grad():
                v = u.detach().requires_grad_()
                value = self._convex(v).sum() - (v * goal).sum()
                (u.grad,) = torch.autograd.grad(value, v)
            return value.detach()

        optimiser.step(closure)
        closure()
        assert u.grad is not None
        off = float(u.grad.norm(dim=-1).max())
        if not off <= tol:
            warnings.warn(
                f"the inverse stopped after {max_iter} iterations with images off by {off:.2g} spreads, not {tol:.2g}",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.centre + self.spread * u
