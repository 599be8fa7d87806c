"""`accelerate launch` as people run it, with two processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import torch

from tests.training_factory import ROOT, script_environment

# port 0: any free one, since other tests may run at the same time
LAUNCHER = (
    str(Path(sys.executable).with_name("accelerate")),
    "launch",
    "--config_file",
    "configuration/accelerate/two_cpu_processes.yaml",
    "--main_process_port",
    "0",
)


def launched(script: str, folder: Path, *arguments: str, launcher: tuple[str, ...] = LAUNCHER) -> list[dict]:
    """What each of two processes has saved as `rankN.pt` in the folder, the first argument of their script."""
    path = folder.with_suffix(".py")
    path.write_text(script)
    done = subprocess.run(
        [*launcher, str(path), str(folder), *arguments],
        cwd=ROOT,
        env=script_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
