"""Pictures of the gradient's way: its norm at each stage by path, and what the temperature makes of it."""

import textwrap
from os import PathLike

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .gradient_flow import FEATURE, RANKING, SHARED, GradientFlow
from .gradient_verdict import FAULT, TRAINS
from .plot_style import COLORS, INK, MUTED, RIGHT, UNKNOWN, WRONG, legend_above, new_figure, save_png, style_axes
from .temperature_sweep import TemperatureSweep

PATH_COLORS = {SHARED: UNKNOWN, FEATURE: COLORS[0], RANKING: COLORS[1]}
# y offset from the stage's line, height
PLACES = {SHARED: (0.0, 0.5), FEATURE: (-0.2, 0.36), RANKING: (0.2, 0.36)}
LABEL_WIDTH, PANEL_WIDTH, GAP, MARGIN = 1.5, 3.9, 0.35, 0.2  # inches
STAGE_HEIGHT, LINE_HEIGHT = 0.25, 0.165
DECADES = 10  # at most; what is smaller than the largest norm by more ends at the axis


def plot_gradient_flow(flows: dict[str, GradientFlow], path: str | PathLike) -> Figure:
    """
    Draw where the gradient arrives, from the loss at the top to the first block at the bottom: one panel for each model
    or moment, one bar for each path, on one logarithmic axis. A path on which nothing arrives says `none` in red, one
    that does not lead to a stage leaves its place empty. The verdict stands above each panel, the shares below.

    Args:
        flows (`dict[str, GradientFlow]`): what `gradient_flow` found, by the name to show.
        path (`str` or `PathLike`): PNG to write.

    Returns:
        `matplotlib.figure.Figure`: the figure, one axes per flow.

    Raises:
        ValueError: without flows.
    """
    if not flows:
        raise ValueError("No gradient flow to draw: pass at least one, as {name: gradient_flow(model, batch)}.")
    names = _stage_names(flows)
    norms = [norm for flow in flows.values() for stage in flow.stages for norm in stage.norms.values() if norm]
    limits = max(min(norms) / 4, max(norms) * 10.0**-DECADES), max(norms) * 12  # room for the numbers
    verdicts = [textwrap.wrap(flow.verdict, 58) for flow in flows.values()]
    notes = [[line for note in flow.notes() for line in textwrap.wrap(note, 66)] for flow in flows.values()]

    header = 0.75 + LINE_HEIGHT * max(map(len, verdicts))
    body, footer = STAGE_HEIGHT * len(names), 0.65 + LINE_HEIGHT * max(map(len, notes))
    width = 2 * MARGIN + LABEL_WIDTH + len(flows) * (PANEL_WIDTH + GAP) - GAP
    height = header + body + footer
    figure = new_figure(width, height)
    handles = [Patch(color=color, label=name) for name, color in PATH_COLORS.items()]
    handles.append(Patch(color=WRONG, label="none: no gradient arrives"))
    legend_above(figure, handles, MARGIN, len(handles))
    for column, (name, flow) in enumerate(flows.items()):
        left = MARGIN + LABEL_WIDTH + column * (PANEL_WIDTH + GAP)
        axes = figure.add_axes((left / width, footer / height, PANEL_WIDTH / width, body / height))
        _draw_flow(axes, flow, names, limits)
        style_axes(axes, "", "norm of the loss's gradient")
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), color=INK)
        for y, lines, size, weight, color in (
            (height - 0.32, [name], 11, "bold", INK),
            (height - 0.57, verdicts[column], 8.5, "bold", _verdict_color(flow)),
            (footer - 0.5, notes[column], 8, "normal", MUTED),
        ):
            text = {"fontsize": size, "fontweight": weight, "color": color, "va": "top", "linespacing": 1.3}
            figure.text(left / width, y / height, "\n".join(lines), **text)
    return save_png(figure, path)


def _stage_names(flows: dict[str, GradientFlow]) -> list[str]:
    """The stages of all flows in their order; one that only some have follows what precedes it there."""
    names: list[str] = []
    for flow in flows.values():
        place = 0
        for stage in flow.stages:
            if stage.name not in names:
                names.insert(place, stage.name)
            place = names.index(stage.name) + 1
    return names


def _draw_flow(axes: Axes, flow: GradientFlow, names: list[str], limits: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(limits)
    axes.set_ylim(len(names) - 0.5, -0.5)
    low, high = limits
    at_axis = low * (high / low) ** 0.015
    for stage in flow.stages:
        row = names.index(stage.name)
        if not stage.norms:
            axes.text(at_axis, row, "frozen", va="center", fontsize=7.5, color=MUTED)
        for path, norm in stage.norms.items():
            offset, thickness = PLACES[path]
            y = row + offset * (len(stage.norms) > 1)
            if not norm:
                axes.barh(y, at_axis - low, thickness, low, color=WRONG)
                word = "none" if norm is None else "0"
                axes.text(at_axis, y, f" {word}", va="center", fontsize=7.5, fontweight="bold", color=WRONG)
                continue
            axes.barh(y, max(norm, low) - low, thickness, low, color=PATH_COLORS[path])
            axes.text(max(norm, low), y, f" {norm:.1e}", va="center", fontsize=6, color=MUTED)


def _verdict_color(flow: GradientFlow) -> str:
    if flow.verdict.startswith(FAULT):
        return WRONG
    return RIGHT if flow.verdict.startswith(TRAINS) else COLORS[1]


def plot_temperature_sweep(sweep: TemperatureSweep, path: str | PathLike) -> Figure:
    """
    Draw the gradient at the features and the effective number of neighbours over the temperature, with the model's own
    temperature marked.

    Args:
        sweep (`TemperatureSweep`): what `temperature_sweep` found.
        path (`str` or `PathLike`): PNG to write.

    Returns:
        `matplotlib.figure.Figure`: the figure: gradients, effective neighbors.
    """
    figure = new_figure(6.4, 5.6)
    norms, neighbors = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    norms.plot(sweep.temperatures, sweep.feature_norms, color=PATH_COLORS[FEATURE], label=FEATURE)
    norms.plot(sweep.temperatures, sweep.ranking_norms, color=PATH_COLORS[RANKING], linewidth=1.9, label=RANKING)
    typical = {"linestyle": "--", "label": f"{RANKING}, if every image had the median's"}
    norms.plot(sweep.temperatures, sweep.typical_norms, color=PATH_COLORS[RANKING], **typical)
    positive = [norm for norm in (*sweep.ranking_norms, *sweep.feature_norms) if norm > 0]
    if positive:  # the gradient of a cold ranking underflows
        norms.set_yscale("log", nonpositive="mask")
        norms.set_ylim(max(min(positive) / 10, max(positive) * 1e-8), max(positive) * 3)
    neighbors.plot(sweep.temperatures, sweep.effective_neighbors, color=COLORS[2], linewidth=1.9)
    neighbors.set_ylim(0, sweep.num_neighbors * 1.08)
    neighbors.set_xscale("log")
    style_axes(norms, "Gradient norm at the features", "")
    style_axes(neighbors, f"Effective number of neighbors, of {sweep.num_neighbors}", "temperature")
    for axes in (norms, neighbors):
        axes.axvline(sweep.current, color=MUTED, linewidth=1.0, linestyle=":", label=f"tau = {sweep.current:.3g}")
    norms.legend(fontsize=8, frameon=False, labelcolor=INK)
    figure.tight_layout(pad=1.2, h_pad=1.2)
    return save_png(figure, path)
