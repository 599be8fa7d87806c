"""The output folder of a run: who it belongs to, whether it can be written, and where the run left off."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
# settings that change what is shown or where it goes, not what is trained
INCIDENTAL = {
    "baselines",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "deepspeed",
    "disable_tqdm",
    "fsdp",
    "fsdp_config",
    "gradient_flow_steps",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "local_rank",
    "log_level",
    "log_level_replica",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "output_dir",
    "prefix_cache",
    "project",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_only_model",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "transductive_evaluation",
}


def prepare_run(output_dir: str, arguments: tuple, needed_bytes: int = 0) -> str | None:
    """Claim the output folder for a run and return the checkpoint to go on from, or None for a fresh start.

    The same settings find their own folder again and go on; a run that was killed at any moment loses what came after
    its last whole checkpoint.

    Args:
        output_dir: the folder; made if there is none.
        arguments: dataclasses with the run's settings.
        needed_bytes: space that the checkpoints will take.

    Raises:
        ValueError: the folder holds another run, or too little space is left.
        OSError: the folder cannot be written.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"output_dir {folder}: {free / 2**20:.0f} MiB are free, but the checkpoints of this run take about"
            f" {needed_bytes / 2**20:.0f} MiB. Free some space, or choose another --output_dir or a lower"
            " --save_total_limit."
        )
    settings, record = read_settings(arguments), folder / RUN_FILE
    if record.is_file():
        different = _differences(json.loads(record.read_text()), settings)
        if different:
            raise ValueError(
                f"output_dir {folder} holds another run: {'; '.join(different[:5])}. Choose another --output_dir, or"
                " remove the folder."
            )
        return last_whole_checkpoint(folder)
    found = (path.name for path in folder.iterdir())
    others = [name for name in found if name == "config.json" or name.startswith("checkpoint-")]
    if others:
        raise ValueError(
            f"output_dir {folder} holds another run ({', '.join(sorted(others)[:3])}). Choose another --output_dir, or"
            " remove the folder."
        )
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    write_whole(record, json.dumps(settings, indent=2, sort_keys=True))
    return None


def checkpoint_bytes(model: nn.Module, arguments: TrainingArguments) -> int:
    """About what the checkpoints of a run take: the weights, and two moments of each that trains."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = 0 if arguments.save_strategy == "no" else (arguments.save_total_limit or 2) + 1
    return weights + kept * (weights + moments)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        write_whole(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written ({error}). Choose another --output_dir.") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a process killed while writing, leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def read_settings(arguments: tuple) -> dict:
    """What a run was asked for, without what does not change its result, as JSON can hold it."""
    settings = {}
    for part in arguments:
        settings |= {name: value for name, value in _changed(part).items() if name not in INCIDENTAL}
    return json.loads(json.dumps(settings, default=str))


def _changed(part) -> dict:
    """The fields of a dataclass that are not at their default; one that is a dataclass itself (Trainer makes one of
    `accelerator_config`) as a dict again, as a recipe writes it."""
    changed = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        value = (_changed(value) or None) if dataclasses.is_dataclass(value) else value
        default = field.default_factory() if callable(field.default_factory) else field.default
        unset = {repr(value), repr(default)} <= {"None", "False", "''", "[]"}  # Trainer makes one of the other
        if field.init and not field.name.startswith("_") and value != default and not unset:
            changed[field.name] = value
    return changed


def _differences(old: dict, new: dict) -> list[str]:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name} was {old.get(name, 'not set')}, now {new.get(name, 'not set')}" for name in names]


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes its state last."""
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: -int(numbers[path]))
    return next((str(checkpoint) for checkpoint in checkpoints if _is_whole(checkpoint)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    found = [path.name for path in checkpoint.iterdir() if path.is_dir() or path.stat().st_size]
    # what Trainer misses it starts afresh, without a word; adapters and FSDP have names of their own
    parts = (r".*model\.safetensors.*|pytorch_model.*", "optimizer.*", r"scheduler\.pt", r"rng_state.*\.pth")
    return all(any(re.fullmatch(part, name) for name in found) for part in parts)


@contextmanager
def explained_writing(folder: Path, output_dir: str) -> Iterator[None]:
    """Turn an error while writing `folder` into an OSError that names it and says from where the run goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
        last = last_whole_checkpoint(Path(output_dir))
        goes_on = f"goes on from {last}" if last else "starts from the beginning, as there is no whole checkpoint yet"
        raise OSError(f"{folder} cannot be written ({error}). Free some space; the same command {goes_on}.") from error
