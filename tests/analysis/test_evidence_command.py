"""`benchmarks/evidence.py` as a command: killed, it goes on where it stopped; and the recipes are what it measures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modeling_bpgcn.analysis.evidence_cells import cell_key, read_cells
from modeling_bpgcn.analysis.experiment import CONFIG, TRAINING
from tests.analysis.evidence_images import write_backbone, write_images

ROOT = Path(__file__).parents[2]
NUM_CELLS = 5  # the main arms on one fold


def command(folder: Path) -> list[str]:
    options = ["--image_size", "8", "--trainable_blocks", "1", "--quick", "--folds", "1", "--workers", "1"]
    paths = ["--data", folder / "images", "--backbone", folder / "backbone", "--output", folder / "out"]
    return [sys.executable, str(ROOT / "benchmarks/evidence.py"), *map(str, paths), *options]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped_and_reports(tmp_path):
    write_images(tmp_path / "images")
    write_backbone(tmp_path / "backbone")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cells = tmp_path / "out" / "cells.jsonl"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command(tmp_path), env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not cells.is_file() or len(cells.read_text().splitlines()) < 2:
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.02)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    before = cells.read_text().splitlines()
    assert 2 <= len(before) < NUM_CELLS
    cells.write_text("\n".join([*before, before[0][:40]]))  # the line that the kill tore
    again = subprocess.run(command(tmp_path), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    whole = read_cells(cells)
    assert len({cell_key(cell) for cell in whole}) == NUM_CELLS
    assert [json.loads(line)["seconds"] for line in before] == [cell["seconds"] for cell in whole[: len(before)]]
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "detached" in report
    assert (tmp_path / "out" / "report" / "embedding-images.png").is_file()


def test_the_recipes_are_what_is_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import evidence
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    for data in ("flowers17", "trashnet"):
        recipe = yaml.safe_load((ROOT / "configuration" / f"{data}.yaml").read_text())
        measured = CONFIG | TRAINING | evidence.chosen({"arm": "full", "data": data})
        del measured["bf16"]  # only saves time
        assert {name: recipe[name] for name in measured} == measured
