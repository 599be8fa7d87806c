"""Differences between the full method and its rivals, pair by pair of cells on the same test images."""

from typing import NamedTuple

import numpy as np

from .bootstrap import Interval, paired_bootstrap
from .evidence_cells import unpack_bits, unpack_floats

END_TO_END = ("uniform", "detached", "ranking_only", "random")  # rivals that answer as the full method does
ACCURACY = ("transductive", "inductive")
RANKING = ("homophily", "map")
MEASURES = (*ACCURACY, *RANKING)


class Rival(NamedTuple):
    """What the full method is compared with."""

    name: str
    arm: str
    answer: str  # to the tested images of one graph; `inductive_` in front for the held-out fold
    measures: tuple[str, ...] = ACCURACY


DETACHED = Rival("detached: no ranking gradient", "detached", "transductive", MEASURES)
# what the claim rests on: the ranking gradient, and the three ways to do without end-to-end training
PRIMARY = (
    DETACHED,
    Rival("two-stage after CE, mix", "ce", "mix"),
    Rival("two-stage after neighborhood loss, mix", "neighborhood", "mix"),
    Rival("fixed graph, mix", "frozen", "mix"),
    Rival("CE fine-tuning, linear", "ce", "linear"),
)
SECONDARY = (
    Rival("two-stage after CE, GCN", "ce", "gcn"),
    Rival("two-stage after CE, LP", "ce", "lp"),
    Rival("two-stage after neighborhood loss, GCN", "neighborhood", "gcn"),
    Rival("two-stage after neighborhood loss, LP", "neighborhood", "lp"),
    Rival("fixed graph, GCN", "frozen", "gcn"),
    Rival("fixed graph, LP", "frozen", "lp"),
    Rival("fixed graph, GCN, equal weights", "frozen", "gcn_uniform"),
    Rival("frozen, logistic regression", "frozen", "logistic"),
    Rival("uniform: equal weights", "uniform", "transductive"),
    Rival("ranking path only", "ranking_only", "transductive"),
    Rival("random edges (placebo)", "random", "transductive"),
)


class Contrast(NamedTuple):
    """Full minus a rival under one condition, as a share (0.01 is a percentage point)."""

    rival: Rival
    measure: str
    pairs: int
    images: Interval  # images resampled
    folds: Interval | None  # folds and images resampled; None where all pairs are of one fold

    @property
    def verdict(self) -> str:
        """Where the wider interval at hand lies."""
        interval = self.folds or self.images
        if interval.low > 0:
            return "above zero"
        return "below zero" if interval.high < 0 else "not above zero"


def contrast_all(arms: dict[str, dict[tuple[int, int], dict]], num_samples: int = 10_000) -> list[Contrast]:
    """
    Every contrast of one condition that has at least one pair, by measure, the primary ones first.

    Args:
        arms: arm -> (fold, seed) -> cell, as `group_cells` gives for a condition.
        num_samples: of the bootstrap.

    Raises:
        ValueError: if two cells of a pair were scored on different numbers of images.
    """
    rivals = [(measure, rival) for measure in MEASURES for rival in (*PRIMARY, *SECONDARY) if measure in rival.measures]
    found = (_contrast(arms, rival, measure, num_samples) for measure, rival in rivals)
    return [contrast for contrast in found if contrast is not None]


def _contrast(arms: dict, rival: Rival, measure: str, num_samples: int) -> Contrast | None:
    own, other = arms.get("full", {}), arms.get(rival.arm, {})
    differences, images = {}, {}
    for place in own.keys() & other.keys():
        values = _values(own[place], measure, measure), _values(other[place], measure, _rival_answer(rival, measure))
        if values[0] is None or values[1] is None:
            continue
        if len(values[0]) != len(values[1]):
            raise ValueError(
                f"full and {rival.arm} were scored on {len(values[0])} and {len(values[1])} images for {measure} (fold"
                f" {place[0]}, seed {place[1]}): run both on the same split."
            )
        differences[place] = values[0] - values[1]
        images[place] = _image_ids(own[place], measure)
    if not differences:
        return None
    places = sorted(differences)
    folds, seeds = zip(*places, strict=True)
    ids = None if any(images[place] is None for place in places) else [images[place] for place in places]
    arguments = [differences[place] for place in places], folds, seeds, ids
    wider = None
    if len(set(folds)) > 1:
        wider = paired_bootstrap(*arguments, resample_folds=True, num_samples=num_samples)
    return Contrast(rival, measure, len(places), paired_bootstrap(*arguments, num_samples=num_samples), wider)


def _rival_answer(rival: Rival, measure: str) -> str:
    if measure != "inductive":
        return rival.answer
    return "inductive" if rival.arm in END_TO_END else f"inductive_{rival.answer}"


def _values(cell: dict, measure: str, answer: str) -> np.ndarray | None:
    """[num_images] of a measure, None where the cell does not hold it."""
    if measure in RANKING:
        packed = cell.get("ranking", {}).get("after", {}).get(f"{measure}_per_image")
        return None if packed is None else unpack_floats(packed)
    packed = cell.get("answers", {}).get(answer, {}).get("correct")
    return None if packed is None else unpack_bits(packed).astype(np.float64)


def _image_ids(cell: dict, measure: str) -> np.ndarray | None:
    """Rows of the data set that a measure was taken on, None where the cell does not say."""
    packed = cell.get("tested", {}).get("inductive" if measure == "inductive" else "transductive")
    return None if packed is None else np.flatnonzero(unpack_bits(packed))
