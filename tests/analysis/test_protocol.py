"""Who is labelled and who is tested, for every fold, budget and level of noise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bpgcn.analysis.protocol import NUM_FOLDS, UNKNOWN, make_split

CLASSES = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (30, 40, 50, 80)))
folds = st.integers(0, NUM_FOLDS - 1)


@settings(max_examples=40, deadline=None)
@given(
    fold=folds,
    seed=st.integers(0, 5),
    budget=st.sampled_from(["10%", "1", "2"]),
    stage=st.sampled_from(["test", "choose"]),
)
def test_no_image_is_labelled_and_scored_and_visible_classes_are_true(fold, seed, budget, stage):
    split = make_split(CLASSES, fold=fold, seed=seed, budget=budget, stage=stage)
    labeled = (split.visible != UNKNOWN).nonzero()[:, 0]
    assert len(labeled) > 0
    assert not torch.isin(split.scored, labeled).any()
    assert not torch.isin(split.held_out, labeled).any()
    assert torch.isin(labeled, split.graph).all()
    assert np.array_equal(split.visible[labeled].numpy(), CLASSES[labeled])


@pytest.mark.parametrize("fold", range(NUM_FOLDS))
def test_nine_folds_are_scored_and_one_of_them_is_out_of_the_graph(fold):
    split = make_split(CLASSES, fold=fold, seed=0)
    assert len(split.scored) == 180
    assert len(split.held_out) == 20
    assert torch.isin(split.held_out, split.scored).all()
    assert not torch.isin(split.held_out, split.graph).any()
    assert len(split.graph) + len(split.held_out) == len(CLASSES)


def test_folds_share_no_label_and_cover_all_images():
    labeled = [
        set((make_split(CLASSES, fold=f, seed=0).visible != UNKNOWN).nonzero()[:, 0].tolist()) for f in range(10)
    ]
    assert sorted(row for rows in labeled for row in rows) == list(range(len(CLASSES)))


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_counts_images_of_each_class_and_smaller_ones_are_nested(budget):
    visible = make_split(CLASSES, fold=2, seed=1, budget=str(budget)).visible
    assert torch.bincount(visible[visible >= 0]).tolist() == [budget] * 4
    larger = make_split(CLASSES, fold=2, seed=1, budget=str(budget + 1)).visible
    assert (larger[visible >= 0] >= 0).all()


def test_choosing_sees_the_labelled_fold_alone():
    split, whole = (make_split(CLASSES, fold=3, seed=0, stage=stage) for stage in ("choose", "test"))
    fold = (whole.visible != UNKNOWN).nonzero()[:, 0]
    assert torch.equal(split.known, fold)
    assert torch.equal(torch.cat([split.scored, (split.visible != UNKNOWN).nonzero()[:, 0]]).sort().values, fold)
    assert torch.equal(whole.known, torch.arange(len(CLASSES)))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_noise_replaces_so_many_labels_by_another_class(share):
    clean, noisy = (make_split(CLASSES, fold=0, seed=4, noise=noise).visible for noise in (0.0, share))
    labeled = clean >= 0
    assert torch.equal(labeled, noisy >= 0)
    assert int((clean != noisy).sum()) == round(share * int(labeled.sum()))
    assert int(noisy.max()) < 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fold": 10}, "fold=10 must be 0 to 9"),
        ({"budget": "0"}, "budget='0' must be '10%' or a number of images per class"),
        ({"budget": "5 %"}, "budget='5 %' must be"),
        ({"noise": 1.0}, "noise=1.0 must be at least 0 and below 1"),
        ({"stage": "train"}, "stage='train' is unknown: choose one of choose, test"),
    ],
)
def test_wrong_splits_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_split(CLASSES, **({"fold": 0, "seed": 0} | fields))
