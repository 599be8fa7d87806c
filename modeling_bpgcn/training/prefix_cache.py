"""What frozen first blocks make of the images, computed once: a memory-mapped file that training reads instead."""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import default_data_collator
from transformers.utils import logging

from ..image_features import first_modules, num_frozen_blocks, run_first_blocks
from .prefix_key import describe_prefix, differences
from .run_folder import write_whole

logger = logging.get_logger(__name__)

DTYPES = ("float16", "float32")
RECORD_FILE = "prefix_cache.json"
BATCHES_BETWEEN_RECORDS = 16


class CachedPrefix(Dataset):
    """Rows `hidden_states` [T, D], `labels` and `node_ids`: the states from a file of [N, T, D], the rest as given."""

    def __init__(self, path: Path, labels: list[int], node_ids: list[int]):
        self.path, self.labels, self.node_ids = path, labels, node_ids
        self._states = np.load(path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        states = torch.from_numpy(np.asarray(self._states[indices]))
        return [
            {"hidden_states": states[row], "labels": self.labels[index], "node_ids": self.node_ids[index]}
            for row, index in enumerate(indices)
        ]

    def __reduce__(self):
        # for workers that are not forked: the map itself would be sent as a copy of the whole file
        return CachedPrefix, (self.path, self.labels, self.node_ids)


def cache_prefix(
    model: nn.Module,
    dataset: datasets.Dataset,
    folder: str | os.PathLike,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> CachedPrefix:
    """Run the frozen first blocks once on every image, and tell the model to go on from there (its `prefix_blocks`).

    The file takes N x T x D x 2 bytes as float16: 20 GB for 100 000 images of 224 x 224 pixels in patches of 14, at
    width 384. A folder holds one cache. It is rebuilt when its key changes: the images (bytes, or path, size and time
    of the file), the image processor, config and weights of the first blocks, their number, the dtype, and the version
    of transformers. Of several processes one builds while the others wait; killed, it goes on after the last row on
    record. The blocks run as in evaluation, without dropout, and without autocast.

    Args:
        model: `BPGCNForImageClassification` on its device; what shall not train is frozen already.
        dataset: rows of `load_image_data` through `image_transform`; classes and ids are read from it each time.
        folder: made if there is none.
        dtype: how the states are stored, `float16` or `float32`.
        batch_size: images that run at once.
        num_workers: processes that read images.
        progress: show a bar.

    Raises:
        ValueError: nothing is frozen, the backbone cannot be split, images are augmented at random, states are too
            large for float16, or the disk has too little space.
        OSError: the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The prefix cache stores {' or '.join(DTYPES)}, not {dtype!r}.")
    backbone = model.bpgcn.backbone
    num_blocks = num_frozen_blocks(backbone)
    if num_blocks == 0:
        raise ValueError(
            "The prefix cache holds what frozen first blocks compute, but the first block or the embeddings train: set"
            " trainable_blocks to fewer than the backbone has, or leave the prefix cache out."
        )
    _warn_of_dropout(first_modules(backbone, num_blocks))
    key = describe_prefix(backbone, num_blocks, dataset, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"hidden_states-{digest[:16]}.npy"
    model.bpgcn.prefix_blocks = num_blocks
    with _one_process(folder):
        rows = _recorded_rows(path, key)
        if rows < len(dataset):
            loader = DataLoader(
                Subset(dataset, range(rows, len(dataset))),
                batch_size,
                num_workers=num_workers,
                collate_fn=default_data_collator,
                generator=torch.Generator(),  # a loader draws a seed: not from the random stream of training
            )
            training = model.training
            model.eval()
            _write_rows(model.bpgcn, loader, path, key, rows, progress)
            model.train(training)
        # while no other run can replace it: what is open stays readable
        columns = dataset.with_format(None)
        return CachedPrefix(path, columns["label"][:], columns["node_id"][:])


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    import fcntl  # there is none on Windows, where everything else works

    with (folder / "prefix_cache.lock").open("w") as lock:  # the system releases it, however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning(f"Waiting for another process that builds the prefix cache in {folder}.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would leave it with workers that were forked meanwhile


def _recorded_rows(path: Path, key: dict) -> int:
    """How many rows of this key are on the disk for certain; what belongs to another key is removed."""
    record = path.with_name(RECORD_FILE)
    rows, reason = 0, None
    if record.is_file():
        try:
            stored = json.loads(record.read_text())
            changes, rows = differences(stored["key"], key), stored["rows"]
        except (ValueError, LookupError, TypeError, AttributeError):
            reason = f"{RECORD_FILE} cannot be read"
        else:
            if changes:
                reason = "; ".join(changes[:5])
            elif not path.is_file() or path.stat().st_size < stored["bytes"]:
                reason = f"{path.name} is damaged"
    if reason:
        logger.warning(f"The prefix cache in {path.parent} is rebuilt: {reason}.")
        rows = 0
        record.unlink()
    for file in path.parent.glob("hidden_states-*.npy"):
        if file != path:
            # readers that have it open keep it: the name goes, the content when they are done
            file.unlink()
    return rows


def _write_rows(base: nn.Module, loader: DataLoader, path: Path, key: dict, rows: int, progress: bool) -> None:
    """Append what the first blocks make of the loader's images to the `rows` that the file has."""
    dtype, device = np.dtype(key["dtype"]), base.device
    shape = (key["number_of_images"], *_try_one_image(base, loader.dataset[0]["pixel_values"][None].to(device)))
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    size = len(header.getvalue()) + shape[0] * row_bytes
    start = len(header.getvalue()) + rows * row_bytes
    free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.is_file() else 0)
    if free < size:
        raise ValueError(
            f"The prefix cache of {' x '.join(map(str, shape))} {dtype} numbers takes {size:,} bytes, but"
            f" {path.parent} has room for {free:,}. Free some space, or choose another folder."
        )
    logger.info(f"The prefix cache {path} takes {size / 2**20:.1f} MiB; {rows} of {shape[0]} images are in it.")
    description = f"Running {key['number_of_blocks']} frozen blocks ({size / 2**20:.0f} MiB)"
    with (
        path.open("r+b" if rows else "wb") as file,
        logging.tqdm(total=shape[0], initial=rows, desc=description, disable=not progress, unit=" images") as bar,
    ):
        file.write(header.getvalue())
        file.seek(start)  # what comes after the last record may be torn, and is written again
        for number, batch in enumerate(loader, start=1):
            states = run_first_blocks(base.backbone, batch["pixel_values"].to(device), key["number_of_blocks"])
            file.write(_as_array(states, dtype))
            rows += len(states)
            bar.update(len(states))
            if number % BATCHES_BETWEEN_RECORDS == 0 or rows == shape[0]:
                file.flush()
                os.fsync(file.fileno())  # a record says what is on the disk, also after a power cut
                record = {"rows": rows, "bytes": file.tell(), "key": key}
                write_whole(path.with_name(RECORD_FILE), json.dumps(record, indent=2))


def _try_one_image(base: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """T and D of the states; ValueError unless the split backbone computes the same as the whole one."""
    with torch.no_grad():
        states = run_first_blocks(base.backbone, pixel_values, base.prefix_blocks)
        whole, split = base.get_image_features(pixel_values), base.get_image_features(hidden_states=states)
    if not torch.allclose(whole, split, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(base.backbone).__name__} computes something else when its first blocks run apart from the others:"
            " train it without the prefix cache."
        )
    return tuple(states.shape[1:])


def _as_array(states: Tensor, dtype: np.dtype) -> np.ndarray:
    states = states.float().cpu().numpy()
    with np.errstate(over="ignore"):
        array = states.astype(dtype)
    if not np.isfinite(array).all():
        largest = np.abs(states).max()
        raise ValueError(
            f"The hidden states of these images reach {largest:.3g} and cannot be stored as {dtype}: store float32 if"
            " that is more than 65504, else look for broken images or weights."
        )
    return array


def _warn_of_dropout(modules: nn.Module) -> None:
    names = "p", "drop_prob", "attention_dropout"
    rate = max(getattr(module, name, 0) for module in modules.modules() for name in names)
    if rate > 0:
        logger.warning(
            f"The frozen first blocks have dropout (up to {rate}); the prefix cache holds what they compute without it."
        )
