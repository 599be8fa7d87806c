"""Contrasts: differences of known size come out with intervals, pair by pair, from the cells that both arms have."""

import numpy as np
import pytest

from modeling_bpgcn.analysis.bootstrap import Interval
from modeling_bpgcn.analysis.evidence_cells import Condition, group_cells, pack_bits, unpack_bits
from modeling_bpgcn.analysis.evidence_contrasts import DETACHED, MEASURES, PRIMARY, SECONDARY, Contrast, contrast_all
from tests.analysis.evidence_factory import ACCURACY, make_cell

CONDITION = Condition("digits", "10%", 0.0)


def _contrasts(cells, **options):
    found = contrast_all(group_cells(cells)[CONDITION], **({"num_samples": 300} | options))
    return {(contrast.rival.name, contrast.measure): contrast for contrast in found}


def _grid(arms=tuple(ACCURACY), folds=range(4), seeds=range(2), **changes):
    return [make_cell(arm, fold, seed, **changes) for arm in arms for fold in folds for seed in seeds]


def test_every_rival_is_compared_both_ways_and_detached_in_rankings_too():
    found = _contrasts(_grid())
    assert len(found) == 2 * len(PRIMARY + SECONDARY) + 2
    assert {measure for name, measure in found if name == DETACHED.name} == set(MEASURES)
    assert {contrast.pairs for contrast in found.values()} == {8}


def test_a_difference_is_the_mean_over_cells_of_the_difference_of_accuracies():
    cells = _grid(("full", "ce"))
    contrast = _contrasts(cells)["CE fine-tuning, linear", "inductive"]
    own, other = ([cell for cell in cells if cell["arm"] == arm] for arm in ("full", "ce"))
    gaps = [
        a["answers"]["inductive"]["accuracy"] - b["answers"]["inductive_linear"]["accuracy"]
        for a, b in zip(own, other, strict=True)
    ]
    assert abs(np.mean(gaps)) > 0.02
    assert contrast.images.mean == pytest.approx(np.mean(gaps))
    assert contrast.images.low < np.mean(gaps) < contrast.images.high


def test_known_differences_are_found_and_none_is_made_up():
    found = _contrasts(_grid(folds=range(8)), num_samples=2000)
    assert found["random edges (placebo)", "transductive"].verdict == "above zero"
    assert found["fixed graph, mix", "transductive"].verdict == "above zero"
    assert found[DETACHED.name, "homophily"].verdict == "above zero"
    assert found["two-stage after neighborhood loss, mix", "transductive"].verdict == "not above zero"  # both at 0.82


def test_only_cells_that_both_arms_have_are_paired():
    cells = [*_grid(("full",), folds=(0, 1), seeds=(0,)), *_grid(("detached",), folds=(1, 2), seeds=(0, 1))]
    contrast = _contrasts(cells)[DETACHED.name, "transductive"]
    assert contrast.pairs == 1
    assert contrast.folds is None  # one fold says nothing about folds
    assert not _contrasts(_grid(("full",)))


def test_an_answer_that_one_cell_lacks_costs_that_pair():
    cells = _grid(("full", "frozen"))
    del cells[-1]["answers"]["mix"]
    found = _contrasts(cells)
    assert found["fixed graph, mix", "transductive"].pairs == 7
    assert found["fixed graph, GCN", "transductive"].pairs == 8


def test_images_are_paired_across_folds_where_cells_name_them():
    named, unnamed = _grid(("full", "detached")), _grid(("full", "detached"), tested=False)
    for cells in (named, unnamed):
        for cell in cells:  # what an image does, it does in every fold
            answer = "transductive"
            mask = np.arange(400) % 10 != cell["fold"]
            right = np.arange(400) % (3 if cell["arm"] == "full" else 4) > 0
            cell["answers"][answer]["correct"] = pack_bits(right[mask])
    widths = [
        interval.high - interval.low
        for interval in (_contrasts(cells)[DETACHED.name, "transductive"].images for cells in (named, unnamed))
    ]
    assert widths[0] > 1.5 * widths[1]


def test_different_test_images_are_refused():
    cells = _grid(("full", "detached"), folds=(0,))
    answer = cells[0]["answers"]["transductive"]
    answer["correct"] = pack_bits(unpack_bits(answer["correct"])[:-1])
    with pytest.raises(ValueError, match=r"359 and 360 images for transductive \(fold 0, seed 0\)"):
        _contrasts(cells)


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.01, 0.03), "above zero"),
        ((-0.01, 0.03), "not above zero"),
        ((0, 0), "not above zero"),
        ((-2, -1), "below zero"),
    ],
)
def test_the_verdict_goes_by_the_wider_interval(ends, verdict):
    clear, wide = Interval(0.02, 0.01, 0.03, 1.0), Interval(0.02, *ends, 0.9)
    assert Contrast(DETACHED, "transductive", 3, clear, wide).verdict == verdict
    assert Contrast(DETACHED, "transductive", 3, wide, None).verdict == verdict
