"""Paired bootstrap: the intervals cover what they promise, and no image or fold counts for more than it is."""

import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bpgcn.analysis.bootstrap import paired_bootstrap

FOLDS, SEEDS = [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]
Z = NormalDist().inv_cdf(0.975)


def _cells(seed=0, num_images=400, folds=FOLDS, mean=0.0):
    random = np.random.default_rng(seed)
    return [random.normal(mean, 1, num_images) for _ in folds]


def _width(interval):
    return interval.high - interval.low


# --- what the interval is ---------------------------------------------------------------------------------------------


def test_one_large_cell_gives_the_normal_interval():
    [values] = _cells(num_images=5000, folds=[0], mean=0.3)
    interval = paired_bootstrap([values], [0], [0])
    half = Z * values.std() / 5000**0.5
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_it_equals_a_plain_loop_over_resampled_images():
    cells, ids = _cells(1, 60), [np.arange(60) + 10 * fold for fold in FOLDS]
    random = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = np.bincount(random.integers(80, size=80), minlength=80)
        chosen = np.bincount(random.integers(3, size=3), minlength=3)[FOLDS]
        means.append(
            np.average([np.average(d, weights=drawn[i]) for d, i in zip(cells, ids, strict=True)], weights=chosen)
        )
    interval = paired_bootstrap(cells, FOLDS, SEEDS, ids, resample_folds=True, num_samples=20_000)
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose([interval.low, interval.high], expected, atol=0.06 * (expected[1] - expected[0]))


@pytest.mark.parametrize("resample_folds", [False, True])
def test_no_difference_gives_a_zero_interval(resample_folds):
    zeros = [np.zeros(50)] * 6
    assert paired_bootstrap(zeros, FOLDS, SEEDS, resample_folds=resample_folds) == (0, 0, 0, 0)


@pytest.mark.parametrize("joint", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(joint):
    ids = [np.arange(60)] * 6 if joint else None
    hits = []
    for trial in range(300):
        shared = np.random.default_rng(trial).normal(0, 1, 60) if joint else 0.0  # what an image does in every cell
        cells = [0.2 + shared + noise for noise in _cells(1000 + trial, 60)]
        interval = paired_bootstrap(cells, FOLDS, SEEDS, ids, num_samples=400, level=0.9)
        hits.append(interval.low <= 0.2 <= interval.high)
    assert 0.84 <= np.mean(hits) <= 0.95


def test_fold_noise_is_covered_only_when_folds_are_resampled():
    folds, hits = list(range(12)), {False: [], True: []}
    for trial in range(200):
        noise = np.random.default_rng(trial).normal(0, 0.5, 12)
        cells = [values + own for values, own in zip(_cells(trial, 100, folds), noise, strict=True)]
        for resample_folds in hits:
            interval = paired_bootstrap(cells, folds, [0] * 12, resample_folds=resample_folds, num_samples=300)
            hits[resample_folds].append(interval.low <= 0 <= interval.high)
    assert np.mean(hits[True]) > 0.87
    assert np.mean(hits[False]) < 0.5


# --- pairing ----------------------------------------------------------------------------------------------------------


def test_images_are_drawn_alike_for_all_seeds_of_a_fold():
    [values] = _cells(3, 500, [0])
    alone = paired_bootstrap([values], [0], [0])
    repeated = paired_bootstrap([values] * 4, [0] * 4, range(4))
    opposite = paired_bootstrap([values, -values], [0, 0], [0, 1])
    assert repeated == pytest.approx(alone)  # the same errors four times are no more evidence
    assert _width(opposite) < 1e-6 < _width(alone)


def test_images_are_drawn_alike_for_all_folds_where_ids_are_known():
    [values] = _cells(3, 500, [0])
    alone = paired_bootstrap([values], [0], [0])
    order = np.random.default_rng(0).permutation(500)
    ids = [np.arange(500), order, np.arange(500), order]
    cells = [values[own] for own in ids]
    assert _width(paired_bootstrap(cells, range(4), [0] * 4, ids)) == pytest.approx(_width(alone), rel=1e-4)
    assert _width(paired_bootstrap(cells, range(4), [0] * 4)) == pytest.approx(_width(alone) / 2, rel=0.1)


def test_an_image_without_value_counts_neither_for_nor_against():
    [values] = _cells(2, 300, [0], mean=1.0)
    gaps = np.where(np.arange(300) < 100, np.nan, values)
    assert paired_bootstrap([gaps], [0], [0]).mean == pytest.approx(values[100:].mean())
    assert paired_bootstrap([gaps], [0], [0]).low == pytest.approx(
        paired_bootstrap([values[100:]], [0], [0]).low, abs=0.02
    )


@given(st.floats(-2, 2), st.floats(0.1, 5), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_interval_moves_and_scales_with_the_differences_and_flips_with_the_arms(shift, scale, seed):
    cells = _cells(seed, 40)
    base = paired_bootstrap(cells, FOLDS, SEEDS, num_samples=200)
    moved = paired_bootstrap([shift + scale * cell for cell in cells], FOLDS, SEEDS, num_samples=200)
    assert moved[:3] == pytest.approx([shift + scale * end for end in base[:3]], abs=1e-5)
    flipped = paired_bootstrap([-cell for cell in cells], FOLDS, SEEDS, num_samples=200)
    assert flipped[:3] == pytest.approx([-base.mean, -base.high, -base.low], abs=1e-5)
    assert flipped.probability_above_zero == pytest.approx(1 - base.probability_above_zero)


def test_the_order_of_cells_and_the_clock_change_nothing():
    cells = _cells(4, 50)
    again = paired_bootstrap(cells[::-1], FOLDS[::-1], SEEDS[::-1], resample_folds=True, num_samples=500)
    assert again == pytest.approx(paired_bootstrap(cells, FOLDS, SEEDS, resample_folds=True, num_samples=500))


def test_the_whole_grid_takes_seconds():
    folds, seeds = np.divmod(np.arange(30), 3)
    cells = [np.sign(cell).round() for cell in _cells(0, 1224, folds)]
    started = time.process_time()
    paired_bootstrap(cells, folds, seeds)
    assert time.process_time() - started < 10


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "at least one cell"),
        (([np.zeros(3)], [0, 1], [0]), "one fold and one seed per cell"),
        (([np.zeros(3)] * 2, [0, 0], [1, 1]), "come twice"),
        (([np.zeros(3), np.zeros(4)], [0, 0], [0, 1]), r"fold 0 hold \[3, 4\] images"),
        (([np.zeros((3, 2))], [0], [0]), "num_images"),
        (([np.full(3, np.nan)], [0], [0]), "cell 0"),
        (([np.array([1.0, np.inf])], [0], [0]), "none infinite"),
        (([np.zeros(3)], [0], [0], [np.arange(4)]), "one id per image"),
        (([np.zeros(3)], [0], [0], [np.array([1, 1, 2])]), "twice"),
    ],
)
def test_bad_input_names_itself(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resample_folds": True}, "one fold"), ({"num_samples": 0}, "num"), ({"level": 1}, "level")],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap([np.zeros(3)], [0], [0], **options)
