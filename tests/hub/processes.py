"""Python processes that talk to the fake Hub: with the package, or where it cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path
from site import getsitepackages

from tests.training_factory import ROOT

OWN = ("modeling_bpgcn", "bpgcn-", "_editable_impl_bpgcn", "__editable__", "bpgcn.")


class HubProcess:
    """Runs scripts against a Hub, each in a new process with caches of its own and nothing of this process's settings.

    Args:
        folder: for the caches and a site folder without this package, however it is installed here.
        url: of the Hub.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.number = folder, url, 0
        self.site = folder / "site-packages"
        self.site.mkdir()
        for installed in getsitepackages():
            for path in Path(installed).iterdir():
                if not path.name.startswith(OWN):
                    (self.site / path.name).symlink_to(path)

    def run(self, script: str, *arguments, package: bool, token: str | None = None, cwd: Path | None = None) -> str:
        """What a script prints; with `package` it can import this checkout, without it nothing of it."""
        self.number += 1
        home = self.folder / f"home-{self.number}"
        home.mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MPLBACKEND": "agg",
            "OMP_NUM_THREADS": "1",
        } | ({"HF_TOKEN": token} if token else {})
        paths = [str(ROOT)] * package + [str(self.site)]
        # -S: no site folder but the one given, and none of its .pth files, which is how an editable install is found
        start = f"import sys; sys.path[:0] = {paths}\nimport torch; torch.set_num_threads(1)\n"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", start + script, *map(str, arguments)],
            cwd=cwd or home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout
