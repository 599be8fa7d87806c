"""Who is labelled, who is tested: the splits of the evidence benchmark, made before any model sees a class."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

UNKNOWN = -100
NUM_FOLDS = 10
STAGES = ("choose", "test")


@dataclass(frozen=True)
class Split:
    """Rows of a data set of N images, by what they are for.

    `visible` [N] are the classes that training may see (-100 elsewhere), `graph` the rows of the training graph,
    `scored` those answered transductively, in one graph with the labelled ones, and `held_out` those that training
    never saw and that the support bank answers. Scores may use the classes of the rows `known` alone.
    """

    visible: Tensor
    graph: Tensor
    scored: Tensor
    held_out: Tensor
    known: Tensor


def make_split(
    classes: np.ndarray, *, fold: int, seed: int, budget: str = "10%", noise: float = 0.0, stage: str = "test"
) -> Split:
    """One of 10 stratified folds holds the labels; the other nine are unlabelled and tested, one of them held out.

    Args:
        classes: [N] class of each image. All of them draw the folds; only those of fold `fold` reach `visible`.
        fold: which fold is labelled; the next one is held out.
        seed: draws the labelled images of small budgets, the wrong labels and the halves of stage `choose`.
        budget: `10%`, the whole fold, or so many images of each class of it (`4`).
        noise: share of the labels replaced by another class.
        stage: `test`; `choose` hides half of the fold's labels and scores those images in place of the other folds, so
            that choices are made on labelled images alone; they stay nodes of the graph, so nothing is held out.

    Raises:
        ValueError: for a fold, budget, share or stage that does not exist.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is unknown: choose one of {', '.join(STAGES)}.")
    if not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"fold={fold} must be 0 to {NUM_FOLDS - 1}.")
    if not 0 <= noise < 1:
        raise ValueError(f"noise={noise} must be at least 0 and below 1.")
    folds = np.empty(len(classes), dtype=np.int64)
    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    for number, (_, rows) in enumerate(splitter.split(np.zeros(len(classes)), classes)):
        folds[rows] = number
    random = np.random.default_rng((fold, seed))
    own, following = folds == fold, folds == (fold + 1) % NUM_FOLDS
    labeled = _first_of_each_class(classes, np.flatnonzero(own), _images_per_class(budget), random)
    scored, held_out, known = np.flatnonzero(~own), np.flatnonzero(following), np.arange(len(classes))
    if stage == "choose":
        half, known = _first_of_each_class(classes, labeled, 0.5, random), labeled
        labeled = half
        scored = held_out = np.setdiff1d(known, half)
    visible = np.full(len(classes), UNKNOWN, dtype=np.int64)
    visible[labeled] = _with_noise(classes[labeled], int(classes.max()) + 1, noise, random)
    rows = (visible, np.flatnonzero(~following), scored, held_out, known)
    return Split(*map(torch.from_numpy, rows))


def _images_per_class(budget: str) -> float:
    if budget == "10%":
        return 1.0
    if not budget.isdecimal() or int(budget) == 0:
        raise ValueError(f"budget={budget!r} must be '10%' or a number of images per class such as '4'.")
    return int(budget)


def _first_of_each_class(classes: np.ndarray, rows: np.ndarray, count: float, random) -> np.ndarray:
    """So many rows of each class (a float: that share of them, at least one), in random order, sorted."""
    taken = []
    for value in np.unique(classes[rows]):
        own = random.permutation(rows[classes[rows] == value])
        taken.append(own[: count if isinstance(count, int) else max(1, round(count * len(own)))])
    return np.sort(np.concatenate(taken))


def _with_noise(classes: np.ndarray, num_classes: int, share: float, random) -> np.ndarray:
    wrong = random.permutation(len(classes))[: round(share * len(classes))]
    noisy = classes.copy()
    noisy[wrong] = (classes[wrong] + random.integers(1, num_classes, len(wrong))) % num_classes
    return noisy
