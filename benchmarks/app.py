"""The demo under load: clients that ask it at once, every answer compared with the one computed directly.

    python benchmarks/app.py MODEL IMAGES            # 16 clients for a minute

Each client is a visitor of its own, who over the page's own HTTP interface sends images, turns temperature and k, adds
images to the bank and takes them back, at random. Afterwards the same is asked of a `Demonstration` in this process.
`wrong` differ from it by more than 1e-5 in a probability, `lost` have no answer. Memory is the resident set of the
server, sampled each second after a warm-up, in which the cache of visitors' banks fills: the median of the last third
of the time against that of the first.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gradio
import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn.app.answering import Demonstration
from modeling_bpgcn.app.interface import temperatures
from modeling_bpgcn.app.uploads import open_upload
from modeling_bpgcn.commands.image_files import find_images
from modeling_bpgcn.commands.model_options import load_model
from modeling_bpgcn.training.thumbnails import shrink

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
CLASSES_PART, ALERT_PART = 3, 1  # of a handler's outputs


@dataclass(frozen=True)
class Asked:
    """An image under settings, after images (with their classes) were added, and the probabilities that came."""

    image: str
    temperature: int
    neighbors: int
    added: tuple[tuple[str, int], ...]
    shares: tuple[float, ...]
    seconds: float


class Client(threading.Thread):
    """A visitor: what was asked and answered, and what failed."""

    def __init__(self, number: int, url: str, images: list[str], sizes: tuple[int, int, int], end: float):
        super().__init__()
        self.random, self.url, self.images, self.sizes, self.end = random.Random(number), url, images, sizes, end
        self.session, self.answers, self.errors = f"client-{number}", [], []

    def run(self) -> None:
        """Ask until the end."""
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as self.http:
            dependencies = self.http.get("/config").json()["dependencies"]
            self.handlers = {dependency["api_name"]: dependency["id"] for dependency in dependencies}
            self.image, self.added = None, ()
            while time.monotonic() < self.end:
                try:
                    self.step()
                except Exception as error:
                    self.errors.append(repr(error))

    def step(self) -> None:
        """One thing that a visitor does."""
        steps, most, classes = self.sizes
        settings = self.random.randrange(steps), self.random.randrange(most)
        action = self.random.choice(("choose", "choose", "turn", "turn", "turn", "add", "take_back"))
        if self.image is None or action == "choose":
            self.image = self.random.choice(self.images)
            with Path(self.image).open("rb") as file:
                [path] = self.http.post("/gradio_api/upload", files={"files": file}).raise_for_status().json()
            image = {"path": path, "meta": {"_type": "gradio.FileData"}}
            self.ask("choose", [image, None, *settings], settings)
        elif action == "add" and len(self.added) < 3:
            number = self.random.randrange(classes)
            self.added = *self.added, (self.image, number)
            self.ask("add", [None, None, number, *settings], settings)
        elif action == "take_back" and self.added:
            self.added = self.added[:-1]
            self.ask("take_back", [None, None, *settings], settings)
        else:
            self.ask("turn", [None, None, *settings], settings)

    def ask(self, handler: str, data: list, settings: tuple[int, int]) -> None:
        """Send an event and wait for what it changes."""
        start = time.perf_counter()
        body = {"fn_index": self.handlers[handler], "data": data, "session_hash": self.session}
        self.http.post("/gradio_api/queue/join", json=body).raise_for_status()
        parts = self.completed()
        if "problem" in str(parts[ALERT_PART]):
            raise RuntimeError(parts[ALERT_PART])
        shares = re.findall(
            r'<th scope="row">(.*?)</th><td>.*?<data class="share" value="([^"]+)"', parts[CLASSES_PART]
        )
        values = tuple(float(value) for _, value in shares)
        self.answers.append(Asked(self.image, *settings, self.added, values, time.perf_counter() - start))

    def completed(self) -> list:
        """The outputs of the event that runs."""
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"])
                    return message["output"]["data"]
        raise RuntimeError("the stream ended without an answer")


class Direct:
    """The same answers without a server, features computed once an image."""

    def __init__(self, demonstration: Demonstration):
        self.demonstration, self.temperatures = demonstration, temperatures(demonstration.temperature)
        self.chosen = {}

    def _choose(self, path: str) -> tuple:
        if path not in self.chosen:
            image = open_upload(path)
            self.chosen[path] = shrink(image), self.demonstration.embed(image)
        return self.chosen[path]

    def error(self, asked: Asked) -> float:
        """The largest difference in a probability."""
        added = ()
        for path, number in asked.added:
            added = self.demonstration.add(*self._choose(path), self.demonstration.class_names[number], added)
        features = self._choose(asked.image)[1]
        settings = self.temperatures[asked.temperature], asked.neighbors + 1
        expected = sorted(self.demonstration.answer(features, *settings, added).probabilities.values())
        if len(expected) != len(asked.shares):
            return float("inf")
        return max(abs(a - b) for a, b in zip(expected, sorted(asked.shares), strict=True))


def resident_mib(process: int) -> float:
    """Memory of a process that is not swapped out, on Linux."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", metavar="IMAGES", nargs="+")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm_up", type=float, default=60, help="seconds before, in which caches fill")
    parser.add_argument("--max_images", type=int, default=64, help="different images that are sent")
    options = parser.parse_args()

    files = [file.path for file in find_images(options.images)]
    images = random.Random(0).sample(files, min(options.max_images, len(files)))
    load = argparse.Namespace(model=options.model, revision=None, device=None)
    demonstration = Demonstration(*load_model(load), {})
    direct = Direct(demonstration)
    sizes = len(direct.temperatures), demonstration.max_num_neighbors, len(demonstration.class_names)
    command = [sys.executable, "-m", "modeling_bpgcn", "app", options.model, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(re.search(r"http://\S+", line)[0] for line in server.stdout if "http://" in line)
            start = time.monotonic() + options.warm_up
            end = start + options.seconds
            clients = [Client(number, url, images, sizes, end) for number in range(options.clients)]
            for client in clients:
                client.start()
            time.sleep(options.warm_up)
            memory = []
            while time.monotonic() < end:
                memory.append(resident_mib(server.pid))
                time.sleep(1)
            for client in clients:
                client.join()
        finally:
            server.terminate()

    answers = [answer for client in clients for answer in client.answers]
    errors = [error for client in clients for error in client.errors]
    largest = [direct.error(answer) for answer in answers]
    seconds = sorted(answer.seconds for answer in answers)
    third = len(memory) // 3
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    size = demonstration.model.support_bank.size
    print(f"{options.clients} clients for {options.warm_up:g} + {options.seconds:g} s, {len(images)} images, {size} in")
    print(f"the bank; {os.cpu_count()} cores, gradio {gradio.__version__}, torch {torch.__version__},")
    print(f"Python {platform.python_version()}\n")
    print(
        f"{'answers':>8}{'after adding':>14}{'wrong':>7}{'lost':>6}{'largest error':>15}{'median s':>10}{'95 % s':>8}"
    )
    added = sum(bool(answer.added) for answer in answers)
    wrong = sum(error > TOLERANCE for error in largest)
    middle, slow = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    print(f"{len(answers):>8}{added:>14}{wrong:>7}{len(errors):>6}{max(largest):>15.1e}{middle:>10.2f}{slow:>8.2f}")
    print(
        f"\nmemory of the server: {first:.0f} MiB in the first third, {last:.0f} in the last ({last / first - 1:+.1%})"
    )
    if wrong or errors:
        raise SystemExit("\n".join(sorted(set(errors))) or f"{wrong} answers are wrong")


if __name__ == "__main__":
    main()
