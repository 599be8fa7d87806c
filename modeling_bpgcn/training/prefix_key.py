"""What the states of a prefix cache depend on: images, image processor, weights, versions; and what changed in it."""

import hashlib
import json
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import BaseImageProcessor

from ..image_features import first_modules
from .images import keep, output_size

LAYOUT = 1  # raise it when the same images would give other rows
# fields of a backbone's config that say where it came from, not what it computes
ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")


def describe_prefix(backbone: nn.Module, num_blocks: int, dataset: datasets.Dataset, dtype: str) -> dict:
    """What the hidden states that enter block `num_blocks` depend on, as JSON can hold it.

    Args:
        backbone: its first blocks are frozen.
        num_blocks: how many of them run.
        dataset: rows of `load_image_data` through `image_transform`.
        dtype: how the states are stored.

    Raises:
        ValueError: for another transform, or one that changes images at random.
    """
    processor = _deterministic_processor(dataset)
    config = json.loads(backbone.config.to_json_string())
    return {
        "number_of_images": len(dataset),
        "image_digest": _digest_images(dataset),
        "image_size": " x ".join(map(str, output_size(processor))),
        "image_processor": json.loads(processor.to_json_string()),
        "number_of_blocks": num_blocks,
        "weight_digest": _digest_weights(first_modules(backbone, num_blocks)),
        "backbone": {name: value for name, value in config.items() if name not in ORIGIN},
        "dtype": dtype,
        "transformers": transformers.__version__,
        "layout": LAYOUT,
    }


def _deterministic_processor(dataset: datasets.Dataset) -> BaseImageProcessor:
    known = isinstance(dataset, datasets.Dataset)
    transform = dataset.format["format_kwargs"].get("transform") if known else None
    if not isinstance(transform, partial) or not {"processor", "augment"} <= transform.keywords.keys():
        raise ValueError("The prefix cache needs a data set with_transform(image_transform(processor)).")
    if transform.keywords["augment"] is not keep:
        raise ValueError(
            "The prefix cache would show the same version of each image in every epoch, but the training images change"
            " at random: set --augmentation none, or leave the prefix cache out."
        )
    return transform.keywords["processor"]


def _digest_images(dataset: datasets.Dataset) -> str:
    # not the data set's fingerprint: it stays when an image file changes, and changes with the labels
    files = dataset.with_format(None).select_columns("image").cast_column("image", datasets.Image(decode=False))
    digest = hashlib.sha256()
    for batch in files.iter(256):
        for file in batch["image"]:
            content = file["bytes"] if file["bytes"] is not None else _identify(file["path"]).encode()
            digest.update(b"%d " % len(content))
            digest.update(content)
    return digest.hexdigest()[:16]


def _identify(path: str) -> str:
    if "://" in path:
        return path
    status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _digest_weights(modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in modules.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def differences(old: dict, new: dict) -> list[str]:
    """What changed from one key to another: `image size was 112 x 112, now 224 x 224`."""
    old, new = _flat(old), _flat(new)
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name.replace('_', ' ')} was {old.get(name, 'not set')!s:.40}, now {new.get(name, 'not set')!s:.40}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
