"""Pictures of a run: how training went, and which images an answer rests on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .plot_style import COLORS, GRID, INK, MUTED, RIGHT, UNKNOWN, WRONG, legend_above, new_figure, save_png, style_axes

UNLABELED = -100
GREY_MODES = {"1", "L", "I", "I;16", "F"}  # PIL's; the others are drawn in color
SMALL_IMAGE = 48  # pixels below which every pixel is shown as a square
MARGIN, QUERY_SIZE, NEIGHBOR_SIZE, NEIGHBOR_GAP, ROW_HEIGHT = 0.15, 1.3, 1.08, 0.13, 2.05  # inches

# title, whether the axis is logarithmic, key in the log history -> name in the legend
PANELS = (
    (
        "Loss",
        False,
        {
            "loss": "training",
            "eval_loss": "evaluation",
            "head_loss": "head loss",
            "propagation_loss": "propagation loss",
            "neighborhood_loss": "neighborhood loss",
            "average_precision_loss": "average precision loss",
            "consistency_loss": "consistency loss",
            "propagation_consistency_loss": "propagation consistency loss",
            "gradient_penalty": "gradient penalty",
            "sam_loss": "training, perturbed by SAM",
        },
    ),
    ("Accuracy", False, {"eval_accuracy": "inductive", "eval_transductive_accuracy": "transductive"}),
    ("Homophily", False, {"homophily": "batch graph", "eval_neighbor_homophily": "evaluation"}),
    ("Temperature", False, {"temperature": "temperature"}),
    ("Effective number of neighbors", False, {"effective_neighbors": "effective neighbors"}),
    (
        "Gradient norm",
        True,
        {
            "ranking_gradient_norm": "ranking path",
            "feature_gradient_norm": "feature path",
            "grad_norm": "all parameters",
        },
    ),
)
THIN = {
    "head loss",
    "propagation loss",
    "neighborhood loss",
    "average precision loss",
    "consistency loss",
    "propagation consistency loss",
    "gradient penalty",
}  # parts of the training loss, behind their sum


def _series(log_history: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
    points = [(step, float(value)) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def _learning_rates(log_history: Sequence[dict]) -> dict[str, str]:
    """Every key that ends in learning_rate; Trainer's own repeats the first group once groups are logged by name."""
    keys = list(dict.fromkeys(key for entry in log_history for key in entry if key.endswith("learning_rate")))
    groups = [key for key in keys if key != "learning_rate"]
    return {key: key.removesuffix("_learning_rate") for key in groups} or dict.fromkeys(keys, "all parameters")


def _draw_panel(axes: Axes, title: str, logarithmic: bool, curves: dict[str, tuple[list[float], list[float]]]) -> None:
    for color, (name, (steps, values)) in zip(cycle(COLORS), curves.items(), strict=False):
        marker = "o" if len(steps) <= 25 else None
        style = {"linewidth": 1.1, "zorder": 2} if name in THIN else {"linewidth": 1.9, "zorder": 3}
        axes.plot(steps, values, color=color, marker=marker, markersize=3.5, label=name, **style)
    positive = [value for _, values in curves.values() for value in values if value > 0]
    if logarithmic and positive:
        axes.set_yscale("log", nonpositive="mask")  # a schedule that ends at 0 ends at the axis
        # A schedule's last steps would stretch the axis over ten decades.
        axes.set_ylim(bottom=max(min(positive) / 1.5, max(positive) * 1e-5))
    style_axes(axes, title, "step")
    if len(curves) > 1:
        small = {"fontsize": 6.5, "labelspacing": 0.25} if len(curves) > 6 else {"fontsize": 8}
        axes.legend(frameon=False, labelcolor=INK, **small)


def plot_training_curves(log_history: Sequence[dict], path: str | PathLike) -> Figure:
    """
    Draw a run's curves over its steps: losses, accuracy, homophily, temperature, effective number of neighbors,
    gradient norms by path and learning rates; a panel without data is left out.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `PathLike`): PNG to write.

    Returns:
        `matplotlib.figure.Figure`: the figure, one axes per panel.

    Raises:
        ValueError: if the history holds nothing to draw.
    """
    panels = []
    for title, logarithmic, names in (*PANELS, ("Learning rate", True, _learning_rates(log_history))):
        curves = {name: _series(log_history, key) for key, name in names.items()}
        curves = {name: series for name, series in curves.items() if series[0]}
        if curves:
            panels.append((title, logarithmic, curves))
    if not panels:
        raise ValueError(
            f"The log history ({len(log_history)} entries) holds nothing to draw: train with logging_steps at or below"
            " the number of steps."
        )

    # Of 3 and 4 columns the one that leaves fewer places empty.
    columns = min((3, 4), key=lambda width: -len(panels) % width) if len(panels) > 3 else len(panels)
    rows = math.ceil(len(panels) / columns)
    last_step = max(step for _, _, curves in panels for steps, _ in curves.values() for step in steps)
    figure = new_figure(4.1 * columns, 3.0 * rows)
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, position)
        _draw_panel(axes, *panel)
        axes.set_xlim(0, last_step * 1.02)
    figure.tight_layout(pad=1.2, w_pad=2.0, h_pad=1.6)
    return save_png(figure, path)


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
    if isinstance(image, Image.Image) and image.mode not in GREY_MODES:
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def _draw_image(axes: Axes, image: Image.Image | np.ndarray, frame: str, frame_width: float) -> None:
    pixels = _square(image)
    # The color map stretches grey images of any range: 0 to 16 in scikit-learn's digits, 0 to 65535 in 16-bit files.
    axes.imshow(pixels, cmap="gray", interpolation="nearest" if len(pixels) < SMALL_IMAGE else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=frame_width)


def _draw_legend(figure: Figure) -> None:
    entries = ((RIGHT, "same class, right answer"), (WRONG, "other class, wrong answer"), (UNKNOWN, "class unknown"))
    handles = [
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=color, linewidth=2, label=text) for color, text in entries
    ]
    legend_above(figure, handles, MARGIN, len(entries) if figure.get_figwidth() > 6 else 1)


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

    The first picture is the test image with its class above and the answer below, framed green if right and red if
    wrong; behind it come its neighbors with class and weight (as number and bar), framed green where they share the
    test image's true class, red where not, grey where a class is unknown.

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
        text = str(label) if label_names is None else label_names[label]
        return text if len(text) <= 16 else text[:15] + "…"

    shown = min(max_neighbors, max(len(query.neighbor_images) for query in queries))
    heaviest = max((weight for query in queries for weight in query.neighbor_weights[:shown]), default=1.0) or 1.0
    first_neighbor = MARGIN + QUERY_SIZE + 0.4
    width = max(first_neighbor + shown * (NEIGHBOR_SIZE + NEIGHBOR_GAP) - NEIGHBOR_GAP + MARGIN, 3.0)
    header = 0.42 if width > 6 else 0.85
    height = header + len(queries) * ROW_HEIGHT
    figure = new_figure(width, height)
    _draw_legend(figure)

    for row, query in enumerate(queries):
        top = height - header - row * ROW_HEIGHT - 0.2  # inches from the bottom, below the titles
        box = (MARGIN / width, (top - QUERY_SIZE) / height, QUERY_SIZE / width, QUERY_SIZE / height)
        axes = figure.add_axes(box)
        verdict = _agreement(query.prediction, query.label)
        _draw_image(axes, query.image, verdict, 3.5)
        axes.set_title(name(query.label), fontsize=9, fontweight="bold", color=INK, pad=5)
        answer = f"→ {name(query.prediction)}\np = {query.probability:.2f}"
        axes.set_xlabel(answer, fontsize=8.5, color=verdict, fontweight="bold", labelpad=4)

        neighbors = zip(query.neighbor_images, query.neighbor_classes, query.neighbor_weights, strict=True)
        for column, (image, label, weight) in zip(range(shown), neighbors, strict=False):
            left = first_neighbor + column * (NEIGHBOR_SIZE + NEIGHBOR_GAP)
            box = (left / width, (top - NEIGHBOR_SIZE) / height, NEIGHBOR_SIZE / width, NEIGHBOR_SIZE / height)
            axes = figure.add_axes(box)
            frame = _agreement(label, query.label)
            _draw_image(axes, image, frame, 2.2)
            axes.set_title(name(label), fontsize=8, color=MUTED if label == UNLABELED else INK, pad=4)
            below = {"transform": axes.transAxes, "clip_on": False}
            axes.add_patch(Rectangle((0, -0.14), 1, 0.07, facecolor=GRID, linewidth=0, **below))
            axes.add_patch(Rectangle((0, -0.14), weight / heaviest, 0.07, facecolor=frame, linewidth=0, **below))
            axes.text(0.5, -0.18, f"{weight:.3f}", ha="center", va="top", fontsize=8, color=MUTED, **below)
    return save_png(figure, path)
