"""Cells of the evidence benchmark: one JSON line for each trained arm on one fold, seed, budget and noise level."""

import base64
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

FIELDS = ("arm", "data", "fold", "seed", "budget", "noise", "stage", "settings")  # what every cell must say
ARMS = {
    "frozen": "frozen backbone: classifiers and graphs on its features",
    "ce": "backbone fine-tuned through a linear head, then frozen: the head's answers, and two-stage graphs",
    "neighborhood": "backbone tuned by the neighborhood loss (metric learning), then frozen: two-stage graphs",
    "uniform": "end to end, neighbors recomputed, equal edge weights",
    "detached": "end to end, neighbors recomputed, soft edge weights without gradient",
    "full": "end to end, neighbors recomputed, soft edge weights with gradient",
    "ranking_only": "end to end as full, but gradient through the edge weights alone",
    "random": "end to end as full, but neighbors drawn at random (placebo)",
}
TWO_STAGE_ANSWERS = ("knn", "logistic", "linear", "gcn_uniform", "lp_uniform", "mix_uniform", "gcn", "lp", "mix")
END_TO_END_ANSWERS = ("transductive", "head", "propagation", "inductive", "inductive_head", "inductive_propagation")
ANSWERS = (*TWO_STAGE_ANSWERS, *(f"inductive_{name}" for name in TWO_STAGE_ANSWERS), *END_TO_END_ANSWERS)


def _pack(array: np.ndarray, size: int) -> str:
    return f"{size}:{base64.b64encode(array.tobytes()).decode('ascii')}"


def _unpack(text: str, dtype: str) -> tuple[np.ndarray, int]:
    size, separator, encoded = text.partition(":")
    if not separator or not size.isdigit():
        raise ValueError(f"{text[:20]!r} is not an array of a cell: it must read 'length:base64'.")
    return np.frombuffer(base64.b64decode(encoded, validate=True), dtype=dtype), int(size)


def _check_length(found: int, size: int) -> None:
    if found != size:
        raise ValueError(f"An array of {size} values holds {found}: the cell is damaged, run it again.")


def pack_bits(values: Iterable[bool]) -> str:
    """Booleans [N] as `"N:base64"`, eight to a byte."""
    values = np.asarray(values, dtype=bool)
    return _pack(np.packbits(values), values.size)


def unpack_bits(text: str) -> np.ndarray:
    """Booleans [N] of `pack_bits`; raises ValueError for a damaged text."""
    packed, size = _unpack(text, "u1")
    _check_length(packed.size, -(-size // 8))
    return np.unpackbits(packed, count=size).astype(bool)


def pack_floats(values: Iterable[float]) -> str:
    """Numbers [N] as `"N:base64"` of float16: shares and precisions from 0 to 1 to three digits; NaN stays NaN."""
    values = np.asarray(values, dtype="<f2")
    return _pack(values, values.size)


def unpack_floats(text: str) -> np.ndarray:
    """Numbers [N] of `pack_floats`, as float64; raises ValueError for a damaged text."""
    values, size = _unpack(text, "<f2")
    _check_length(values.size, size)
    return values.astype(np.float64)


def cell_key(cell: dict) -> tuple:
    """`(stage, arm, data, fold, seed, budget, noise, hash of the settings)`: equal for the same work, and hashable."""
    settings = json.dumps(_plain(cell["settings"]), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    fold, seed, noise = int(cell["fold"]), int(cell["seed"]), float(cell["noise"])
    return cell["stage"], cell["arm"], cell["data"], fold, seed, str(cell["budget"]), noise, digest


class Condition(NamedTuple):
    """What all arms of one comparison share."""

    data: str
    budget: str  # labels: a share of the images such as `10%`, or so many per class such as `4`
    noise: float  # share of the labels that are wrong

    @property
    def order(self) -> tuple:
        """Sorts by data set, then clean labels first, a share of the labels before numbers per class."""
        return self.data, self.noise, self.budget.isdecimal(), int(self.budget) if self.budget.isdecimal() else 0

    def __str__(self) -> str:
        budget = self.budget
        labels = f"{budget} per class" if budget.isdecimal() else budget.replace("%", " %")
        return f"{self.data}, {labels} labeled" + (f", {100 * self.noise:g} % of them wrong" if self.noise else "")


def condition_of(cell: dict) -> Condition:
    """The condition under which a cell was run."""
    return Condition(cell["data"], str(cell["budget"]), float(cell["noise"]))


def group_cells(cells: Iterable[dict]) -> dict[Condition, dict[str, dict[tuple[int, int], dict]]]:
    """
    Cells of the stage `test` as condition -> arm -> (fold, seed) -> cell, each level in the order of a report. Of cells
    that differ in their settings alone the last one counts.
    """
    groups = {}
    for cell in cells:
        if cell["stage"] == "test":
            arms = groups.setdefault(condition_of(cell), {})
            arms.setdefault(cell["arm"], {})[int(cell["fold"]), int(cell["seed"])] = cell
    return {
        condition: {arm: dict(sorted(groups[condition][arm].items())) for arm in in_order(groups[condition], ARMS)}
        for condition in sorted(groups, key=lambda condition: condition.order)
    }


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the order of the known ones, then the others by alphabet."""
    position = {name: number for number, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (position.get(name, len(position)), name))


def append_cell(path: str | PathLike, cell: dict) -> None:
    """
    Add a cell to a file, on a line of its own even where a killed run left half a line. NaN and infinity become null.

    Raises:
        ValueError: if a field that identifies the cell is missing.
    """
    _check_fields(cell, "The cell")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        start = b""
        if file.tell():
            file.seek(-1, 2)
            start = b"" if file.read(1) == b"\n" else b"\n"
        file.write(start + json.dumps(_plain(cell), allow_nan=False).encode() + b"\n")


def read_cells(*paths: str | PathLike) -> list[dict]:
    """
    Every cell of JSON-lines files; of cells with the same key the last one. A line that a killed run left torn is
    skipped with a warning in the log.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a whole line lacks a field that identifies a cell.
    """
    cells = {}
    for path in map(Path, paths):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s:%d is torn, as a killed run leaves it: skipped.", path, number)
                continue
            _check_fields(cell, f"{path}:{number}")
            key = cell_key(cell)
            cells.pop(key, None)  # a repeated cell takes its new place
            cells[key] = cell
    return list(cells.values())


def _check_fields(cell: dict, where: str) -> None:
    missing = [name for name in FIELDS if name not in cell] if isinstance(cell, dict) else FIELDS
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: a cell must say {', '.join(FIELDS)}.")


def _plain(value):
    """What JSON can hold: numpy scalars as Python's, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
