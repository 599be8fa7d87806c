"""The loader of training: this process's part of batches whose make-up is that of the graph."""

from collections.abc import Callable, Sequence

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import seed_worker

from .arguments import BPGCNTrainingArguments
from .gradient_cache import WholeSet
from .sampler import MixedBatchSampler, ProcessShare, RepeatableRows


def read_classes(args: BPGCNTrainingArguments, dataset: Dataset) -> Sequence[int]:
    """The class of each image from the data set's labels; 0 for all where nobody needs to know.

    Raises:
        ValueError: for batches of labelled and other images from a data set that does not say which is which.
    """
    if isinstance(dataset, datasets.Dataset):
        for column in ("labels", "label"):
            if column in dataset.column_names:
                return dataset.with_format(None)[column]
    if args.labeled_batch_fraction is not None:
        raise ValueError("labeled_batch_fraction needs to know which images are labelled: pass train_classes.")
    return [0] * len(dataset)


def graph_sampler(args: BPGCNTrainingArguments, classes: Sequence[int], batch_size: int) -> MixedBatchSampler:
    """The nodes of each graph, over all processes, of images of these classes; `batch_size` is that of one process."""
    count = len(classes)
    return MixedBatchSampler(
        classes,
        batch_size=count if args.graph_scope == "full" else min(batch_size * args.world_size, count),
        labeled_batch_fraction=args.labeled_batch_fraction,
        class_balanced=args.class_balanced_batches,
        seed=_seed(args),
    )


def training_loader(
    args: BPGCNTrainingArguments, rows: Dataset, sampler: MixedBatchSampler, batch_size: int, collate: Callable
) -> DataLoader | WholeSet:
    """This process's part of the sampler's batches; with `graph_scope` full in chunks, of `batch_size` images unless
    `gradient_cache_chunk_size` is given."""
    whole = args.graph_scope == "full"
    chunk_size = (args.gradient_cache_chunk_size or batch_size) if whole else None
    loader = DataLoader(
        RepeatableRows(rows, _seed(args)),
        batch_sampler=ProcessShare(sampler, args.process_index, args.world_size, chunk_size),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=lambda worker: seed_worker(worker, args.dataloader_num_workers, args.process_index),
        generator=torch.Generator(),  # a loader draws a seed: not from the random stream of training
    )
    return WholeSet(loader) if whole else loader


def _seed(args: BPGCNTrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed
