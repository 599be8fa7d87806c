"""How good the answers are and how well they know it: `evaluate` metrics that need no network and leave no files."""

import tempfile
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score

UNLABELED = -100
NUM_BINS = 15  # Guo et al. 2017

_CLASS = datasets.Value("int64")


class Accuracy(evaluate.Metric):
    r"""
    Share of images whose predicted class is their own: $\frac{1}{N} \sum_i [\hat y_i = y_i]$.

    Source: [`sklearn.metrics.accuracy_score`].
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of images whose predicted class is their own.",
            citation="",
            inputs_description="predictions, references: class per image",
            features=datasets.Features({"predictions": _CLASS, "references": _CLASS}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    r"""
    Mean over classes of $F_1 = \frac{2 \mathrm{TP}}{2 \mathrm{TP} + \mathrm{FP} + \mathrm{FN}}$, each class alike.

    The mean runs over the classes that occur among references or predictions: a class never asked for and never
    answered does not count. Source: [`sklearn.metrics.f1_score`] with `average="macro"`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Unweighted mean of the F1 scores of the classes.",
            citation="",
            inputs_description="predictions, references: class per image",
            features=datasets.Features({"predictions": _CLASS, "references": _CLASS}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class ExpectedCalibrationError(evaluate.Metric):
    r"""
    Distance between confidence and accuracy: $\sum_m \frac{|B_m|}{N} |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|$.

    $B_m$ holds the images whose top-1 probability lies in $((m - 1) / M, m / M]$, with M = 15 bins; acc is the share of
    them answered rightly, conf their mean top-1 probability. Source: Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017, equation 3.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Expected calibration error of the top-1 probability in 15 bins of equal width.",
            citation="Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017.",
            inputs_description="predictions, references: class per image; confidences: probability of the prediction",
            features=datasets.Features(
                {"predictions": _CLASS, "references": _CLASS, "confidences": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], confidences: list[float]) -> dict[str, float]:
        right = np.equal(predictions, references)
        confidences = np.array(confidences)
        inner_edges = np.arange(1, NUM_BINS) / NUM_BINS
        bins = np.digitize(confidences, inner_edges, right=True)
        # |B| |acc(B) - conf(B)| = |sum over B of (right - confidence)|
        gaps = np.bincount(bins, weights=right - confidences, minlength=NUM_BINS)
        return {"ece": float(np.abs(gaps).sum() / len(references))}


class NeighborHomophily(evaluate.Metric):
    r"""
    Share of a query's neighbors that carry its class: the mean over queries i of
    $|\{j \in N(i): y_j = y_i\}| / |N(i)|$, where N(i) are its neighbors of known class.

    Neighbors of unknown class (-100) and queries without a neighbor of known class are left out. Where no query has
    one, there is no homophily: the result is empty, as neither 0 nor NaN would be true (or JSON).
    Source: node homophily, Pei et al., "Geom-GCN", ICLR 2020, restricted to known classes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of a query's neighbors of known class that carry the query's class, mean over queries.",
            citation="Pei, Wei, Chang, Lei, Yang. Geom-GCN: Geometric Graph Convolutional Networks. ICLR 2020.",
            inputs_description="references: class per image; neighbor_classes: per image the classes of its neighbors",
            features=datasets.Features({"references": _CLASS, "neighbor_classes": datasets.List(_CLASS)}),
        )

    def _compute(self, references: list[int], neighbor_classes: list[list[int]]) -> dict[str, float]:
        shares = []
        for reference, neighbors in zip(references, neighbor_classes, strict=True):
            known = [neighbor for neighbor in neighbors if neighbor != UNLABELED]
            if known:
                shares.append(known.count(reference) / len(known))
        return {"neighbor_homophily": float(np.mean(shares))} if shares else {}


def _to_numpy(values: torch.Tensor | np.ndarray | Sequence, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()  # NumPy has no bfloat16
    return np.asarray(values).astype(dtype)


def classification_metrics(
    log_probabilities: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray,
    neighbor_classes: torch.Tensor | np.ndarray | None = None,
) -> dict[str, float]:
    """
    `accuracy`, `macro_f1`, `ece` and, where neighbors of known class are given, `neighbor_homophily`.

    Args:
        log_probabilities (`torch.Tensor` or `np.ndarray` of shape `(N, C)`): the model's answers.
        labels (same, of shape `(N,)`): true classes; rows labeled -100 are left out.
        neighbor_classes (same, of shape `(N, k)`, *optional*): class of each neighbor, -100 where unknown.

    Raises:
        ValueError: if no row is labeled, shapes or classes do not fit, or an answer is NaN.
    """
    log_probabilities, labels = _to_numpy(log_probabilities, np.float64), _to_numpy(labels, np.int64)
    if log_probabilities.ndim != 2 or labels.shape != log_probabilities.shape[:1]:
        raise ValueError(
            f"log_probabilities {log_probabilities.shape} and labels {labels.shape} do not fit:"
            " pass one row of C log-probabilities and one label per image."
        )
    N, C = log_probabilities.shape
    labeled = labels != UNLABELED
    if not labeled.any():
        raise ValueError(f"None of the {N} images is labeled (all -100): metrics need images of known class.")
    if labels[labeled].min() < 0 or labels[labeled].max() >= C:
        raise ValueError(
            f"labels run from {labels[labeled].min()} to {labels[labeled].max()}, but there are {C} classes:"
            f" use 0 to {C - 1}, and -100 for unlabeled images."
        )
    log_probabilities, labels = log_probabilities[labeled], labels[labeled]
    if np.isnan(log_probabilities).any():
        raise ValueError(
            f"{int(np.isnan(log_probabilities).any(axis=1).sum())} of {len(labels)} answers are NaN: the model has"
            " diverged. Lower the learning rates or raise the temperature, and check the images."
        )

    columns = {
        "predictions": log_probabilities.argmax(axis=1),
        "references": labels,
        "confidences": np.exp(log_probabilities.max(axis=1)),
    }
    metrics = [Accuracy, MacroF1, ExpectedCalibrationError]
    if neighbor_classes is not None:
        neighbor_classes = _to_numpy(neighbor_classes, np.int64)
        if neighbor_classes.ndim != 2 or len(neighbor_classes) != N:
            raise ValueError(f"neighbor_classes {neighbor_classes.shape} must hold one row per image: ({N}, k).")
        columns["neighbor_classes"] = neighbor_classes[labeled]
        metrics.append(NeighborHomophily)

    # evaluate makes an empty folder per metric even when all data stays in memory
    with tempfile.TemporaryDirectory(prefix="bpgcn-metrics-") as folder:
        combined = evaluate.combine([metric(keep_in_memory=True, cache_dir=folder) for metric in metrics])
        combined.add_batch(**columns)
        return combined.compute()
