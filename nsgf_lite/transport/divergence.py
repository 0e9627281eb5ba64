"""The entropic cost and the Sinkhorn divergence between point clouds, differentiable once in everything."""

from typing import Any

import torch
from torch import Tensor

from nsgf_lite.inputs import exact
from nsgf_lite.transport.problem import Extension, Problem, read_problem


class _Once(torch.autograd.Function):
    """A first derivative, and what it depends on; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *inputs: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise RuntimeError(
            "entropic_cost and sinkhorn_divergence have first derivatives only, got a request for a second"
        )


def _value(a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Value of the dual problem, which is that of the primal one."""
    return (a * f).sum(-1) + (b * g).sum(-1)


class _Cost(torch.autograd.Function):
    """OT_eps of a batch (b,); by the envelope theorem its first derivatives need no derivative of the potentials."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float, own: bool, tol: float, max_iter: int
    ) -> Tensor:
        solved = Problem(x, y, a, b, eps, own, False).solve(tol, max_iter)
        f, g = solved.f + solved.tilt, solved.g - solved.tilt
        ctx.save_for_backward(x, y, a, b, f, g)
        ctx.own, ctx.towards, ctx.back = own, solved.towards, solved.back
        return _value(a, b, f, g).to(x.dtype)

    @staticmethod
    @exact
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _Cost.first_derivatives(ctx, grad)
        # Under create_graph=True: let a second derivative through these tensors raise, where it would be silently zero.
        if torch.is_grad_enabled():
            gradients = [None if t is None else _Once.apply(t, grad, *ctx.saved_tensors[:4]) for t in gradients]
        return *gradients, None, None, None, None

    @staticmethod
    def first_derivatives(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Derivatives in x, y, a and b, those that are needed."""
        x, y, a, b, f, g = ctx.saved_tensors
        need = ctx.needs_input_grad
        weight = grad.unsqueeze(-1) * (2 if ctx.own else 1)

        def pull(x: Tensor, a: Tensor, extension: Extension) -> Tensor:
            return ((weight * a).unsqueeze(-1) * extension.displacement(x)).to(x.dtype)

        dx = pull(x, a, ctx.towards) if need[0] else None
        dy = pull(y, b, ctx.back) if need[1] and not ctx.own else None
        da = weight * f if need[2] else None
        db = weight * g if need[3] and not ctx.own else None
        return [dx, dy, *(None if t is None else t.to(x.dtype) for t in (da, db))]


@exact
def entropic_cost(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 10_000,
) -> Tensor:
    """Entropic cost ``OT_eps = min <plan, c> + eps KL(plan | a x b)``, a scalar or (b,), in units of squared length.

    Differentiable once in x, y, a and b, by the envelope theorem; the derivatives in a and b are the potentials,
    meant for perturbations of zero total mass. A second derivative raises RuntimeError. Arguments and errors as in
    :func:`potentials`.

    Source
    ------
    Feydy et al. (2019), Proposition 2.

    Used in
    -------
    :prf:ref:`thm-entropic-duality`, :prf:ref:`thm-entropic-gap`
    """
    problem, tol, max_iter = read_problem(x, y, a, b, eps, tol, max_iter)
    cost = _Cost.apply(problem.x, problem.y, problem.a, problem.b, problem.eps, problem.own, tol, max_iter)
    return problem.unbatch(cost)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_iter: int = 10_000,
) -> Tensor:
    """Sinkhorn divergence ``S_eps = OT_eps(x, y) - OT_eps(x, x) / 2 - OT_eps(y, y) / 2``, a scalar or (b,).

    Differentiable once in x, y, a and b, as :func:`entropic_cost` is. Arguments and errors as in :func:`potentials`.

    Source
    ------
    Feydy et al. (2019); Zhu et al. (2024), Definition 2.

    Used in
    -------
    :prf:ref:`thm-positivity`, :prf:ref:`thm-first-variation`
    """
    cost = entropic_cost(x, y, eps, a, b, tol=tol, max_iter=max_iter)
    own_x = entropic_cost(x, x, eps, a, a, tol=tol, max_iter=max_iter)
    own_y = entropic_cost(y, y, eps, b, b, tol=tol, max_iter=max_iter)
    return cost - (own_x + own_y) / 2
