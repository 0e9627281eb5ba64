"""One style for every figure of the book, and sliders that work in the rendered page without a kernel."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ipywidgets import VBox
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, in an order that stays apart in the common colour vision deficiencies and in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777"
_FRAMES = 40


def use() -> None:
    """Set the book's style for all figures that follow.

    Used in
    -------
    The first cell of every chapter that draws.
    """
    plt.rcdefaults()  # whatever the reader's own matplotlibrc says, such as to set text by LaTeX
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, GREY]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.labelsize": 10.5,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "font.size": 10,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "nsgf-lite",
        }
    )


def _read_points(**points: Tensor) -> None:
    """Check that these can be drawn."""
    for name, x in points.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} must be finite, got NaN or inf")


def cloud(ax: "Axes", x: Tensor, color: str = BLUE, label: str | None = None, size: float = 8, **options: Any) -> None:
    """Draw points (n, 2) on axes of equal scale.

    Raises
    ------
    ValueError
        If x has not shape (n, 2), or is not finite.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/optimal_transport`, :doc:`/book/sinkhorn_divergence`,
    :doc:`/book/sinkhorn_first_variation`, :doc:`/book/gaussian_sinkhorn_flow`, :doc:`/book/mean_field_limit`,
    :doc:`/book/neural_sinkhorn_flow`, :doc:`/book/two_phase`, :doc:`/book/speed`, :doc:`/book/non_gradient_curl`
    """
    _read_points(x=x)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x must have shape (n, 2) to be drawn, got {tuple(x.shape)}")
    points = x.detach().cpu().numpy()
    ax.scatter(points[:, 0], points[:, 1], s=size, color=color, label=label, linewidths=0, **options)
    ax.set_aspect("equal", adjustable="box")


def arrows(ax: "Axes", x: Tensor, v: Tensor, color: str = GREY, **options: Any) -> None:
    """Draw velocities v (n, 2) at points x (n, 2), in the units of the axes.

    Raises
    ------
    ValueError
        If the shapes are not (n, 2) both, or a number is not finite.

    Used in
    -------
    :doc:`/book/intro`, :doc:`/book/sinkhorn_first_variation`, :doc:`/book/gaussian_sinkhorn_flow`,
    :doc:`/book/non_gradient_curl`
    """
    _read_points(x=x, v=v)
    if x.shape != v.shape or x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x and v must both have shape (n, 2), got {tuple(x.shape)} and {tuple(v.shape)}")
    (px, py), (vx, vy) = x.detach().cpu().numpy().T, v.detach().cpu().numpy().T
    options = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003} | options
    ax.quiver(px, py, vx, vy, color=color, **options)


def frames(draw: Callable[[Any], "Figure"], values: Sequence[Any], name: str, alt: str) -> "VBox":
    """A slider over figures drawn beforehand: it works in a page with no kernel, by mouse and by keyboard.

    Parameters
    ----------
    draw : callable
        Called with each value; returns the figure, which is closed afterwards.
    values : sequence
        The parameter's values, at most 40.
    name : str
        The parameter, as the slider's label.
    alt : str
        Text for those who do not see the picture, with ``{value}`` where the value stands.

    Raises
    ------
    ValueError
        If there are fewer than two or more than 40 values, or alt does not name the value.

    Used in
    -------
    :doc:`/book/optimal_transport`, :doc:`/book/sinkhorn_divergence`, :doc:`/book/wasserstein_gradient_flows`,
    :doc:`/book/sinkhorn_first_variation`, :doc:`/book/gaussian_sinkhorn_flow`, :doc:`/book/mean_field_limit`,
    :doc:`/book/neural_sinkhorn_flow`, :doc:`/book/two_phase`, :doc:`/book/speed`, :doc:`/book/non_gradient_curl`
    """
    from ipywidgets import HTML, IntSlider, Layout, Stack, VBox, jslink

    if not 2 <= len(values) <= _FRAMES:
        raise ValueError(f"values must be 2 to {_FRAMES}, got {len(values)}")
    if not isinstance(alt, str) or "{value" not in alt:
        raise ValueError("alt must contain {value}, so that each picture says what it shows")
    images = []
    for value in values:
        figure, page = draw(value), io.BytesIO()
        figure.savefig(page, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
        data = base64.b64encode(page.getvalue()).decode()
        text = escape(alt.format(value=value), quote=True)
        images.append(HTML(f'<img alt="{text}" src="data:image/png;base64,{data}" style="width:100%;max-width:704px">'))
    stack = Stack(images, selected_index=0, layout=Layout(width="100%"))
    slider = IntSlider(
        value=0,
        min=0,
        max=len(values) - 1,
        description=name,
        readout=False,
        layout=Layout(width="100%", max_width="420px"),
    )
    jslink((slider, "value"), (stack, "selected_index"))
    return VBox([slider, stack], layout=Layout(width="100%"))
