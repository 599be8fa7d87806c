"""How sure a difference between two arms is: intervals from resampled test images and folds."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ROWS_AT_ONCE = 512  # bootstrap samples at a time, which bounds the memory


class Interval(NamedTuple):
    """The mean of a difference, the ends of its interval, and the share of bootstrap samples above zero."""

    mean: float
    low: float
    high: float
    probability_above_zero: float


def paired_bootstrap(
    differences: Sequence[np.ndarray],
    folds: Sequence[int],
    seeds: Sequence[int],
    images: Sequence[np.ndarray] | None = None,
    *,
    resample_folds: bool = False,
    num_samples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    r"""
    Percentile interval of the mean over cells of the mean difference between two arms on the same test images.

    A sample draws images with replacement and takes each cell's mean with the counts $v_i$ as weights,
    $m_c = \sum_i v_i d_{ci} / \sum_i v_i$, then the mean over cells. An image keeps its count in every cell that tests
    it, so that what an image does alike in several cells is not counted as so much evidence: across the seeds of a
    fold, and with `images` across folds. With `resample_folds` each sample draws folds with replacement, too, which
    weigh their cells: the training noise that the seeds and images of a fold share then counts as well.

    Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval);
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007 (images and folds resampled independently, which
    errs on the side of wide intervals).

    Args:
        differences: one array `(n_c,)` per cell, arm A - arm B per test image; NaN where an image has no value.
        folds, seeds: of each cell.
        images: one array `(n_c,)` per cell, the id of each test image in its data set. Without it, images of different
            folds are drawn apart, and the cells of a fold must hold the same images in the same order.
        resample_folds: draw folds, too; with few folds (below about 8) even this interval is too narrow.
        num_samples: bootstrap samples.
        level: share of the samples inside the interval.
        seed: of the draws.

    Returns:
        `Interval`, in the units of the differences.

    Raises:
        ValueError: if the cells do not fit together, or folds are to be resampled where there is but one.
    """
    folds = list(folds)
    _check(differences, folds, list(seeds), num_samples, level)
    names, fold_of_cell = np.unique(folds, return_inverse=True)
    if resample_folds and len(names) < 2:
        raise ValueError("All cells are of one fold: resampling folds needs two or more, run further folds.")

    samples = np.empty((num_samples, len(folds)))  # [samples, cells]
    if images is None:
        for fold in range(len(names)):
            cells = np.flatnonzero(fold_of_cell == fold)
            lengths = {len(differences[cell]) for cell in cells}
            if len(lengths) > 1:
                raise ValueError(f"The cells of fold {names[fold]} hold {sorted(lengths)} images: pass `images`.")
            table = np.stack([differences[cell] for cell in cells], axis=1)
            samples[:, cells] = _resampled_means(table, num_samples, (seed, fold))
    else:
        samples = _resampled_means(_align(differences, images), num_samples, (seed, 0))

    if resample_folds:
        drawn = np.random.default_rng((seed, 1)).multinomial(len(names), [1 / len(names)] * len(names), num_samples)
        weights = drawn[:, fold_of_cell]
        samples = (samples * weights).sum(1) / weights.sum(1)
    else:
        samples = samples.mean(1)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    mean = np.mean([np.nanmean(values) for values in differences])
    return Interval(float(mean), float(low), float(high), float((samples > 0).mean()))


def _align(differences: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> np.ndarray:
    """Differences [n, cells] of all images of any cell, NaN where a cell does not test an image."""
    if [len(ids) for ids in images] != [len(values) for values in differences]:
        raise ValueError("images must name each of a cell's differences: one id per image, cell by cell.")
    every = np.unique(np.concatenate(images))
    table = np.full((len(every), len(differences)), np.nan)
    for cell, (ids, values) in enumerate(zip(images, differences, strict=True)):
        if len(np.unique(ids)) < len(ids):
            raise ValueError(f"images of cell {cell} names an image twice.")
        table[np.searchsorted(every, ids), cell] = values
    return table


def _resampled_means(table: np.ndarray, num_samples: int, seed: tuple[int, int]) -> np.ndarray:
    """Means [samples, cells] of a table [n, cells] under resampled images, over what is not NaN."""
    known = np.isfinite(table)
    sums, counts = np.where(known, table, 0.0).astype(np.float32), known.astype(np.float32)
    means = np.empty((num_samples, table.shape[1]))
    draws = _image_counts(len(table), num_samples, seed)
    for start in range(0, num_samples, ROWS_AT_ONCE):
        weights = draws[start : start + ROWS_AT_ONCE].astype(np.float32)
        # a sample without any of a cell's images (that cell then holds a handful) counts as no difference
        means[start : start + ROWS_AT_ONCE] = weights @ sums / np.maximum(weights @ counts, 1)
    return means


@lru_cache(maxsize=24)  # the contrasts of a data set share their draws: 12 MB for 10 000 samples of 1 224 images
def _image_counts(num_images: int, num_samples: int, seed: tuple[int, int]) -> np.ndarray:
    """How often each image is drawn, [samples, images]; a row sums to the number of images."""
    random = np.random.default_rng(seed)
    counts = np.empty((num_samples, num_images), dtype=np.uint8)  # 256 draws of one image do not happen
    for start in range(0, num_samples, ROWS_AT_ONCE):
        part = counts[start : start + ROWS_AT_ONCE]
        drawn = random.integers(num_images, size=part.shape) + np.arange(len(part))[:, None] * num_images
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    return counts


def _check(differences, folds: list, seeds: list, num_samples: int, level: float) -> None:
    if not len(differences) or not len(differences) == len(folds) == len(seeds):
        raise ValueError(
            f"{len(differences)} cells, {len(folds)} folds and {len(seeds)} seeds: pass one array of differences, one"
            " fold and one seed per cell, at least one cell."
        )
    if len(set(zip(folds, seeds, strict=True))) < len(folds):
        raise ValueError("The same fold and seed come twice: pass each cell once.")
    if num_samples < 1 or not 0 < level < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more, and level={level} between 0 and 1.")
    for cell, values in enumerate(differences):
        if np.ndim(values) != 1 or not np.isfinite(values).any() or np.isinf(values).any():
            raise ValueError(
                f"The differences of cell {cell} must be (num_images,) with a finite value, none infinite."
            )
