"""A cell of the evidence benchmark, on real files: every arm answers, and no test class reaches it."""

import dataclasses

import numpy as np
import pytest
import torch

from modeling_bpgcn.analysis.arms import ARMS, END_TO_END
from modeling_bpgcn.analysis.evidence_cells import unpack_bits
from modeling_bpgcn.analysis.experiment import read_images, run_cell, train_and_answer
from modeling_bpgcn.analysis.protocol import UNKNOWN, make_split
from tests.analysis.evidence_images import IMAGES_PER_CLASS, NUM_CLASSES, write_backbone, write_images

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 24,
    "trainable_blocks": 1,
    "bf16": False,
    "num_neighbors": 4,
    "head_hidden_size": 8,
}
N = NUM_CLASSES * IMAGES_PER_CLASS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    backbone = str(write_backbone(folder / "backbone"))
    images = read_images(str(write_images(folder / "images")), backbone, 8, 1, folder / "cache")
    return images, backbone


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_answers_every_image_and_is_scored_on_the_tested_ones(place, arm):
    images, backbone = place
    split = make_split(images.classes, fold=0, seed=0)
    cell = run_cell(images, backbone, split, arm, 0, SETTINGS, trace=arm == "full")
    main = "transductive" if arm in END_TO_END else "mix"
    assert {main, f"inductive_{main}" if main == "mix" else "inductive"} <= set(cell["answers"])
    tested = {name: unpack_bits(mask) for name, mask in cell["tested"].items()}
    assert np.array_equal(np.flatnonzero(tested["transductive"]), split.scored.numpy())
    assert np.array_equal(np.flatnonzero(tested["inductive"]), split.held_out.numpy())
    for name, answer in cell["answers"].items():
        right = unpack_bits(answer["correct"])
        assert len(right) == tested["inductive" if name.startswith("inductive") else "transductive"].sum()
        assert answer["accuracy"] == pytest.approx(right.mean())
        assert np.isfinite(answer["nll"])
    table = np.array(cell["confusion"])
    assert table.sum(1).tolist() == np.bincount(images.classes[split.scored]).tolist()
    assert table.trace() / table.sum() == pytest.approx(cell["answers"][main]["accuracy"])
    steps = [point["step"] for point in cell["curve"] if "loss" in point]
    assert steps == ([] if arm == "frozen" else [1, 2, 3])
    assert any("edge_churn" in point for point in cell["curve"]) == (arm == "full")


@pytest.mark.parametrize("arm", ["full", "ce", "frozen"])
def test_classes_of_unlabelled_images_change_no_answer(place, arm):
    images, backbone = place
    split = make_split(images.classes, fold=1, seed=0)
    hidden = (split.visible == UNKNOWN).nonzero()[:, 0].numpy()
    shuffled = images.classes.copy()
    shuffled[hidden] = np.random.default_rng(0).permutation(shuffled[hidden])
    assert (shuffled != images.classes).any()
    other = dataclasses.replace(images, classes=shuffled)
    one, two = (train_and_answer(given, backbone, split, arm, 0, SETTINGS, trace=True) for given in (images, other))
    assert torch.equal(one[1], two[1])  # the features of the trained model
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_labels_do_change_the_answers(place):
    images, backbone = place
    split = make_split(images.classes, fold=1, seed=0)
    wrong = torch.where(split.visible >= 0, (split.visible + 1) % NUM_CLASSES, split.visible)
    one, two = (
        train_and_answer(images, backbone, dataclasses.replace(split, visible=visible), "full", 0, SETTINGS)
        for visible in (split.visible, wrong)
    )
    assert not torch.equal(one[1], two[1])


def test_a_cell_repeats_itself_traced_or_not(place):
    images, backbone = place
    split = make_split(images.classes, fold=2, seed=3)
    one, two = (train_and_answer(images, backbone, split, "full", 3, SETTINGS, trace) for trace in (False, True))
    assert torch.equal(one[1], two[1])
    assert torch.equal(one[0]["transductive"], two[0]["transductive"])
    other = train_and_answer(images, backbone, split, "full", 4, SETTINGS)
    assert not torch.equal(one[1], other[1])
