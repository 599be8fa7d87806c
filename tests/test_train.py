"""`train.py` as people run it: real processes, real files, killed and started again."""

import ast
import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import PIL.Image
import pytest
import yaml
from transformers import pipeline

from modeling_bpgcn.training.run_folder import last_whole_checkpoint
from tests.training_factory import (
    ROOT,
    digits,
    kill_after_checkpoint,
    script_environment,
    start_training,
    train,
    write_recipe,
)

# 8 batches an epoch and a checkpoint each 7 steps: no checkpoint falls on the end of an epoch
RUN = {"per_device_train_batch_size": 12, "labeled_batch_fraction": None, "max_steps": 50, "save_steps": 7}
CHECKPOINTS = {f"checkpoint-{step}" for step in (*range(7, 50, 7), 50)}
MADE = {
    "README.md",
    "config.json",
    "example.png",
    "model.safetensors",
    "neighbors.png",
    "preprocessor_config.json",
    "recipe.yaml",
    "results.json",
    "run.json",
    "support_thumbnails.parquet",
    "training_curves.png",
    "trainer_state.json",
}


def of_run(output: str, number: int) -> str:
    """The n-th of the commands that a run printed, with the interpreter of the tests."""
    commands = [line.strip() for line in output.splitlines() if line.startswith("    .venv/bin/")]
    assert len(commands) == 4, output
    return commands[number].replace(".venv/bin/", f"{Path(sys.executable).parent}/")


def shell(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def digit_run(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run and what it printed."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = write_recipe(folder, **RUN, baselines="all", report_to="tensorboard")
    done = train(recipe, "--output_dir", folder / "run")
    assert done.returncode == 0, done.stdout
    return folder / "run", done.stdout


# --- from start to end ------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_table_a_model_pictures_and_a_card(digit_run):
    folder, output = digit_run
    names = {path.name for path in folder.iterdir()}
    assert names >= MADE | CHECKPOINTS
    results = json.loads((folder / "results.json").read_text())
    assert [row["method"] for row in results] == [
        "frozen features, linear",
        "frozen features, fixed graph, gcn head",
        "frozen features, fixed graph, label propagation",
        "trained backbone, linear head",
        "BPGCN, from the support bank",
    ]
    for row in results:
        assert 0 <= row["accuracy"] <= 1
        assert re.search(rf"^{re.escape(row['method'])} +{100 * row['accuracy']:.1f} ", output, re.MULTILINE), output
    for name in ("training_curves.png", "neighbors.png", "example.png"):
        with PIL.Image.open(folder / name) as image:
            image.load()
    card = (folder / "README.md").read_text()
    assert "**BPGCN, from the support bank**" in card
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["num_neighbors"] == 4


def test_the_run_learned(digit_run):
    folder, _ = digit_run
    own = json.loads((folder / "results.json").read_text())[-1]
    assert own["accuracy"] > 0.2  # ten steps; chance is 0.1
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["head_loss"] for entry in history if "loss" in entry]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), losses


def test_the_first_command_classifies_an_image_in_a_clean_process(digit_run):
    folder, output = digit_run
    done = shell(of_run(output, 0))
    assert done.returncode == 0, done.stderr
    answers = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert {answer["label"] for answer in answers} <= {str(digit) for digit in range(10)}
    here = pipeline("image-classification", model=str(folder))(str(folder / "example.png"))
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in here]
    assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in here], abs=1e-6)


def test_the_second_command_serves_the_demo(digit_run):
    _, output = digit_run
    command = [*shlex.split(of_run(output, 1)), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=script_environment(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline().startswith("The demo is at http://127.0.0.1:")
        finally:
            server.terminate()


def test_the_third_command_trains_with_half_of_the_labels(digit_run):
    folder, output = digit_run
    command = of_run(output, 2)
    assert "--labels_per_class 3 " in command
    done = shell(command)
    assert done.returncode == 0, done.stdout + done.stderr
    fewer = Path(shlex.split(command)[-1])
    assert fewer == folder.with_name("run-fewer-labels")
    assert "30 of 96 training images labelled" in done.stdout
    assert json.loads((fewer / "run.json").read_text())["labels_per_class"] == 3


def test_the_fourth_command_shows_the_logs_in_a_browser(digit_run):
    _, output = digit_run
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*shlex.split(of_run(output, 3)), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=script_environment(), stderr=subprocess.PIPE, text=True)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 60
    try:
        runs = []
        while not runs:  # it reads the logs after it has begun to answer
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < deadline, "no answer in a minute"
            with contextlib.suppress(OSError), opener.open(f"http://127.0.0.1:{port}/data/runs", timeout=10) as page:
                runs = json.load(page)
            time.sleep(0.2)
        with opener.open(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert b"TensorBoard" in page.read()
        with opener.open(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", timeout=10) as page:
            tags = {tag for tags in json.load(page).values() for tag in tags}
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert any(str(run).startswith("runs") for run in runs)
    assert {"train/loss", "train/ranking_gradient_norm", "train/effective_neighbors", "train/homophily"} <= tags


# --- killed and started again -----------------------------------------------------------------------------------------


def test_a_run_killed_in_the_middle_of_an_epoch_ends_bit_for_bit_as_an_uninterrupted_one(digit_run, tmp_path):
    """The uninterrupted run also measured baselines and wrote logs: neither may change the result."""
    command = (write_recipe(tmp_path, **RUN), "--output_dir", tmp_path / "run")
    process = start_training(*command)
    kill_after_checkpoint(process, tmp_path / "run" / "checkpoint-14")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    checkpoint = Path(last_whole_checkpoint(tmp_path / "run"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 14 <= state["global_step"] < 50
    assert state["epoch"] > 1
    assert state["epoch"] % 1 != 0

    done = train(*command)
    assert done.returncode == 0, done.stdout
    whole, _ = digit_run
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    own = [json.loads((folder / "results.json").read_text())[-1] for folder in (tmp_path / "run", whole)]
    assert own[0] == own[1]


# --- a folder of images -----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    """Real PNGs of three classes, to train on and to test on, and a broken one."""
    folder, data = tmp_path / "photos", digits(400, 1)
    for split, images, most in (("train", data.test, 12), ("test", data.test, 20)):
        for digit in (0, 1, 7):
            rows = [row for row, label in enumerate(images["label"]) if label == digit]
            place = folder / split / f"digit {digit}"
            place.mkdir(parents=True)
            for row in rows[:most] if split == "train" else rows[12:most]:
                images[row]["image"].resize((16, 16)).save(place / f"{row}.png")
    whole = next((folder / "train" / "digit 7").iterdir())
    (folder / "train" / "digit 7" / "broken.png").write_bytes(whole.read_bytes()[:-40])
    return folder


FOLDER = {"max_images": None, "labels_per_class": None, "max_steps": 3, "save_steps": 2}


def test_a_broken_image_ends_the_run_before_training_or_is_skipped_on_request(photos, tmp_path):
    recipe = write_recipe(tmp_path, **FOLDER, dataset=str(photos), output_dir=str(tmp_path / "run"))
    refused = train(recipe)
    assert refused.returncode == 1
    assert str(photos / "train" / "digit 7" / "broken.png") in refused.stdout
    assert "--skip_unreadable_images" in refused.stdout
    assert "'loss'" not in refused.stdout
    assert not (tmp_path / "run").exists()

    done = train(recipe, "--skip_unreadable_images", "true")
    assert done.returncode == 0, done.stdout
    assert "broken.png" in done.stdout
    assert "24 test images, never seen in training; 36 of 36 training images labelled." in done.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= MADE
    picture = next((photos / "test" / "digit 7").iterdir())
    answers = pipeline("image-classification", model=str(tmp_path / "run"))(str(picture))
    assert {answer["label"] for answer in answers} == {"digit 0", "digit 1", "digit 7"}
