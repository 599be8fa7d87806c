"""A support bank apart from its model: the safetensors file, and the fingerprints that bind it to what made it."""

import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# safetensors, by way of the package that depends on it: remote code imports nothing else
from transformers.modeling_utils import safe_open, safe_save_file

from .configuration_bpgcn import BPGCNConfig
from .support_bank import SupportBank

FILE_NAME = "support_bank.safetensors"
# how a user knows the parts of a fingerprint
PARTS = {
    "backbone_config": "the backbone's configuration",
    "backbone_weights": "the backbone's weights",
    "image_processor": "the image processor's settings",
}
# what the head's states and the propagated labels of a bank depend on, beside its rows and the head's weights
STATE_FIELDS = ("num_neighbors", "ranking_", "graph_", "head", "self_weight", "propagation_steps", "propagation_alpha")


def _digest(*parts) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights_digest(module: nn.Module) -> str | None:
    """Of the values of all weights, whatever their names, which differ between versions of transformers; None for
    weights of which this process holds a part (FSDP) or nothing."""
    digests = []
    for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        value = value.detach()
        if name.endswith("mask_token") or name.startswith("pooler."):  # never used, see `freeze_unused`
            continue
        if type(value) is not Tensor or value.is_meta:
            return None
        # a copy: NumPy pins the storage it looks at, and FSDP must be able to free it
        data = value.to("cpu", copy=True).contiguous().view(-1).view(torch.uint8).numpy()
        digests.append([str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()])
    return _digest(sorted(digests))


def backbone_fingerprint(model: nn.Module) -> dict[str, str] | None:
    """Digests of what makes the features of a `BPGCNModel`: the backbone's configuration (with the pooling) and its
    weights, which are read once (sha256: some 0.1 s for 90 MB); None where this process does not hold all of them."""
    weights = _weights_digest(model.backbone)
    if weights is None:
        return None
    config = model.config.backbone_config
    own = {field.name for field in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    # fields that a later version adds are at their defaults
    default = type(config)()
    chosen = {name: getattr(config, name) for name in own if getattr(config, name) != getattr(default, name)}
    return {
        "backbone_config": _digest(config.model_type, chosen, model.config.pooling),
        "backbone_weights": weights,
    }


def processor_fingerprint(image_processor) -> dict[str, str]:
    """A digest of an image processor's settings; its class and what is left open do not count."""
    ignored = ("image_processor_type", "processor_class", "auto_map", "transformers_version")
    settings = json.loads(image_processor.to_json_string())
    settings = {k: v for k, v in settings.items() if v is not None and k not in ignored and not k.startswith("_")}
    return {"image_processor": _digest(settings)}


def check_fingerprint(stored: dict[str, str] | None, current: dict[str, str] | None, what: str) -> None:
    """Raise a ValueError that says which parts of two fingerprints differ; what one of them lacks is not compared."""
    stored, current = stored or {}, current or {}
    shared = [part for part in PARTS if part in stored and part in current]
    differing = [PARTS[part] for part in shared if stored[part] != current[part]]
    if differing:
        raise ValueError(
            f"{what} does not fit this model: {' and '.join(differing)} differ, so that its features do not compare"
            " with those of new images. Make it anew with model.build_support_bank(dataset, ...), load the model that"
            " it was made with, or pass ignore_mismatch=True to use it all the same."
        )


def states_digest(config: BPGCNConfig, modules: list[nn.Module]) -> str | None:
    """Of all that the states of a bank depend on beside its rows: where it differs they are computed again."""
    fields = {n: v for n, v in config.to_dict().items() if n.startswith(STATE_FIELDS) and "loss" not in n}
    weights = [_weights_digest(module) for module in modules]
    return None if None in weights else _digest(fields, config.num_labels, weights)


def bank_path(path: str | os.PathLike) -> Path:
    """The file meant by a path: itself, or `support_bank.safetensors` in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def write_bank(bank: SupportBank, path: str | os.PathLike, **metadata) -> Path:
    """Write a bank's rows as they are stored, with `metadata` (JSON), to a safetensors file; returns its path."""
    path = bank_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: value.detach().cpu().contiguous() for name, value in bank.named_buffers()}
    safe_save_file(rows, path, metadata={"format": "pt", "support_bank": json.dumps(metadata, sort_keys=True)})
    return path


def read_bank(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The rows and the metadata of a bank's file.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a safetensors file that is no bank.
    """
    path = bank_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No support bank at {path}: write one with model.save_support_bank.")
    with safe_open(path, framework="pt") as file:
        metadata = (file.metadata() or {}).get("support_bank")
        if metadata is None:
            raise ValueError(
                f"{path} is no support bank: write one with model.save_support_bank, or load a whole model with"
                " from_pretrained."
            )
        # copies: what is mapped from a file changes with it, and is not aligned as other tensors are
        return {name: file.get_tensor(name).clone() for name in file.keys()}, json.loads(metadata)  # noqa: SIM118
