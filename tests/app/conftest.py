"""A small model with pictures of its support images, and the demo as a process that shows it."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.training.thumbnails import write_thumbnails
from tests.analysis.evidence_images import write_backbone, write_images
from tests.training_factory import ROOT

CLASS_NAMES = ["daisy", "rose & thorn", "<b>tulip</b> ${1 + 1} {{value}}"]  # a page must not take one for its own
IN_BANK = 10  # of each class; the other 10 are not
NUM_NEIGHBORS = 4
STARTED = re.compile(r"The demo is at (http://\S+) ")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """`class NUMBER/NUMBER.png`, 20 of each of three classes."""
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def model_folder(pictures, tmp_path_factory) -> Path:
    """A model with ids from 100, of which every fifth has no label, its processor and thumbnails."""
    folder = tmp_path_factory.mktemp("model")
    write_backbone(folder / "backbone")
    torch.manual_seed(0)
    model = BPGCNForImageClassification.from_backbone_pretrained(
        str(folder / "backbone"),
        num_labels=len(CLASS_NAMES),
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: number for number, name in enumerate(CLASS_NAMES)},
        num_neighbors=NUM_NEIGHBORS,
        head_hidden_size=8,
    )
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    rows = [
        {
            "image": Image.open(pictures / f"class {label}" / f"{number}.png"),
            "label": -100 if number % 5 == 4 else label,
            "node_ids": 100 + IN_BANK * label + number,
        }
        for label in range(len(CLASS_NAMES))
        for number in range(IN_BANK)
    ]
    model.build_support_bank(rows, image_processor=processor, progress=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_thumbnails(folder, model.support_bank.ids.tolist(), [row["image"] for row in rows])
    return folder


@dataclass
class App:
    """A running demo: its address, and what it has written to stderr so far."""

    url: str
    process: subprocess.Popen
    errors: list[str]
    reader: threading.Thread


def start(command: list[str], **environment: str) -> App:
    """Run a command of this checkout until it says where the demo is."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors: list[str] = []
    app = App("", process, errors, threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True))
    app.reader.start()
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    for line in process.stdout:
        if found := STARTED.match(line):
            app.url = found[1]
            break
    watchdog.cancel()
    if not app.url:
        stop(app)
        raise AssertionError(f"the demo did not start:\n{''.join(errors)}")
    return app


def stop(app: App) -> int:
    """End it as a shell does, and return its exit status."""
    app.process.terminate()
    try:
        return app.process.wait(timeout=30)
    finally:
        app.process.kill()
        app.reader.join()
        app.process.stdout.close()
        app.process.stderr.close()


@pytest.fixture(scope="session")
def app(model_folder):
    """The demo on a free port of loopback, with uploads of at most 1 MiB and a million pixels."""
    options = ["--port", "0", "--max_upload_mib", "1", "--max_pixels", "1000000"]
    running = start(["-m", "modeling_bpgcn", "app", str(model_folder), *options])
    yield running
    stop(running)
