"""How all pictures look: colors, axes, legends, and the file that they end in."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG, UNKNOWN = "#2a9d5c", "#d1495b", "#9aa0a6"
INK, MUTED, GRID = "#22262b", "#6b7280", "#e3e6ea"
COLORS = (
    *("#2f6fb7", "#e08a1e", "#2a9d5c", "#8e5bb5", "#d1495b"),
    *("#4aa8a8", "#9a6b3f", "#5b6470", "#d77fb8", "#7d8f12"),
)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global state; sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: str | PathLike) -> Figure:
    """Write a PNG, its folder too where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return figure


def style_axes(axes: Axes, title: str, x_label: str) -> None:
    """Title, label, and a grid in place of a frame."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED)
    axes.tick_params(which="both", labelsize=8, colors=MUTED, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(GRID)


def legend_above(figure: Figure, handles: Sequence[Artist], margin: float, columns: int) -> None:
    """The labels of `handles` in the upper left corner, `margin` inches from the left."""
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(margin / width, 1 - 0.04 / height),
        borderaxespad=0,
        borderpad=0.3,
        ncols=columns,
        fontsize=8,
        frameon=False,
        labelcolor=MUTED,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.5,
    )
