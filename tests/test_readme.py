"""README.md and the model card say what is true: their snippets run, their commands parse, their files exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from modeling_bpgcn.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which `make demo` seems to have run, with fewer steps."""
    folder = tmp_path_factory.mktemp("readme")
    quick = ["--max_steps", "4", "--baselines", "none", "--output_dir", "runs/digits", "--report_to", "none"]
    _run([str(ROOT / "train.py"), str(ROOT / "configuration/digits.yaml"), *quick], folder)
    return folder


def _run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("number", range(len(SNIPPET.findall(README))))
def test_python_snippets_of_the_readme_run(folder, number):
    assert _run(["-c", SNIPPET.findall(README)[number]], folder).strip()


def test_snippets_of_the_model_card_run(folder):
    Image.open(folder / "runs/digits/example.png").convert("RGB").save(folder / "image.jpg")
    snippets = SNIPPET.findall((folder / "runs/digits/README.md").read_text(encoding="utf-8"))
    assert len(snippets) == 2
    for snippet in snippets:
        assert _run(["-c", snippet], folder).strip()


def test_training_commands_of_the_readme_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = [line.strip() for line in README.splitlines() if re.match(r" +accelerate launch", line)]
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command.partition("train.py")[2])
        parse_arguments([*words, *([] if "--output_dir" in words else ["--output_dir", str(tmp_path)])])


def test_options_of_the_readme_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^\| (`--.*?) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for cell in rows:
        for options in re.findall(r"`(--[^`]*)`", cell):
            recipe = "flowers17" if "--labeled_fraction" in options else "digits"
            parse_arguments([f"configuration/{recipe}.yaml", "--dataset", "digits", *shlex.split(options)])


def test_files_that_the_readme_names_exist():
    names = set(re.findall(r"\((docs/[^)]*)\)|(configuration/[\w/]+\.yaml)", README))
    assert len(names) >= 3
    for pair in names:
        assert (ROOT / (pair[0] or pair[1])).is_file(), pair
