"""Batches that mix labeled and unlabeled images: what each batch and epoch holds, and that both can be repeated."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import skip_first_batches
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modeling_bpgcn.training.sampler import UNLABELED, MixedBatchSampler, ProcessShare

few_examples = settings(max_examples=150, deadline=None)


@st.composite
def mixtures(draw, class_balanced=None):
    """Classes with at least one labeled image, and the arguments of a mixed sampler."""
    labeled = draw(st.lists(st.integers(0, 5), min_size=1, max_size=40))
    classes = draw(st.permutations(labeled + [UNLABELED] * draw(st.integers(0, 60))))
    options = {
        "batch_size": draw(st.integers(2, 30)),
        "labeled_batch_fraction": draw(st.floats(0.01, 1.0)),
        "class_balanced": draw(st.booleans()) if class_balanced is None else class_balanced,
        "seed": draw(st.integers(0, 3)),
    }
    return classes, options


# --- plain batches ----------------------------------------------------------------------------------------------------


@few_examples
@given(num_images=st.integers(1, 80), batch_size=st.integers(2, 30), drop_last=st.booleans())
def test_plain_epoch_is_one_shuffled_pass(num_images, batch_size, drop_last):
    sampler = MixedBatchSampler([UNLABELED] * num_images, batch_size, drop_last=drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    seen = [index for batch in batches for index in batch]
    assert len(set(seen)) == len(seen)
    size = min(batch_size, num_images)
    assert len(seen) == (num_images // size * size if drop_last else num_images)
    assert all(len(batch) == size for batch in batches[:-1])


def test_order_is_shuffled():
    assert next(iter(MixedBatchSampler(torch.zeros(64, dtype=torch.long), 64))) != list(range(64))


# --- mixed batches ----------------------------------------------------------------------------------------------------


@few_examples
@given(mixtures())
def test_every_mixed_batch_has_the_same_size_and_no_image_twice(mixture):
    classes, options = mixture
    sampler = MixedBatchSampler(classes, **options)
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    for batch in batches:
        assert len(set(batch)) == len(batch) == sampler.batch_size <= options["batch_size"]
        assert all(0 <= index < len(classes) for index in batch)


@few_examples
@given(mixtures())
def test_labeled_share_is_met_or_its_pool_is_exhausted(mixture):
    classes, options = mixture
    labeled = sum(value != UNLABELED for value in classes)
    unlabeled = len(classes) - labeled
    size = min(options["batch_size"], len(classes))
    share = min(max(round(size * options["labeled_batch_fraction"]), 2), size)
    for batch in MixedBatchSampler(classes, **options):
        count = sum(classes[index] != UNLABELED for index in batch)
        if labeled >= share and unlabeled >= size - share:
            assert (count, len(batch)) == (share, size)
        elif labeled < share:  # all of them, the rest unlabeled
            assert count == labeled
        else:  # every unlabeled image, the rest labeled
            assert len(batch) - count == unlabeled


@few_examples
@given(mixtures())
def test_an_epoch_sees_every_image_and_ends_as_soon_as_it_has(mixture):
    classes, options = mixture
    sampler = MixedBatchSampler(classes, **options)
    batches = list(sampler)
    wanted = {i for i, value in enumerate(classes) if value != UNLABELED or sampler.unlabeled_per_batch}
    assert {index for batch in batches for index in batch} == wanted
    if not options["class_balanced"]:
        assert {index for batch in batches[:-1] for index in batch} < wanted


@few_examples
@given(mixtures())
def test_a_pool_is_seen_evenly(mixture):
    classes, options = mixture
    batches = list(MixedBatchSampler(classes, **{**options, "class_balanced": False}))
    counts = Counter(index for batch in batches for index in batch)
    for known in (True, False):
        of_pool = [counts[i] for i, value in enumerate(classes) if (value != UNLABELED) == known]
        if any(of_pool):
            assert max(of_pool) - min(of_pool) <= 1


@few_examples
@given(mixtures(class_balanced=True))
def test_class_balanced_counts_differ_by_at_most_one_unless_a_class_runs_out(mixture):
    classes, options = mixture
    images_per_class = Counter(value for value in classes if value != UNLABELED)
    for batch in MixedBatchSampler(classes, **options):
        counts = Counter(classes[index] for index in batch if classes[index] != UNLABELED)
        most = max(counts.values())
        assert all(counts[value] >= min(most - 1, size) for value, size in images_per_class.items())


def test_class_balance_against_an_uneven_set():
    classes = [0] * 90 + [1] * 9 + [2] * 3 + [UNLABELED] * 300
    for batch in MixedBatchSampler(classes, 32, labeled_batch_fraction=0.5, class_balanced=True):
        counts = Counter(classes[index] for index in batch)
        assert counts[UNLABELED] == 16
        assert counts[2] == 3
        assert sorted((counts[0], counts[1])) == [6, 7]


def test_fewer_labeled_places_than_classes_still_visits_all_classes_evenly():
    classes = [i % 10 for i in range(100)] + [UNLABELED] * 400
    drawn = Counter()
    for batch in MixedBatchSampler(classes, 16, labeled_batch_fraction=0.25, class_balanced=True):
        in_batch = [classes[index] for index in batch if classes[index] != UNLABELED]
        assert len(set(in_batch)) == len(in_batch) == 4
        drawn.update(in_batch)
    assert max(drawn.values()) - min(drawn.values()) <= 1


def test_fewer_images_than_the_batch_give_one_batch_of_all():
    classes = [0, 1, UNLABELED, UNLABELED]
    for fraction in (None, 0.5):
        [batch] = MixedBatchSampler(classes, 64, labeled_batch_fraction=fraction)
        assert sorted(batch) == [0, 1, 2, 3]


def test_fraction_one_leaves_unlabeled_images_out():
    sampler = MixedBatchSampler([0, 1, 0, UNLABELED, UNLABELED], 3, labeled_batch_fraction=1.0)
    assert {index for batch in sampler for index in batch} == {0, 1, 2}


# --- repeatable -------------------------------------------------------------------------------------------------------


@few_examples
@given(mixtures(), st.integers(0, 5))
def test_order_depends_on_seed_and_epoch_alone(mixture, epoch):
    classes, options = mixture
    first, second = MixedBatchSampler(classes, **options), MixedBatchSampler(classes, **options)
    list(first)  # an earlier epoch leaves no trace
    torch.manual_seed(123)  # nor does the global generator
    first.set_epoch(epoch)
    second.set_epoch(epoch)
    assert list(first) == list(second)


def test_epochs_and_seeds_differ():
    classes = [0, 1] * 20 + [UNLABELED] * 60
    orders = []
    for seed in (0, 1):
        sampler = MixedBatchSampler(classes, 10, labeled_batch_fraction=0.5, seed=seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampler():
    return MixedBatchSampler([0, 1, 2, 3] * 3 + [UNLABELED] * 36, 8, labeled_batch_fraction=0.5, seed=3)


def _order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def _flat(loader):
    return [batch.tolist() for batch in loader]


def test_resuming_inside_an_epoch_repeats_the_rest_of_it(sampler):
    sampler.set_epoch(2)
    expected = list(sampler)[5:]
    assert expected
    rest = skip_first_batches(DataLoader(range(48), batch_sampler=ProcessShare(sampler)), 5)
    assert _flat(rest) == expected


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 5), st.integers(1, 9) | st.none(), st.integers(0, 3))
def test_the_shares_of_all_processes_are_the_batches_evenly_and_in_order(count, batch_size, processes, chunk, epoch):
    batches = MixedBatchSampler([0] * count, batch_size, drop_last=False)
    batches.set_epoch(epoch)
    assume(batches.batch_size >= processes)
    assume(count % batches.batch_size == 0 or count % batches.batch_size >= processes)
    shares = [ProcessShare(batches, process, processes, chunk) for process in range(processes)]
    if chunk is None:
        for batch, parts in zip(batches, zip(*shares, strict=True), strict=True):
            assert [image for part in parts for image in part] == batch
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert all(parts)
    if count % batches.batch_size == 0:
        assert all(len(share) == len(list(share)) for share in shares)
    assert all(len(part) <= (chunk or count) for share in shares for part in share)
    if len(batches) == 1:
        assert [image for share in shares for part in share for image in part] == next(iter(batches))


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(ValueError, match="A batch of 2 images leaves some of 3 processes without any"):
        ProcessShare(MixedBatchSampler([0, 1, 0], 2), 0, 3)


def test_it_is_a_batch_sampler_for_a_plain_loader(sampler):
    loader = DataLoader(range(48), batch_sampler=sampler)
    assert len(loader) == len(sampler) == 9
    assert _flat(loader) == list(sampler)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], 1), "batch_size=1: the batch is the graph"),
        (([0, 1], 2, 0.0), r"labeled_batch_fraction=0.0 must lie in \(0, 1\]"),
        (([0, 1], 2, 1.5), "labeled_batch_fraction=1.5 must lie in"),
        (([UNLABELED] * 3, 2, 0.5), "all 3 are unlabeled"),
        (([0, 1], 2, None, True), "set labeled_batch_fraction too"),
        (([0, 1], 2, None, False, True, -1), "seed=-1"),
        (([], 2), "one integer per image"),
        (([0.5, 1.0], 2), "one integer per image"),
        ((torch.zeros(2, 2, dtype=torch.long), 2), r"got shape \(2, 2\)"),
    ],
)
def test_bad_input_is_named_with_its_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedBatchSampler(*arguments)
