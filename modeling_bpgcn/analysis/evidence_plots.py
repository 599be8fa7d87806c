"""Pictures of the evidence benchmark: contrasts with intervals, curves of every arm, confusion, embeddings."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from .evidence_contrasts import Contrast
from .plot_style import INK, MUTED, RIGHT, WRONG, save_png, style_axes

# (arm, answer) -> name, color, line: one answer per arm, and the head's own where a graph follows it
LINES = {
    ("frozen", "mix"): ("fixed graph", "#6b7280", "--"),
    ("ce", "linear"): ("CE, linear", "#e08a1e", ":"),
    ("ce", "mix"): ("two-stage, CE", "#e08a1e", "--"),
    ("neighborhood", "mix"): ("two-stage, neighborhood", "#8e5bb5", "--"),
    ("uniform", "transductive"): ("uniform", "#4aa8a8", "-"),
    ("detached", "transductive"): ("detached", "#2a9d5c", "-"),
    ("full", "transductive"): ("full", "#2f6fb7", "-"),
    ("ranking_only", "transductive"): ("ranking path only", "#d1495b", "-"),
    ("random", "transductive"): ("random edges", "#a9793f", "-"),
}
ARM_LINES = {arm: style for (arm, answer), style in LINES.items() if answer in ("mix", "transductive")}
VERDICT_COLORS = {"above zero": RIGHT, "not above zero": MUTED, "below zero": WRONG}
RANKING_NAMES = {"homophily": " (homophily)", "map": " (mAP)"}
PLACEBO = "random"
CURVES = {"homophily": "Homophily", "map": "mAP", "hubness": "Hubness (skewness)", "edge_churn": "Edge churn"}

Curves = dict[str, list[list[dict]]]  # arm -> one curve per cell, a point {"step": .., name: value} per step


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of panels [rows, columns], each of a size in inches."""
    figure = Figure(figsize=(width * columns, height * rows), facecolor="white", layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure) -> None:
    """Each line once, below all panels."""
    handles = {}
    for axes in figure.axes:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False, labelcolor=INK
    )


def plot_contrasts(contrasts: dict[str, Sequence[Contrast]], path: str | PathLike) -> Figure:
    """
    Forest plot, a row of panels per data set: full minus each rival in percentage points, with the interval over images
    (thick) and over folds and images (thin, and in figures beside the number of pairs), green above zero, red below,
    grey across it. The axis spans all but the placebo, which is an arrow where it lies beyond.

    Args:
        contrasts: title -> contrasts under one condition, top to bottom; at least one.
        path: PNG to write.
    """
    halves = {
        title: ([c for c in found if c.measure != "inductive"], [c for c in found if c.measure == "inductive"])
        for title, found in contrasts.items()
    }
    longest = max(len(half) for both in halves.values() for half in both)
    figure, panels = _panels(len(contrasts), 2, 6.8, 0.9 + 0.2 * longest)
    for row, (title, both) in zip(panels, halves.items(), strict=True):
        for axes, kind, half in zip(row, ("transductive", "inductive"), both, strict=True):
            style_axes(axes, f"{title}: {kind}", "full minus rival, percentage points")
            names = [contrast.rival.name + RANKING_NAMES.get(contrast.measure, "") for contrast in half]
            _draw_forest(axes, half, names)
    return save_png(figure, path)


def _draw_forest(axes: Axes, contrasts: Sequence[Contrast], names: Sequence[str]) -> None:
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8, color=INK)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    if not contrasts:
        axes.text(0.5, 0.5, "no pairs", transform=axes.transAxes, ha="center", color=MUTED)
        return
    outer = [contrast.folds or contrast.images for contrast in contrasts]
    shown = [ends for ends, contrast in zip(outer, contrasts, strict=True) if contrast.rival.arm != PLACEBO] or outer
    low, high = 100 * min(0.0, *(ends.low for ends in shown)), 100 * max(0.0, *(ends.high for ends in shown))
    margin = 0.05 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    for row, (contrast, (_, start, end, _)) in enumerate(zip(contrasts, outer, strict=True)):
        color, inner, mean = VERDICT_COLORS[contrast.verdict], contrast.images, 100 * contrast.images.mean
        axes.plot([100 * start, 100 * end], [row, row], color=color, linewidth=1.1)
        axes.plot([100 * inner.low, 100 * inner.high], [row, row], color=color, linewidth=3.4, alpha=0.55)
        inside = min(max(mean, low), high)
        marker = "o" if inside == mean else "<" if mean < low else ">"
        axes.plot(inside, row, marker, color=color, markersize=5)
        text = f"{mean:+.1f} [{100 * start:+.1f}, {100 * end:+.1f}]  {contrast.pairs}"
        axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5, color=MUTED)


def plot_accuracy(
    curves: dict[str, dict[tuple[str, str], dict[float, Sequence[float]]]], axis: str, path: str | PathLike
) -> Figure:
    """
    Accuracy of each arm against labels or noise, mean over cells with a band of one standard deviation; an arm that was
    tried at one place alone has no line.

    Args:
        curves: panel -> (arm, answer) -> place on the axis -> accuracies of the cells, 0 to 1.
        axis: name of the horizontal axis; labels per class are drawn on a logarithmic one.
        path: PNG to write.
    """
    figure, [panels] = _panels(1, len(curves), 5.4, 4.2)
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        style_axes(axes, title, axis)
        axes.set_ylabel("accuracy, %", fontsize=9, color=MUTED)
        places = sorted({x for line in lines.values() for x in line})
        if places[0] > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
        for key, line in ((key, line) for key, line in lines.items() if len(line) > 1):
            name, color, style = LINES[key]
            x = sorted(line)
            mean = np.array([100 * np.mean(line[place]) for place in x])
            deviation = np.array([100 * np.std(line[place], ddof=1) if len(line[place]) > 1 else 0.0 for place in x])
            width = 2.6 if key[0] == "full" else 1.5
            axes.plot(x, mean, style, color=color, linewidth=width, marker="o", markersize=4, label=name)
            axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.1, linewidth=0)
    _legend(figure)
    return save_png(figure, path)


def _mean_curve(curves: Sequence[Sequence[dict]], name: str) -> tuple[list[int], list[float]]:
    """Steps and means over the curves that hold a value there."""
    values = {}
    for curve in curves:
        for point in curve:
            # the first point has no graph before it to have changed from
            if point.get(name) is not None and not (name == "edge_churn" and point["step"] == 0):
                values.setdefault(point["step"], []).append(point[name])
    steps = sorted(values)
    return steps, [float(np.mean(values[step])) for step in steps]


def _draw_curves(axes: Axes, curves: Curves, name: str) -> None:
    for arm in [arm for arm in ARM_LINES if arm in curves]:
        steps, means = _mean_curve(curves[arm], name)
        if steps:
            label, color, style = ARM_LINES[arm]
            width = 2.6 if arm == "full" else 1.5
            axes.plot(steps, means, style, color=color, linewidth=width, label=label, marker="o", markersize=3)


def plot_ranking_curves(curves: dict[str, Curves], path: str | PathLike) -> Figure:
    """Homophily, mAP, hubness and edge churn by step, mean over cells: a row per data set, a line per arm."""
    figure, panels = _panels(len(curves), len(CURVES), 3.7, 3.1)
    for row, (data, arms) in zip(panels, curves.items(), strict=True):
        for axes, (name, title) in zip(row, CURVES.items(), strict=True):
            style_axes(axes, f"{data}: {title}" if axes is row[0] else title, "step")
            _draw_curves(axes, arms, name)
    _legend(figure)
    return save_png(figure, path)


def plot_gradient_share(curves: dict[str, Curves], path: str | PathLike) -> Figure:
    """Share of the gradient's norm that the ranking path brings to the features, by step: a panel per data set."""
    figure, [panels] = _panels(1, len(curves), 5.0, 3.6)
    for axes, (data, arms) in zip(panels, curves.items(), strict=True):
        style_axes(axes, data, "step")
        axes.set_ylabel("share of the ranking path", fontsize=9, color=MUTED)
        _draw_curves(axes, arms, "ranking_gradient_share")
        axes.set_ylim(-0.03, 1.03)
    _legend(figure)
    return save_png(figure, path)


def plot_confusion(counts: np.ndarray, path: str | PathLike, label_names: Sequence[str] | None = None) -> Figure:
    """
    Share of each class answered as each other, in %: rows are true classes.

    Args:
        counts (`np.ndarray` of shape `(C, C)`): images of class i answered as j.
        path: PNG to write.
        label_names: of the classes; their numbers by default.
    """
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(share)
    figure, [[axes]] = _panels(1, 1, 2.2 + 0.36 * C, 1.6 + 0.36 * C)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(share >= 0.5):
        axes.text(
            j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=7, color="white" if share[i, j] > 60 else INK
        )
    names = label_names if label_names is not None else range(C)
    axes.set_xticks(range(C), names, fontsize=8, rotation=90 if label_names is not None else 0)
    axes.set_yticks(range(C), names, fontsize=8)
    axes.set_xlabel("answer", fontsize=9, color=MUTED)
    axes.set_ylabel("class", fontsize=9, color=MUTED)
    return save_png(figure, path)


def plot_embedding(
    features_before: np.ndarray, features_after: np.ndarray, classes: np.ndarray, path: str | PathLike, seed: int = 0
) -> Figure:
    """
    t-SNE (van der Maaten and Hinton, JMLR 2008) of the features before and after training, colored by class.

    Args:
        features_before, features_after (`np.ndarray` of shape `(N, D)`): features of the same images; cosine distances.
        classes (`np.ndarray` of shape `(N,)`): class of each image.
        path: PNG to write.
        seed: of the layout.

    Raises:
        ValueError: if the three do not name the same images, or there are fewer than 5 of them.
    """
    if not len(features_before) == len(features_after) == len(classes) or len(classes) < 5:
        raise ValueError(
            f"{len(features_before)} and {len(features_after)} features and {len(classes)} classes: pass those of the"
            " same images, 5 or more."
        )
    figure, [panels] = _panels(1, 2, 5.2, 5.2)
    for axes, title, features in zip(panels, ("before", "after"), (features_before, features_after), strict=True):
        perplexity = min(30.0, (len(features) - 1) / 3)
        places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(features)
        axes.scatter(*places.T, c=np.asarray(classes) % 20, cmap="tab20", vmin=0, vmax=19, s=9, linewidths=0)
        style_axes(axes, title, "")
        axes.set_xticks([])
        axes.set_yticks([])
    return save_png(figure, path)
