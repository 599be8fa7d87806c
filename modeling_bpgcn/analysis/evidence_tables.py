"""Tables of the evidence report: what every arm scores, how its rankings are, what lies between it and full."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .bootstrap import Interval
from .evidence_cells import ANSWERS, Condition, condition_of, in_order
from .evidence_contrasts import PRIMARY, Contrast, Rival

Arms = dict[str, dict[tuple[int, int], dict]]  # arm -> (fold, seed) -> cell
NONE = "–"
CONTRAST_HEADER = (
    "full minus",
    "measure",
    "difference",
    "95 % (images)",
    "95 % (folds, images)",
    "samples > 0",
    "pairs",
    "verdict",
)
MEASURES = {
    "transductive": "accuracy, transductive",
    "inductive": "accuracy, inductive",
    "homophily": "homophily",
    "map": "mAP",
}
# name in a cell -> header, scale, digits
ANSWER_COLUMNS = {
    "accuracy": ("accuracy, %", 100, 1),
    "macro_f1": ("macro-F1, %", 100, 1),
    "nll": ("NLL", 1, 2),
    "ece": ("ECE, %", 100, 1),
}
RANKING_COLUMNS = {
    "homophily": ("homophily, %", 100, 1),
    "homophily_labeled": ("homophily to labeled, %", 100, 1),
    "map": ("mAP, %", 100, 1),
    "map_labeled": ("mAP to labeled, %", 100, 1),
    "recall": ("recall@10, %", 100, 1),
    "hubness": ("hubness", 1, 2),
    "effective_neighbors": ("effective neighbors", 1, 1),
}


def table(header: Sequence[str], rows: Iterable[Sequence], left: int = 1) -> str:
    """A Markdown table whose first columns are set left, the others right."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Iterable[float | None], scale: float = 1, digits: int = 1) -> str:
    """Mean ± sample standard deviation of the known values; without the latter for one value, a dash for none."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return NONE
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def answer_metric(cells: Iterable[dict], answer: str, metric: str) -> list[float]:
    """A metric of one answer in the cells that hold it."""
    values = [cell.get("answers", {}).get(answer, {}).get(metric) for cell in cells]
    return [value for value in values if value is not None]


def answer_table(arms: Arms) -> str:
    """A row per arm and way to answer."""
    rows = []
    for arm, places in arms.items():
        cells = list(places.values())
        for answer in in_order({name for cell in cells for name in cell.get("answers", {})}, ANSWERS):
            columns = [
                spread(answer_metric(cells, answer, metric), scale, digits)
                for metric, (_, scale, digits) in ANSWER_COLUMNS.items()
            ]
            rows.append([f"{arm}: {answer}", sum(answer in cell.get("answers", {}) for cell in cells), *columns])
    return table(["arm: answer", "cells", *(header for header, *_ in ANSWER_COLUMNS.values())], rows)


def ranking_table(arms: Arms) -> str:
    """A row per arm, and one for the features before training where cells tell of them; time and memory of the arm."""
    names = [name for name in RANKING_COLUMNS if any(_rankings(arms, name))]
    rows = []
    for arm, places in arms.items():
        cells = list(places.values())
        for moment in ("before", "after"):
            rankings = [cell["ranking"][moment] for cell in cells if moment in cell.get("ranking", {})]
            if rankings:
                columns = [spread([r.get(n) for r in rankings], *RANKING_COLUMNS[n][1:]) for n in names]
                costs = [spread([cell.get(cost) for cell in cells], digits=0) for cost in ("seconds", "rss_mib")]
                label = arm if moment == "after" else f"{arm}, before training"
                rows.append([label, len(rankings), *columns, *(costs if moment == "after" else [NONE, NONE])])
    headers = [RANKING_COLUMNS[name][0] for name in names]
    return table(["arm", "cells", *headers, "seconds", "peak memory, MiB"], rows)


def _rankings(arms: Arms, name: str) -> Iterator[bool]:
    for places in arms.values():
        for cell in places.values():
            yield any(ranking.get(name) is not None for ranking in cell.get("ranking", {}).values())


def contrast_table(contrasts: Sequence[Contrast]) -> str:
    """A row per rival and measure; primary contrasts in bold."""
    rows = []
    for contrast in contrasts:
        name = contrast.rival.name
        wider = contrast.folds or contrast.images
        rows.append(
            [
                f"**{name}**" if contrast.rival in PRIMARY else name,
                MEASURES[contrast.measure],
                f"{100 * contrast.images.mean:+.2f}",
                _ends(contrast.images),
                NONE if contrast.folds is None else _ends(contrast.folds),
                f"{100 * wider.probability_above_zero:.1f} %",
                contrast.pairs,
                contrast.verdict,
            ]
        )
    return table(CONTRAST_HEADER, rows, left=2)


def _ends(interval: Interval) -> str:
    return f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def brief_table(contrasts: dict[Condition, list[Contrast]], columns: dict[str, tuple[Rival, str]]) -> str | None:
    """
    A row per condition, a column per (rival, measure): difference, wider interval and pairs, bold where the interval
    does not hold zero; None without any pair.
    """
    rows = []
    for condition, found in contrasts.items():
        places = {(contrast.rival, contrast.measure): contrast for contrast in found}
        row = [places.get(column) for column in columns.values()]
        if any(row):
            rows.append([str(condition), *map(_brief, row)])
    return table(["condition", *columns], rows) if rows else None


def _brief(contrast: Contrast | None) -> str:
    if contrast is None:
        return NONE
    text = f"{100 * contrast.images.mean:+.2f} {_ends(contrast.folds or contrast.images)} ({contrast.pairs})"
    return text if contrast.verdict == "not above zero" else f"**{text}**"


def missing_cells(
    groups: dict[Condition, Arms], planned: Iterable[dict] | None
) -> list[tuple[Condition, str, int, list[tuple[int, int]]]]:
    """
    `(condition, arm, number of cells there are, (fold, seed) of the missing ones)` for each arm that lacks any, of a
    plan or, without one, of the folds and seeds that any arm of the condition has.
    """
    wanted: dict[tuple[Condition, str], set] = {}
    if planned is None:
        for condition, arms in groups.items():
            places = set().union(*arms.values())
            wanted |= {(condition, arm): places for arm in arms}
    else:
        for cell in planned:
            if cell.get("stage", "test") == "test":
                places = wanted.setdefault((condition_of(cell), cell["arm"]), set())
                places.add((int(cell["fold"]), int(cell["seed"])))
    found = []
    for (condition, arm), places in wanted.items():
        present = groups.get(condition, {}).get(arm, {})
        lacking = sorted(places - present.keys())
        if lacking:
            found.append((condition, arm, len(present), lacking))
    return found


def missing_table(missing: list[tuple[Condition, str, int, list[tuple[int, int]]]]) -> str:
    """A row per arm that lacks cells, which are named by fold and seed."""
    rows = []
    for condition, arm, present, lacking in missing:
        seeds = sorted({seed for _, seed in lacking})
        folds = [f"seed {seed}: folds {', '.join(str(f) for f, s in lacking if s == seed)}" for seed in seeds]
        rows.append([str(condition), arm, "; ".join(folds), present, len(lacking)])
    return table(["condition", "arm", "which", "there", "missing"], rows, left=3)
