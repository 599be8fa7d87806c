"""Pictures of a run: how training went, and which images an answer rests on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

RIGHT, WRONG, UNKNOWN = "#2a9d5c", "#d1495b", "#9aa0a6"
INK, MUTED, GRID = "#22262b", "#6b7280", "#e3e6ea"
COLORS = ("#2f6fb7", "#e08a1e", "#2a9d5c", "#8e5bb5", "#d1495b", "#4aa8a8")
UNLABELED = -100
SMALL_IMAGE = 48  # pixels below which every pixel is shown as a square

# title, whether the axis is logarithmic, key in the log history -> name in the legend
PANELS = (
    (
        "Loss",
        False,
        {
            "loss": "training",
            "eval_loss": "evaluation",
            "head_loss": "head",
            "propagation_loss": "propagation",
            "neighborhood_loss": "neighborhood",
            "consistency_loss": "consistency",
        },
    ),
    ("Accuracy", False, {"eval_accuracy": "inductive", "eval_transductive_accuracy": "transductive"}),
    ("Temperature", False, {"temperature": "τ"}),
    ("Effective number of neighbors", False, {"effective_neighbors": "exp(entropy)"}),
    ("Homophily", False, {"homophily": "batch graph", "eval_neighbor_homophily": "evaluation"}),
    (
        "Gradient norm",
        True,
        {
            "ranking_gradient_norm": "ranking path",
            "feature_gradient_norm": "feature path",
            "grad_norm": "all parameters",
        },
    ),
    (
        "Learning rate",
        True,
        {"backbone_learning_rate": "backbone", "head_learning_rate": "head", "learning_rate": "all"},
    ),
)


def _figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot's global state."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | PathLike) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    return figure


def _series(log_history: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
    points = [(step, float(value)) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _draw_panel(axes: Axes, title: str, logarithmic: bool, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    for color, (name, (steps, values)) in zip(COLORS, curves.items(), strict=False):
        sparse = len(steps) <= 25
        axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if sparse else None, markersize=3.5, label=name)
    if logarithmic and all(value > 0 for _, values in curves.values() for value in values):
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(GRID)
    if len(curves) > 1 or logarithmic:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def plot_training_curves(log_history: Sequence[dict], path: str | PathLike) -> Figure:
    """
    Draw a run's curves over its steps: losses, accuracy, temperature, effective number of neighbors, homophily, gradient
    norms by path and learning rates; a panel without data is left out.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `PathLike`): PNG to write.

    Returns:
        `matplotlib.figure.Figure`: the figure, one axes per panel.

    Raises:
        ValueError: if the history holds nothing to draw.
    """
    panels = []
    for title, logarithmic, names in PANELS:
        curves = {name: _series(log_history, key) for key, name in names.items()}
        curves = {name: series for name, series in curves.items() if series[0]}
        if curves:
            panels.append((title, logarithmic, curves))
    if not panels:
        raise ValueError(
            f"The log history ({len(log_history)} entries) holds nothing to draw: train with logging_steps at or below"
            " the number of steps."
        )

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(4.2 * columns, 3.0 * rows)
    for position, panel in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(rows, columns, position), *panel)
    figure.tight_layout(pad=1.2)
    return _save(figure, path)


@dataclass
class QueryNeighbors:
    """
    One row of `plot_neighbors`: a test image, the answer it got and the images that answer rests on.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): the test image, grey `(H, W)` or color `(H, W, 3)`.
        label (`int`): its true class, -100 where unknown.
        prediction (`int`): the class answered.
        probability (`float`): the model's probability of that class.
        neighbor_images (`Sequence`): its neighbors, heaviest first.
        neighbor_classes (`Sequence[int]`): their classes, -100 where unknown.
        neighbor_weights (`Sequence[float]`): their edge weights.
    """

    image: Image.Image | np.ndarray
    label: int
    prediction: int
    probability: float
    neighbor_images: Sequence[Image.Image | np.ndarray]
    neighbor_classes: Sequence[int]
    neighbor_weights: Sequence[float]

    def __post_init__(self) -> None:
        sizes = len(self.neighbor_images), len(self.neighbor_classes), len(self.neighbor_weights)
        if len(set(sizes)) > 1:
            raise ValueError(f"neighbor_images, neighbor_classes and neighbor_weights differ in length: {sizes}.")


def _square(image: Image.Image | np.ndarray) -> np.ndarray:
    """The largest centered square of an image, which is about what a processor's center crop leaves of it."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) and image.mode != "L" else image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def _draw_image(axes: Axes, image: Image.Image | np.ndarray, frame: str, frame_width: float) -> None:
    pixels = _square(image)
    size = len(pixels)
    if pixels.ndim == 2:
        # Grey images in any range: 0 to 16 in scikit-learn's digits, 0 to 255 in files.
        axes.imshow(pixels, cmap="gray", interpolation="nearest" if size < SMALL_IMAGE else "antialiased")
    else:
        axes.imshow(pixels, interpolation="nearest" if size < SMALL_IMAGE else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=frame_width)


def _agreement(candidate: int, label: int) -> str:
    if UNLABELED in (candidate, label):
        return UNKNOWN
    return RIGHT if candidate == label else WRONG


def plot_neighbors(
    queries: Sequence[QueryNeighbors],
    path: str | PathLike,
    label_names: Sequence[str] | None = None,
    max_neighbors: int = 8,
) -> Figure:
    """
    Draw test images beside the neighbors that their answers rest on, one row each.

    The first picture is the test image with its class and the answer, framed green if right and red if wrong; behind it
    come its neighbors with class and weight (as number and bar), framed green where they share the test image's true
    class, red where not, grey where a class is unknown.

    Args:
        queries (`Sequence[QueryNeighbors]`): the rows.
        path (`str` or `PathLike`): PNG to write.
        label_names (`Sequence[str]`, *optional*): names of the classes; their numbers by default.
        max_neighbors (`int`, defaults to 8): neighbors drawn per row, heaviest first as given.

    Returns:
        `matplotlib.figure.Figure`: the figure, one axes per picture.

    Raises:
        ValueError: without rows.
    """
    if not queries:
        raise ValueError("No test image to draw: pass at least one QueryNeighbors.")

    def name(label: int) -> str:
        if label == UNLABELED:
            return "unknown"
        text = label_names[label] if label_names is not None else str(label)
        return text if len(text) <= 16 else text[:15] + "…"

    rows, shown = len(queries), min(max_neighbors, max(len(query.neighbor_images) for query in queries))
    heaviest = max((weight for query in queries for weight in query.neighbor_weights[:shown]), default=1.0) or 1.0
    figure = _figure(1.3 * (shown + 1.6), 1.75 * rows + 0.75)
    left, right, top, bottom = 0.01, 0.99, 1 - 0.62 / figure.get_figheight(), 0.12 / figure.get_figheight()
    grid = figure.add_gridspec(
        rows, shown + 2, width_ratios=[1.25, 0.18, *[1.0] * shown], hspace=0.52, wspace=0.14,
        left=left, right=right, top=top, bottom=bottom,
    )  # fmt: skip
    for row, query in enumerate(queries):
        axes = figure.add_subplot(grid[row, 0])
        verdict = _agreement(query.prediction, query.label)
        _draw_image(axes, query.image, verdict, 3.5)
        axes.set_title(name(query.label), fontsize=9, fontweight="bold", color=INK, pad=5)
        axes.set_xlabel(
            f"{name(query.prediction)}  p = {query.probability:.2f}", fontsize=8.5, color=verdict, fontweight="bold"
        )
        neighbors = zip(query.neighbor_images, query.neighbor_classes, query.neighbor_weights, strict=True)
        for column, (image, label, weight) in zip(range(shown), neighbors, strict=False):
            axes = figure.add_subplot(grid[row, column + 2])
            frame = _agreement(label, query.label)
            _draw_image(axes, image, frame, 2.2)
            axes.set_title(name(label), fontsize=8, color=MUTED if label == UNLABELED else INK, pad=4)
            track = {"transform": axes.transAxes, "clip_on": False, "linewidth": 0}
            axes.add_patch(Rectangle((0, -0.13), 1, 0.06, facecolor=GRID, **track))
            axes.add_patch(Rectangle((0, -0.13), weight / heaviest, 0.06, facecolor=frame, **track))
            axes.text(
                0.5, -0.16, f"{weight:.3f}", transform=axes.transAxes, ha="center", va="top", fontsize=8, color=MUTED
            )
    return _save(figure, path)
