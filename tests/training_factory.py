"""Small runs that the tests of training share: digits, a tiny backbone, few steps."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml
from transformers import set_seed

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification
from modeling_bpgcn.training.arguments import BPGCNTrainingArguments
from modeling_bpgcn.training.callbacks import CurvesCallback
from modeling_bpgcn.training.data import DataArguments, ImageData, load_image_data
from modeling_bpgcn.training.images import build_image_processor, image_transform
from modeling_bpgcn.training.trainer import BPGCNTrainer
from tests.model_factory import tiny_backbone

ROOT = Path(__file__).parents[1]
PROCESSOR = build_image_processor(None, 8, 4)

# a recipe of some seconds; dropout and augmentation are on
RECIPE = {
    "dataset": "digits",
    "max_images": 96,
    "labels_per_class": 6,
    "augmentation": "shift",
    "image_size": 8,
    "backbone_config": {
        "model_type": "dinov2",
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "hidden_dropout_prob": 0.1,
    },
    "num_neighbors": 4,
    "ranking_temperature": 0.1,
    "head_hidden_size": 16,
    "max_steps": 10,
    "per_device_train_batch_size": 24,
    "per_device_eval_batch_size": 64,
    "labeled_batch_fraction": 0.5,
    "learning_rate": 1.0e-3,
    "logging_steps": 1,
    "save_steps": 3,
    "report_to": "none",
    "use_cpu": True,
}


@cache
def digits(max_images: int = 64, labels_per_class: int = 4) -> ImageData:
    """Real digits, some of them labelled."""
    return load_image_data(DataArguments("digits", labels_per_class=labels_per_class, max_images=max_images))


def tiny_digit_model(**overrides) -> BPGCNForImageClassification:
    """Width 16, two layers, with dropout in backbone and head, from the same weights each time."""
    set_seed(0)
    backbone = overrides.pop("backbone_config", None) or tiny_backbone(hidden_size=16, hidden_dropout_prob=0.1)
    fields = {
        "num_labels": 10,
        "num_neighbors": 4,
        "ranking_temperature": 0.1,
        "head_hidden_size": 16,
        "head_num_attention_heads": 2,
    }
    return BPGCNForImageClassification(BPGCNConfig(backbone_config=backbone, **(fields | overrides)))


def arguments(output_dir, **overrides) -> BPGCNTrainingArguments:
    """Six steps of 16 images on the CPU, each logged."""
    fields = {
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return BPGCNTrainingArguments(output_dir=str(output_dir), **(fields | overrides))


def digit_trainer(
    output_dir,
    model=None,
    *,
    augmentation: str = "shift",
    data: ImageData | None = None,
    curves: bool = False,
    **overrides,
) -> BPGCNTrainer:
    """A trainer on `digits()`, seeded; without the picture of its curves, which takes longer than the run."""
    data = data or digits()
    plain = image_transform(PROCESSOR)
    trainer = BPGCNTrainer(
        tiny_digit_model() if model is None else model,
        arguments(output_dir, **overrides),
        train_dataset=data.train.with_transform(image_transform(PROCESSOR, augmentation)),
        support_dataset=data.train.with_transform(plain),
        eval_dataset=data.test.with_transform(plain),
        processing_class=PROCESSOR,
    )
    if not curves:
        trainer.remove_callback(CurvesCallback)
    return trainer


def trained(*arguments, **options) -> BPGCNTrainer:
    """`digit_trainer`, trained."""
    trainer = digit_trainer(*arguments, **options)
    trainer.train()
    return trainer


def parameters(model) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logged(trainer, name: str) -> list[float]:
    """What the training logs say of one value."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


def write_recipe(folder: Path, **changes) -> Path:
    """`RECIPE` with changes (None removes a line) as a file."""
    settings = {name: value for name, value in (RECIPE | changes).items() if value is not None}
    path = folder / "recipe-of-the-test.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def script_environment() -> dict[str, str]:
    """The environment of a script: offline as the tests are, one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start_training(*arguments, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """`train.py` as its own process, from the root of the repository."""
    command = [*(launcher or (sys.executable,)), "train.py", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen) -> str:
    """SIGKILL a process and all that it started (a launcher's workers are in sessions of their own); what it said."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return process.communicate()[0]


def train(*arguments, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run `train.py` to its end; the output holds both streams."""
    process = start_training(*arguments, launcher=launcher)
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"train.py did not end:\n{kill(process)}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def wait_for(process: subprocess.Popen, path: Path, timeout: float = 60) -> None:
    """Wait until a running training has written a file."""
    deadline = time.monotonic() + timeout
    while not path.is_file():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{path} was not written:\n{kill(process)}")
        time.sleep(0.005)


def kill_after_checkpoint(process: subprocess.Popen, checkpoint: Path) -> None:
    """Kill a training without warning once a checkpoint is whole, before it is done."""
    wait_for(process, checkpoint / "trainer_state.json")
    output = kill(process)
    assert process.returncode == -signal.SIGKILL, output
