"""Batches that mix labeled and unlabeled images in a set ratio: the batch is the graph, so its make-up matters."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

UNLABELED = -100


class _Stream:
    """An endless run through fresh permutations of a pool; no item twice within one draw."""

    def __init__(self, pool: list[int], generator: torch.Generator):
        self.pool, self.generator, self.queue = pool, generator, []

    def draw(self, count: int) -> list[int]:
        """The next `count` items, at most as many as the pool holds."""
        taken, self.queue = self.queue[:count], self.queue[count:]
        if len(taken) < count:  # the permutation ends inside this draw
            order = [self.pool[i] for i in torch.randperm(len(self.pool), generator=self.generator).tolist()]
            seen = set(taken)
            # What this draw already holds goes to the end of the new permutation, so nothing is met twice.
            self.queue = [item for item in order if item not in seen] + [item for item in order if item in seen]
            missing = count - len(taken)
            taken, self.queue = taken + self.queue[:missing], self.queue[missing:]
        return taken


class MixedBatchSampler(Sampler[list[int]]):
    r"""
    Shuffled batches of indices for `DataLoader(batch_sampler=...)`, on request with a fixed share of labeled images.

    Without `labeled_batch_fraction` an epoch is one shuffled pass over all images. With it, every batch holds
    `round(batch_size * labeled_batch_fraction)` labeled images (at least 2: one revealed, one asked) and unlabeled ones
    for the rest; both streams run through fresh permutations, and the epoch lasts until every image of both was seen.
    A pool smaller than its share is taken whole and the other fills the batch. No image appears twice in a batch, and
    all batches of a mixed epoch have the same size.

    The order depends on `(seed, epoch)` alone, so a resumed run repeats it.

    Args:
        classes (`Sequence[int]` or `torch.Tensor`): class of each image, -100 where unknown.
        batch_size (`int`): images per batch, 2 or more; fewer when there are fewer images.
        labeled_batch_fraction (`float`, *optional*): share of labeled images in each batch, in (0, 1].
            1 leaves the unlabeled images out, if the labeled ones suffice for a batch.
        class_balanced (`bool`, defaults to `False`):
            Draw the classes of the labeled part round-robin: their counts in a batch differ by at most one, except
            for a class with fewer images than its turn asks for.
        drop_last (`bool`, defaults to `True`):
            Leave out the last, smaller batch of a plain epoch: its graph would be another one. Mixed batches are
            always full.
        seed (`int`, defaults to 0): 0 or more.

    Raises:
        ValueError: for a size, share or seed out of range, options that contradict each other, or a share of labeled
            images where no image is labeled.
    """

    def __init__(
        self,
        classes: Sequence[int] | torch.Tensor,
        batch_size: int,
        labeled_batch_fraction: float | None = None,
        class_balanced: bool = False,
        drop_last: bool = True,
        seed: int = 0,
    ):
        classes = torch.as_tensor(classes)
        if classes.ndim != 1 or len(classes) == 0 or classes.is_floating_point():
            raise ValueError(
                f"classes must hold one integer per image, got shape {tuple(classes.shape)} of {classes.dtype}:"
                " pass the class indices, with -100 for unlabeled images."
            )
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: the batch is the graph, so it needs 2 images or more.")
        if seed < 0:
            raise ValueError(f"seed={seed}: use 0 or a positive number.")
        if class_balanced and labeled_batch_fraction is None:
            raise ValueError(
                "class_balanced=True balances the labeled part of a batch: set labeled_batch_fraction too."
            )
        if labeled_batch_fraction is not None and not 0 < labeled_batch_fraction <= 1:
            raise ValueError(f"labeled_batch_fraction={labeled_batch_fraction} must lie in (0, 1], or be None.")
        labeled = classes != UNLABELED
        if labeled_batch_fraction is not None and not labeled.any():
            raise ValueError(
                f"labeled_batch_fraction={labeled_batch_fraction} asks for labeled images, but all {len(classes)} are"
                " unlabeled (-100): label some, or leave labeled_batch_fraction out."
            )

        self.num_images = len(classes)
        self.batch_size = min(batch_size, self.num_images)
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = 0
        self.mixed = labeled_batch_fraction is not None
        if not self.mixed:
            full, rest = divmod(self.num_images, self.batch_size)
            self.num_batches = full + (1 if rest and not drop_last else 0)
            return

        self.unlabeled = torch.nonzero(~labeled).flatten().tolist()
        groups = [classes == value for value in classes[labeled].unique()] if class_balanced else [labeled]
        self.labeled_groups = [torch.nonzero(group).flatten().tolist() for group in groups]
        num_labeled, num_unlabeled = int(labeled.sum()), len(self.unlabeled)
        share = min(max(round(self.batch_size * labeled_batch_fraction), 2), self.batch_size)
        self.unlabeled_per_batch = min(self.batch_size - min(share, num_labeled), num_unlabeled)
        self.labeled_per_batch = self.batch_size - self.unlabeled_per_batch
        self._share_out()

    def _share_out(self) -> None:
        """Fix how many images of each labeled group every batch holds, and how many batches see every image."""
        sizes = [len(group) for group in self.labeled_groups]
        self.quotas = [0] * len(sizes)
        self.open_groups = list(range(len(sizes)))  # groups with more images than their quota
        self.extra = self.labeled_per_batch  # images left over, one each for groups drawn round-robin
        while self.open_groups and self.extra >= len(self.open_groups):
            self.extra -= len(self.open_groups)
            for group in self.open_groups:
                self.quotas[group] += 1
            self.open_groups = [group for group in self.open_groups if self.quotas[group] < sizes[group]]

        # In b batches a group gives b * quota images, an open one b * extra // len(open_groups) more.
        G = len(self.open_groups)
        is_open = set(self.open_groups)
        self.num_batches = -(-len(self.unlabeled) // self.unlabeled_per_batch) if self.unlabeled_per_batch else 0
        for group, size in enumerate(sizes):
            drawn, batches = (self.quotas[group] * G + self.extra, G) if group in is_open else (self.quotas[group], 1)
            self.num_batches = max(self.num_batches, -(-size * batches // drawn))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        # SeedSequence keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart.
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        return self._mixed_batches(generator) if self.mixed else self._plain_batches(generator)

    def _plain_batches(self, generator: torch.Generator) -> Iterator[list[int]]:
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for batch in range(self.num_batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _mixed_batches(self, generator: torch.Generator) -> Iterator[list[int]]:
        unlabeled = _Stream(self.unlabeled, generator)
        labeled = [_Stream(group, generator) for group in self.labeled_groups]
        turns = _Stream(self.open_groups, generator)
        for _ in range(self.num_batches):
            counts = list(self.quotas)
            for group in turns.draw(self.extra):
                counts[group] += 1
            batch = unlabeled.draw(self.unlabeled_per_batch)
            for stream, count in zip(labeled, counts, strict=True):
                batch += stream.draw(count)
            # Mixed order, so that parts of a batch split over processes hold both kinds.
            yield [batch[i] for i in torch.randperm(len(batch), generator=generator).tolist()]


class ProcessShare(Sampler[list[int]]):
    """The part of each batch that one of several processes embeds, at most `chunk_size` images at a time.

    Parts follow each other in the order of the processes and differ by one image at most; none is repeated, as a repeat
    would be a second node of the graph.

    Raises:
        ValueError: when a batch has fewer images than there are processes.
    """

    def __init__(
        self,
        batch_sampler: MixedBatchSampler,
        process_index: int = 0,
        num_processes: int = 1,
        chunk_size: int | None = None,
    ):
        if batch_sampler.batch_size < num_processes:
            raise ValueError(
                f"A batch of {batch_sampler.batch_size} images leaves some of {num_processes} processes without any:"
                " use larger batches or fewer processes."
            )
        self.batch_sampler = batch_sampler
        self.process_index, self.num_processes, self.chunk_size = process_index, num_processes, chunk_size

    def _chunks(self, batch_size: int) -> list[slice]:
        start, end = (batch_size * part // self.num_processes for part in (self.process_index, self.process_index + 1))
        size = self.chunk_size or end - start
        return [slice(first, min(first + size, end)) for first in range(start, end, size)]

    def __len__(self) -> int:
        return len(self.batch_sampler) * len(self._chunks(self.batch_sampler.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batch_sampler:
            for part in self._chunks(len(batch)):
                yield batch[part]


class RepeatableRows(Dataset):
    """Rows of a data set whose random augmentation depends on the seed and the batch alone.

    Loaders read ahead of the step that is saved: with torch's running generator, a resumed run would see other images.
    """

    def __init__(self, rows, seed: int):
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        state = np.random.SeedSequence((self.seed, *indices)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(state[0]))
            if hasattr(self.rows, "__getitems__"):  # of `datasets`: one call of the transform for all rows
                return self.rows.__getitems__(indices)
            return [self.rows[index] for index in indices]
