"""The evidence benchmark on one page: tables of every arm, contrasts with their intervals, and what is missing."""

import json
from collections import Counter
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np

from . import evidence_plots as plots
from .evidence_cells import ARMS, Condition, group_cells, in_order
from .evidence_contrasts import DETACHED, PRIMARY, RANKING, Contrast, contrast_all
from .evidence_tables import (
    MEASURES,
    NONE,
    Arms,
    answer_metric,
    answer_table,
    brief_table,
    contrast_table,
    missing_cells,
    missing_table,
    ranking_table,
    spread,
    table,
)

METHOD = """\
- One of ten stratified folds holds the labels: all of its images, or so many of each class. Transductive answers
  (every answer not named `inductive`) are scored on all images of the other nine folds, inductive ones on one of these
  folds, which training did not see even as unlabeled nodes.
- ± is the sample standard deviation over cells. Arms may hold different cells, so compare them by the contrasts.
- A contrast is full minus a rival, on the same test images of the same fold and seed, in percentage points; without a
  shared cell there is none.
- 95 % (images): percentile bootstrap over test images; an image is drawn as often for one cell as for the others
  {identity}.
- 95 % (folds, images): folds are drawn, too, since all that is measured on a fold rests on the same labeled images.
  There are {num_folds}; with fewer than about 8 this interval is still too narrow. The verdict and the share of
  bootstrap samples above zero go by it, or by the other one where there is a single fold.
- "Not above zero" means that the interval holds zero: neither a difference nor its absence is shown.
- No interval is corrected for the number of contrasts: of 20 without any true difference, one is expected to lie off
  zero. The primary contrasts (bold) are the same for every run.
"""


def write_report(
    cells: Iterable[dict],
    folder: str | PathLike,
    *,
    command: str = "",
    planned: Iterable[dict] | None = None,
    num_samples: int = 10_000,
) -> Path:
    """
    Write `report.md`, its pictures and `details.md` (the tables of all but the first condition of each data set) from
    cells of stage `test`; a partial grid gives a partial report that says so.

    Args:
        cells (`Iterable[dict]`): as `evidence_cells.read_cells` gives.
        folder (`str` or `PathLike`): where the report goes.
        command (`str`, *optional*): what made the cells, printed in the report.
        planned (`Iterable[dict]`, *optional*): cells that should be there (`arm`, `data`, `budget`, `noise`, `fold`,
            `seed`). By default every fold and seed of a condition for every arm seen under it.
        num_samples (`int`): of the bootstrap.

    Returns:
        `Path`: the report.

    Raises:
        ValueError: without a cell of stage `test`, or where arms were scored on different images.
    """
    cells = [cell for cell in cells if cell["stage"] == "test"]
    groups = group_cells(cells)
    if not groups:
        raise ValueError("There is no cell of stage 'test' to report: run the benchmark first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contrasts = {condition: contrast_all(arms, num_samples) for condition, arms in groups.items()}
    missing = missing_cells(groups, planned)
    used = [cell for arms in groups.values() for places in arms.values() for cell in places.values()]
    joint = all("tested" in cell for cell in used)
    # clean labels, the largest share of them
    main = set({condition.data: condition for condition in reversed(groups)}.values())

    parts = [
        "# Evidence",
        _counts(len(cells), len(used), sum(len(lacking) for *_, lacking in missing)),
        f"```\n{command}\n```" if command else "",
        "## What is compared",
        table(["arm", "what it is"], _descriptions(groups), left=2),
        METHOD.format(
            identity="that test it" if joint else "of its fold",
            num_folds=len({cell["fold"] for cell in used}),
        ),
        *_primary_contrasts(contrasts, main, folder),
        *_accuracy_curves("labels per class", _by_budget(groups), folder / "labels.png"),
        *_accuracy_curves("share of wrong labels", _by_noise(groups), folder / "noise.png"),
        *_training(groups, folder),
    ]
    details = ["# Evidence: further conditions", "What the columns mean, and what is missing: [report](report.md)."]
    for condition, arms in groups.items():
        (parts if condition in main else details).extend(_condition(condition, arms, contrasts[condition], folder))
    if len(groups) > len(main):
        parts.append(f"The same tables for {len(groups) - len(main)} further conditions: [details](details.md).")
        _write(folder / "details.md", details)
    parts += ["## Settings beside the benchmark's defaults", _settings(used)]
    if missing:
        parts += ["## Missing cells", missing_table(missing)]
    return _write(folder / "report.md", parts)


def _write(path: Path, parts: list[str]) -> Path:
    path.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return path


# --- head -------------------------------------------------------------------------------------------------------------


def _counts(read: int, used: int, missing: int) -> str:
    text = f"{used} cells (an arm trained and scored on one fold, seed, number of labels and share of wrong labels)"
    text += (
        f"; {missing} are missing and listed at the end: this report is partial." if missing else "; none is missing."
    )
    if read > used:
        text += f" Left out, as a later one differs in settings alone: {read - used}."
    return text


def _descriptions(groups: dict[Condition, Arms]) -> list[tuple[str, str]]:
    arms = in_order({arm for arms in groups.values() for arm in arms}, ARMS)
    return [(arm, ARMS.get(arm, NONE)) for arm in arms]


def _settings(cells: list[dict]) -> str:
    counts = Counter((cell["arm"], json.dumps(cell["settings"], sort_keys=True)) for cell in cells)
    arms = in_order({arm for arm, _ in counts}, ARMS)
    rows = sorted(counts.items(), key=lambda entry: (arms.index(entry[0][0]), entry[0][1]))
    return table(["arm", "settings", "cells"], [[arm, f"`{text}`", count] for (arm, text), count in rows], left=2)


# --- sections ---------------------------------------------------------------------------------------------------------


def _picture(path: Path, caption: str) -> str:
    return f"![{path.stem}]({path.name})\n\n*{caption}.*"


def _primary_contrasts(contrasts: dict[Condition, list[Contrast]], main: set[Condition], folder: Path) -> list[str]:
    tables = {
        "Full minus a rival, transductive accuracy:": {rival.name: (rival, "transductive") for rival in PRIMARY},
        "Full minus a rival, inductive accuracy:": {rival.name: (rival, "inductive") for rival in PRIMARY},
        "Full minus detached, rankings of the test images:": {MEASURES[name]: (DETACHED, name) for name in RANKING},
    }
    parts = []
    for title, columns in tables.items():
        found = brief_table(contrasts, columns)
        parts += [title, found] if found else []
    if not parts:
        return ["## Primary contrasts", "Full and its primary rivals share no fold and seed yet."]
    path = folder / "contrasts.png"
    plots.plot_contrasts({str(c): found for c, found in contrasts.items() if found and c in main}, path)
    caption = (
        "All contrasts under the first condition of each data set: mean, 95 % interval over images (thick) and over"
        " folds and images (thin; in figures, with the number of pairs)"
    )
    note = "Percentage points [95 % over folds and images] (pairs); bold where the interval does not hold zero."
    return ["## Primary contrasts", note, *parts, _picture(path, caption)]


def _by_budget(groups: dict[Condition, Arms]) -> dict[str, dict[float, Arms]]:
    """Data set -> labels per class -> arms."""
    found = {}
    for condition, arms in groups.items():
        if condition.budget.isdecimal() and not condition.noise:
            found.setdefault(condition.data, {})[float(condition.budget)] = arms
    return found


def _by_noise(groups: dict[Condition, Arms]) -> dict[str, dict[float, Arms]]:
    """Data set and labels -> share of wrong labels -> arms."""
    found = {}
    for condition, arms in groups.items():
        found.setdefault(str(condition._replace(noise=0.0)), {})[condition.noise] = arms
    return found


def _accuracy_curves(axis: str, panels: dict[str, dict[float, Arms]], path: Path) -> list[str]:
    """Picture and tables of accuracy along an axis, of the panels that hold more than one place on it."""
    curves = {title: _curves(points) for title, points in panels.items() if len(points) > 1}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        return []
    plots.plot_accuracy(curves, axis, path)
    caption = f"Accuracy against {axis}: mean over cells, band of one standard deviation"
    parts = [f"## Accuracy against {axis}", _picture(path, caption), "Accuracy in %, in brackets the number of cells."]
    for title, lines in curves.items():
        places = sorted(panels[title])
        rows = [
            [f"{arm}: {answer}", *(_counted(line[x]) if x in line else NONE for x in places)]
            for (arm, answer), line in lines.items()
        ]
        parts.append(table([f"{title}; {axis}:", *(f"{x:g}" for x in places)], rows))
    return parts


def _counted(values: list[float]) -> str:
    return f"{spread(values, 100)} ({len(values)})"


def _curves(points: dict[float, Arms]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """(arm, answer) -> place on the axis -> accuracies of the cells, for the answers that are drawn."""
    lines = {}
    for arm, answer in plots.LINES:
        for place, arms in points.items():
            values = answer_metric(arms.get(arm, {}).values(), answer, "accuracy")
            if values:
                lines.setdefault((arm, answer), {})[place] = values
    return lines


def _training(groups: dict[Condition, Arms], folder: Path) -> list[str]:
    traced: dict[str, plots.Curves] = {}
    for condition, arms in groups.items():
        curves = {arm: [cell["curve"] for cell in places.values() if cell.get("curve")] for arm, places in arms.items()}
        curves = {arm: found for arm, found in curves.items() if found and arm in plots.ARM_LINES}
        if curves and not any(title.startswith(f"{condition.data},") for title in traced):
            traced[str(condition)] = curves
    parts = []
    ranking = folder / "ranking.png"
    if any(point.get(name) is not None for name in plots.CURVES for point in _points(traced)):
        plots.plot_ranking_curves(traced, ranking)
        parts.append(_picture(ranking, "The ranking of the test images during training, mean over traced cells"))
    gradient = folder / "gradient.png"
    if any(point.get("ranking_gradient_share") is not None for point in _points(traced)):
        plots.plot_gradient_share(traced, gradient)
        caption = "Norm of the gradient through the ranking over the sum of both paths' norms, mean over cells"
        parts.append(_picture(gradient, caption))
    return ["## During training", *parts] if parts else []


def _points(traced: dict[str, plots.Curves]) -> list[dict]:
    return [point for arms in traced.values() for curves in arms.values() for curve in curves for point in curve]


def _condition(condition: Condition, arms: Arms, contrasts: list[Contrast], folder: Path) -> list[str]:
    parts = [f"## {condition}", "### Answers", answer_table(arms), "### Rankings after training", ranking_table(arms)]
    if contrasts:
        parts += ["### Contrasts: full minus a rival", contrast_table(contrasts)]
    confusion = [cell["confusion"] for cell in arms.get("full", {}).values() if cell.get("confusion")]
    if confusion and not condition.noise and not condition.budget.isdecimal():
        path = folder / f"confusion-{condition.data}.png"
        plots.plot_confusion(np.sum(confusion, axis=0), path)
        parts.append(_picture(path, "Full, transductive: of each class (row) the share answered as each other, in %"))
    return parts
