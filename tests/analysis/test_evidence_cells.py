"""Cells of the evidence benchmark: what is written is read back, also after a killed run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_bpgcn.analysis.evidence_cells import (
    ARMS,
    Condition,
    append_cell,
    cell_key,
    group_cells,
    in_order,
    pack_bits,
    pack_floats,
    read_cells,
    unpack_bits,
    unpack_floats,
)

CELL = {
    "arm": "full",
    "data": "digits",
    "fold": 0,
    "seed": 1,
    "budget": "10%",
    "noise": 0.0,
    "stage": "test",
    "settings": {"learning_rate": 1e-4, "steps": 30},
}


@given(st.lists(st.booleans()))
def test_bits_come_back(values):
    assert unpack_bits(pack_bits(values)).tolist() == values


@given(st.lists(st.floats(0, 1)))
def test_shares_come_back_to_three_digits(values):
    np.testing.assert_allclose(unpack_floats(pack_floats(values)), values, atol=3e-4)


def test_an_undefined_share_stays_undefined():
    assert math.isnan(unpack_floats(pack_floats([math.nan]))[0])


@pytest.mark.parametrize(
    ("unpack", "text"), [(unpack_bits, "9:/w=="), (unpack_floats, "3:AAA="), (unpack_bits, "/w==")]
)
def test_a_damaged_array_is_refused(unpack, text):
    with pytest.raises(ValueError, match=r"damaged|length"):
        unpack(text)


def test_cells_come_back_in_order_and_the_last_of_a_key_counts(tmp_path):
    file = tmp_path / "new" / "cells.jsonl"
    for cell in (CELL | {"seconds": 1.0}, CELL | {"fold": 1}, CELL | {"seconds": 2.0}):
        append_cell(file, cell)
    assert read_cells(file) == [CELL | {"fold": 1}, CELL | {"seconds": 2.0}]
    append_cell(tmp_path / "other.jsonl", CELL | {"seed": 5})
    assert [cell["seed"] for cell in read_cells(file, tmp_path / "other.jsonl")] == [1, 1, 5]


def test_a_torn_line_costs_its_own_cell_only(tmp_path, caplog):
    file = tmp_path / "cells.jsonl"
    append_cell(file, CELL)
    with file.open("a") as stream:
        stream.write(json.dumps(CELL | {"fold": 1})[:40])
    assert read_cells(file) == [CELL]
    append_cell(file, CELL | {"fold": 2})
    assert read_cells(file) == [CELL, CELL | {"fold": 2}]
    assert "cells.jsonl:2 is torn" in caplog.text


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    file = tmp_path / "cells.jsonl"
    append_cell(
        file, CELL | {"answers": {"head": {"nll": math.inf, "accuracy": np.float32(0.5)}}, "curve": (math.nan,)}
    )
    [cell] = read_cells(file)
    assert cell["answers"] == {"head": {"nll": None, "accuracy": 0.5}}
    assert cell["curve"] == [None]


def test_the_key_tells_settings_apart_and_survives_json():
    key = cell_key(CELL)
    assert key[:-1] == ("test", "full", "digits", 0, 1, "10%", 0.0)
    assert key == cell_key(json.loads(json.dumps(CELL | {"answers": {}})))
    assert key == cell_key(CELL | {"settings": {"steps": 30, "learning_rate": np.float64(1e-4)}})
    assert key != cell_key(CELL | {"settings": {"steps": 31, "learning_rate": 1e-4}})


@pytest.mark.parametrize("missing", ["arm", "settings"])
def test_a_cell_that_does_not_say_what_it_is_is_refused(tmp_path, missing):
    cell = {name: value for name, value in CELL.items() if name != missing}
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        append_cell(tmp_path / "cells.jsonl", cell)
    (tmp_path / "cells.jsonl").write_text(json.dumps(cell) + "\n")
    with pytest.raises(ValueError, match=rf"cells.jsonl:1 lacks {missing}"):
        read_cells(tmp_path / "cells.jsonl")


# --- order ------------------------------------------------------------------------------------------------------------


def test_cells_are_grouped_in_the_order_of_a_report():
    cells = [
        CELL | changes
        for changes in (
            {"noise": 0.3},
            {"budget": "8"},
            {"budget": 2},
            {"fold": 1},
            {},
            {"arm": "own idea"},
            {"arm": "frozen"},
            {"data": "a"},
            {"stage": "choose", "data": "b"},
        )
    ]
    groups = group_cells(cells)
    assert [str(condition) for condition in groups] == [
        "a, 10 % labeled",
        "digits, 10 % labeled",
        "digits, 2 per class labeled",
        "digits, 8 per class labeled",
        "digits, 10 % labeled, 30 % of them wrong",
    ]
    arms = groups[Condition("digits", "10%", 0.0)]
    assert list(arms) == ["frozen", "full", "own idea"]
    assert list(arms["full"]) == [(0, 1), (1, 1)]


def test_of_cells_that_differ_in_settings_alone_the_last_counts():
    later = CELL | {"settings": {"steps": 60}}
    assert group_cells([CELL, later])[Condition("digits", "10%", 0.0)]["full"] == {(0, 1): later}


def test_known_names_come_first():
    assert in_order({"zeta", "full", "alpha", "ce"}, ARMS) == ["ce", "full", "alpha", "zeta"]
