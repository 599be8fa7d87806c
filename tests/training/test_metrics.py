"""Metrics against sklearn, loops and cases small enough to work out by hand; offline, without files."""

import json
import math
import socket

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from modeling_bpgcn.training.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    MacroF1,
    NeighborHomophily,
    classification_metrics,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a metric asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _answers(N=200, C=5, k=7):
    generator = torch.Generator().manual_seed(1)
    log_probabilities = torch.randn(N, C, generator=generator).mul(2).log_softmax(-1)
    labels = torch.randint(C, (N,), generator=generator)
    labels[: N // 2] = log_probabilities[: N // 2].argmax(-1)  # better than chance
    labels[::7] = -100
    neighbor_classes = torch.randint(-1, C, (N, k), generator=generator)
    neighbor_classes[neighbor_classes == -1] = -100
    return log_probabilities, labels, neighbor_classes


def _ece_by_loop(probabilities, labels, num_bins=15):
    total = 0.0
    for m in range(1, num_bins + 1):
        inside = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if (m - 1) / num_bins < max(row) <= m / num_bins
        ]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def test_agrees_with_sklearn_and_with_loops():
    log_probabilities, labels, neighbor_classes = _answers()
    metrics = classification_metrics(log_probabilities, labels, neighbor_classes)
    assert set(metrics) == {"accuracy", "macro_f1", "ece", "neighbor_homophily"}

    known = labels != -100
    assert 0 < known.sum() < len(labels)
    truth, answers = labels[known].tolist(), log_probabilities[known].argmax(-1).tolist()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, answers))
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, answers, average="macro"))
    assert 0.3 < metrics["accuracy"] < 0.9

    probabilities = log_probabilities[known].double().exp().tolist()
    assert metrics["ece"] == pytest.approx(_ece_by_loop(probabilities, truth), abs=1e-12)
    assert metrics["ece"] > 0.01

    shares = []
    for label, neighbors in zip(truth, neighbor_classes[known].tolist(), strict=True):
        classes = [c for c in neighbors if c != -100]
        if classes:
            shares.append(sum(c == label for c in classes) / len(classes))
    assert metrics["neighbor_homophily"] == pytest.approx(sum(shares) / len(shares))


def test_numpy_bfloat16_and_float32_answers_are_welcome():
    log_probabilities, labels, neighbor_classes = _answers()
    expected = classification_metrics(log_probabilities, labels, neighbor_classes)
    arrays = (log_probabilities.numpy(), labels.numpy(), neighbor_classes.numpy())
    assert classification_metrics(*arrays) == expected
    half = classification_metrics(log_probabilities.bfloat16().requires_grad_(), labels, neighbor_classes)
    assert half["accuracy"] == pytest.approx(expected["accuracy"], abs=0.02)


def test_perfect_and_sure():
    labels = np.array([0, 1, 2])
    log_probabilities = np.log(np.eye(3) + 1e-300)
    metrics = classification_metrics(log_probabilities, labels, np.array([[0, 0], [1, -100], [2, 2]]))
    assert metrics == pytest.approx({"accuracy": 1.0, "macro_f1": 1.0, "ece": 0.0, "neighbor_homophily": 1.0})


def test_metrics_survive_json():
    metrics = classification_metrics(*_answers())
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert all(type(value) is float for value in metrics.values())


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    # Bin (12/15, 13/15]: two answers of 0.85, one right: |1/2 - 0.85| = 0.35, weight 2/3.
    # Bin (14/15, 1]: one answer of 1.0, wrong: gap 1, weight 1/3.
    metric = ExpectedCalibrationError(keep_in_memory=True)
    result = metric.compute(predictions=[0, 0, 0], references=[0, 1, 1], confidences=[0.85, 0.85, 1.0])
    assert result["ece"] == pytest.approx(2 / 3 * 0.35 + 1 / 3)


def test_a_bin_holds_its_upper_edge():
    # 0.2 = 3/15 belongs to the third bin with 0.15, not to the fourth with 0.22; each bin averages before the distance.
    metric = ExpectedCalibrationError(keep_in_memory=True)
    shared = metric.compute(predictions=[0, 1], references=[0, 0], confidences=[3 / 15, 0.15])["ece"]
    apart = metric.compute(predictions=[0, 1], references=[0, 0], confidences=[3 / 15, 0.22])["ece"]
    assert shared == pytest.approx(abs(0.5 - 0.175))
    assert apart == pytest.approx((0.8 + 0.22) / 2)


# --- F1 ---------------------------------------------------------------------------------------------------------------


def test_macro_f1_weighs_small_classes_like_large_ones():
    predictions, references = [0] * 9 + [0], [0] * 9 + [1]
    scores = {
        **MacroF1(keep_in_memory=True).compute(predictions=predictions, references=references),
        **Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references),
    }
    assert scores == pytest.approx({"accuracy": 0.9, "macro_f1": (18 / 19 + 0) / 2})


# --- homophily --------------------------------------------------------------------------------------------------------


def test_homophily_counts_known_neighbors_only():
    metric = NeighborHomophily(keep_in_memory=True)
    neighbors = [[0, 1, -100], [1, -100, -100], [-100, -100, -100], [0, 1, 1]]
    result = metric.compute(references=[0, 1, 1, 2], neighbor_classes=neighbors)
    assert result["neighbor_homophily"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_homophily_is_left_out_where_no_neighbor_is_known():
    log_probabilities, labels, neighbor_classes = _answers()
    without = classification_metrics(log_probabilities, labels, torch.full_like(neighbor_classes, -100))
    assert set(without) == {"accuracy", "macro_f1", "ece"}
    assert classification_metrics(log_probabilities, labels) == without


# --- side effects and bad input ---------------------------------------------------------------------------------------


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "cache")
    classification_metrics(*_answers())
    assert not list(tmp_path.iterdir())


def test_the_random_state_is_left_alone():
    np.random.seed(3)  # noqa: NPY002 - the legacy state is the one that evaluate touches
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    classification_metrics(*_answers())
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y, n: (p, torch.full_like(y, -100), n), "None of the 200 images is labeled"),
        (lambda p, y, n: (p, y[:-1], n), r"\(200, 5\) and labels \(199,\) do not fit"),
        (lambda p, y, n: (p, y + 5, n), "there are 5 classes: use 0 to 4"),
        (lambda p, y, n: (p, y, n[:-1]), r"neighbor_classes \(199, 7\) must hold one row per image"),
        (lambda p, y, n: (p.index_fill(0, torch.tensor([1, 2]), math.nan), y, n), "2 of 171 answers are NaN"),
    ],
)
def test_bad_input_is_named_with_its_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(*change(*_answers()))
