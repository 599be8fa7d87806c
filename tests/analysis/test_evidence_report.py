"""The evidence report: every number in it is one of the cells', and it says what it lacks."""

import re

import numpy as np
import pytest
from PIL import Image

from modeling_bpgcn.analysis.evidence_cells import append_cell, read_cells
from modeling_bpgcn.analysis.evidence_report import write_report
from modeling_bpgcn.analysis.evidence_tables import spread, table
from tests.analysis.evidence_factory import ACCURACY, make_cell

SEEDS = (0, 1)


def _grid():
    cells = [make_cell(arm, fold, seed) for arm in ACCURACY for fold in range(3) for seed in SEEDS]
    for arm in ("frozen", "ce", "detached", "full"):
        cells += [make_cell(arm, fold, 0, budget=budget) for fold in range(2) for budget in ("1", "4")]
        cells += [make_cell(arm, fold, 0, noise=0.3) for fold in range(2)]
    return cells


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    for cell in _grid():
        append_cell(folder / "cells.jsonl", cell)
    return write_report(
        read_cells(folder / "cells.jsonl"), folder / "report", command="python benchmarks/evidence.py", num_samples=200
    )


def _row(text, *starts):
    """Columns of the first table row whose first columns are these."""
    for line in text.splitlines():
        columns = [column.strip() for column in line.strip("| ").split("|")]
        if columns[: len(starts)] == list(starts):
            return columns
    raise AssertionError(f"no row {starts}")


def test_a_row_holds_the_mean_and_deviation_over_folds_and_seeds(full_report):
    cells = [make_cell("full", fold, seed) for fold in range(3) for seed in SEEDS]
    values = [100 * cell["answers"]["transductive"]["accuracy"] for cell in cells]
    row = _row(full_report.read_text(), "full: transductive", "6")
    assert row[2] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    shares = [100 * cell["ranking"]["after"]["homophily"] for cell in cells]
    row = _row(full_report.read_text(), "full", "6")
    assert row[2] == f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f}"
    assert row[-2:] == ["12 ± 0", "800 ± 0"]


def test_it_tells_what_was_compared_by_which_command_and_what_is_missing(full_report):
    text = full_report.read_text()
    assert "72 cells" in text
    assert "none is missing" in text
    assert "python benchmarks/evidence.py" in text
    assert all(_row(text, arm) for arm in ACCURACY)
    assert "## Missing cells" not in text


def test_contrasts_come_with_both_intervals_pairs_and_a_plain_word(full_report):
    row = _row(full_report.read_text(), "**fixed graph, mix**", "accuracy, transductive")
    number = r"[+-]\d+\.\d\d"
    assert re.fullmatch(number, row[2])
    assert all(re.fullmatch(rf"\[{number}, {number}\]", column) for column in row[3:5])
    assert row[6:] == ["6", "above zero"]


def test_curves_hold_each_place_on_the_axis(full_report):
    text = full_report.read_text()
    assert _row(text, "digits; labels per class:")[1:] == ["1", "4"]
    assert _row(text, "digits, 10 % labeled; share of wrong labels:")[1:] == ["0", "0.3"]
    values = [100 * make_cell("full", fold, 0, noise=0.3)["answers"]["transductive"]["accuracy"] for fold in range(2)]
    found = [line for line in text.splitlines() if line.startswith("| full: transductive") and line.count("|") == 4][1]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} (2)" in found


def test_further_conditions_are_in_a_file_of_their_own(full_report):
    assert "[details](details.md)" in full_report.read_text()
    details = (full_report.parent / "details.md").read_text()
    headings = [line for line in details.splitlines() if line.startswith("## ")]
    assert headings == [
        "## digits, 1 per class labeled",
        "## digits, 4 per class labeled",
        "## digits, 10 % labeled, 30 % of them wrong",
    ]


def test_every_picture_is_a_file_that_is_shown(full_report):
    shown = set(re.findall(r"\]\((\S+\.png)\)", full_report.read_text()))
    files = {path.name for path in full_report.parent.glob("*.png")}
    assert shown == files
    assert files >= {"contrasts.png", "labels.png", "noise.png", "ranking.png", "gradient.png", "confusion-digits.png"}
    for name in files:
        with Image.open(full_report.parent / name) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


# --- partial grids ----------------------------------------------------------------------------------------------------


def test_a_partial_grid_names_its_gaps(tmp_path):
    cells = [cell for cell in _grid() if (cell["arm"], cell["budget"], cell["fold"]) != ("full", "10%", 2)]
    text = write_report(cells, tmp_path, num_samples=50).read_text()
    assert "2 are missing" in text
    assert "this report is partial" in text
    assert _row(text, "digits, 10 % labeled", "full", "seed 0: folds 2; seed 1: folds 2")[3:] == ["4", "2"]
    assert _row(text, "**fixed graph, mix**", "accuracy, transductive")[6] == "4"


def test_gaps_are_those_of_the_plan_where_there_is_one(tmp_path):
    cells = [make_cell(arm, 0) for arm in ("full", "ce")]
    planned = [make_cell(arm, fold) for arm in ("full", "ce", "random") for fold in range(2)]
    text = write_report(
        cells, tmp_path, planned=[*planned, planned[0] | {"stage": "choose"}], num_samples=50
    ).read_text()
    assert "4 are missing" in text
    assert _row(text, "digits, 10 % labeled", "random")[2:] == ["seed 0: folds 0, 1", "0", "2"]


def test_one_cell_is_a_report(tmp_path):
    bare = {name: value for name, value in make_cell("full").items() if name not in {"curve", "confusion", "ranking"}}
    text = write_report([bare], tmp_path).read_text()
    assert "share no fold and seed yet" in text
    assert not list(tmp_path.glob("*.png"))


def test_values_that_a_cell_lacks_are_dashes(tmp_path):
    cell = make_cell("full")
    cell["answers"]["transductive"]["nll"] = None
    assert _row(write_report([cell], tmp_path).read_text(), "full: transductive", "1")[4] == "–"


def test_other_stages_and_superseded_settings_stay_out_and_are_counted(tmp_path):
    old, new = make_cell("full", settings={"steps": 1}), make_cell("full", settings={"steps": 2}, seconds=99.0)
    text = write_report([old, new, make_cell("ce", stage="choose")], tmp_path).read_text()
    assert "Left out, as a later one differs in settings alone: 1." in text
    assert _row(text, "full", "1")[-2] == "99"
    assert _row(text, "full", '`{"steps": 2}`')
    with pytest.raises(ValueError, match="stage 'test'"):
        write_report([make_cell("ce", stage="choose")], tmp_path)


def test_tables_are_markdown():
    assert table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert spread([0.5, 0.7, None], 100, 1) == "60.0 ± 14.1"
    assert spread([0.5], 100, 1) == "50.0"
    assert spread([None]) == "–"
