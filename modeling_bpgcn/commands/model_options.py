"""What the commands that answer from a model share: its options, and how model and image processor are loaded."""

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..bank_file import backbone_fingerprint, check_fingerprint, processor_fingerprint
from ..configuration_bpgcn import BPGCNConfig
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.images import check_image_size, output_size
from ..training.sources import shortened

UNKNOWN = -100
DEFAULT_WORKERS = min(4, os.cpu_count() or 1)


def at_least(lowest: int):
    """A type of argparse: an integer that is not lower."""

    def integer(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"{value} must be at least {lowest}")
        return value

    return integer


def add_model_options(parser: ArgumentParser) -> None:
    """MODEL, and how it is run."""
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub name of a BPGCN model.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model on the Hub.")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="Images at once. Default: 32.")
    parser.add_argument("--device", help="Where the model runs, as torch names it. Default: cuda if there is one.")
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        default=DEFAULT_WORKERS,
        help=f"Processes that decode images. Default: {DEFAULT_WORKERS}.",
    )
    parser.add_argument("--disable_tqdm", action="store_true", help="No progress bar.")


def reader_options(options: Namespace) -> dict:
    """The options of an `ImageReader`."""
    return {name: vars(options)[name] for name in ("batch_size", "num_workers", "disable_tqdm")}


def load_model(options: Namespace, *, with_bank: bool = True) -> tuple[BPGCNForImageClassification, BaseImageProcessor]:
    """The model on its device, and the processor saved with it; no code of the repository runs, no pickle is read.

    Raises:
        OSError: there is no such model, or no image processor with it.
        ValueError: the model is none of BPGCN, or lacks a support bank of its own where it needs one; or there is no
            such device.
    """
    name, revision = options.model, options.revision
    device = _device(options.device)
    if find_adapter_config_file(name, revision=revision) is None:
        kind = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type")
        if kind != BPGCNConfig.model_type:
            raise ValueError(
                f"MODEL {name} is of type {kind}, not bpgcn: name what train.py has saved, or give a backbone a head"
                " with BPGCNForImageClassification.from_backbone_pretrained(...).save_pretrained(FOLDER)."
            )
    model = AutoModelForImageClassification.from_pretrained(
        name, revision=revision, trust_remote_code=False, use_safetensors=True
    )
    # pixels must not depend on whether torchvision happens to be installed
    processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False, backend="pil")
    for side in output_size(processor):
        check_image_size(side, getattr(model.config.backbone_config, "patch_size", 1))
    if with_bank:
        _check_bank(model, processor, name)
    return model.to(device).eval(), processor


def _check_bank(model: BPGCNForImageClassification, processor: BaseImageProcessor, name: str) -> None:
    """Raise the model's own error where it has no bank, or one of another backbone or image processor."""
    try:
        if model.support_bank.size == 0:
            model.bpgcn.rank_in_bank(torch.empty(0, model.config.feature_size))
        current = (backbone_fingerprint(model.bpgcn) or {}) | processor_fingerprint(processor)
        check_fingerprint(model.support_bank.fingerprint, current, "The support bank")
    except ValueError as error:
        remedy = f"python -m modeling_bpgcn index {name} IMAGES --output FOLDER"
        raise ValueError(f"MODEL {name}: {error} From a terminal: {remedy}") from None


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def class_numbers(names: Sequence[str | None], config: BPGCNConfig, source: str) -> Tensor:
    """The model's numbers of classes by name [N] int64, -100 for None.

    Raises:
        ValueError: the model does not know a class.
    """
    numbers = {str(name): number for number, name in config.id2label.items()} | {None: UNKNOWN}
    if strange := sorted({name for name in names if name not in numbers}):
        known = shortened([name for name in numbers if name is not None])
        raise ValueError(
            f"{source} has classes that the model does not know: {shortened(strange)}. It knows {known}: rename the"
            " classes, or train a model on them."
        )
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)
