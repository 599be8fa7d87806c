"""Does the gradient through the ranking pay? Every arm on the same splits, as one command that a kill does not undo.

    python benchmarks/evidence.py --data FOLDER [FOLDER ...] --backbone FOLDER_OR_HUB_NAME [--quick]

A FOLDER holds one sub-folder of images a class. Each cell (arm, data, fold, seed, labels, noise) is a line of
`cells.jsonl` in the output folder; started again, the command runs what is missing, then writes the report.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_bpgcn.analysis.arms import TWO_STAGE
from modeling_bpgcn.analysis.evidence_cells import append_cell, cell_key, read_cells
from modeling_bpgcn.analysis.evidence_plots import plot_embedding
from modeling_bpgcn.analysis.evidence_report import write_report
from modeling_bpgcn.analysis.experiment import read_images, run_cell
from modeling_bpgcn.analysis.protocol import NUM_FOLDS, make_split

MAIN = ("frozen", "ce", "neighborhood", "detached", "full")
COMMAND = "python benchmarks/evidence.py --data FOLDER [FOLDER ...] --backbone FOLDER_OR_HUB_NAME"
PICTURED = ("frozen", "full")
ABLATIONS = ("uniform", "ranking_only", "random")
# chosen on halves of the labelled images, see evidence.md; the ablations train as `full` does
SETTINGS = {"default": {"max_steps": 30}, "trashnet": {"max_steps": 60}}
LEARNING_RATES = {
    "default": {"ce": 5e-4, "neighborhood": 2e-4, "full": 5e-4},
    "trashnet": {"ce": 5e-4, "neighborhood": 5e-4, "full": 3e-4},
}
_images = {}


def product(arms, data, folds, seeds, budgets, noises=(0.0,), stage="test", settings=None) -> list[dict]:
    """Cells in the order in which they tell most: all arms of one split before the next split."""
    names = ("stage", "noise", "budget", "seed", "fold", "data", "arm")
    values = itertools.product((stage,), noises, budgets, seeds, folds, data, arms)
    cells = [dict(zip(names, value, strict=True)) for value in values]
    return [cell | {"settings": chosen(cell) if settings is None else settings} for cell in cells]


def chosen(cell: dict) -> dict:
    """What an arm trains with on a data set, beside the defaults of `experiment.TRAINING`."""
    if cell["arm"] == "frozen":
        return {}
    data = cell["data"] if cell["data"] in SETTINGS else "default"
    rates = LEARNING_RATES[data]
    return SETTINGS[data] | {"learning_rate": rates.get(cell["arm"], rates["full"])}


def grid(data: list[str], quick: bool, num_folds: int) -> list[dict]:
    """The cells of the report, those that tell most first."""
    if quick:
        return product(MAIN, data, range(min(2, num_folds)), (0,), ("10%",))
    folds = range(num_folds)
    few, rest = folds[:3], folds[3:]
    cells = product(MAIN, data, folds, (0,), ("10%",))
    cells += product(MAIN, data, folds, (0,), ("4",))
    cells += product(ABLATIONS, data, few, (0,), ("10%",))
    cells += product(MAIN, data, few, (0,), ("1", "2", "8"))
    cells += product(MAIN, data, few, (0,), ("10%",), noises=(0.1, 0.3))
    cells += product(MAIN, data, folds, (1, 2), ("10%", "4"))
    cells += product(ABLATIONS, data, rest, (0,), ("10%",))
    cells += product(MAIN, data, rest, (0,), ("1", "2", "8"))
    return cells + product(MAIN, data, rest, (0,), ("10%",), noises=(0.1, 0.3))


def run(cell: dict, folder: str, options: argparse.Namespace) -> dict:
    """One cell, in a process of its own; the data set stays open for the next."""
    torch.set_num_threads(options.threads)
    blocks = cell["settings"].get("trainable_blocks", options.trainable_blocks)
    if (folder, blocks) not in _images:
        cache = options.output / "prefix" / f"{cell['data']}-{blocks}"
        _images[folder, blocks] = read_images(folder, options.backbone, options.image_size, blocks, cache)
    images = _images[folder, blocks]
    names = ("fold", "seed", "budget", "noise", "stage")
    split = make_split(images.classes, **{name: cell[name] for name in names})
    trace = cell["stage"] == "test" and cell["seed"] == 0 and cell["fold"] < 2 and cell["noise"] == 0
    settings = {"trainable_blocks": blocks} | cell["settings"]
    pictured = trace and cell["fold"] == 0 and cell["budget"] == "10%" and cell["arm"] in PICTURED
    features_file = features_path(options.output, cell["data"], cell["arm"]) if pictured else None
    return cell | run_cell(images, options.backbone, split, cell["arm"], cell["seed"], settings, trace, features_file)


def features_path(output: Path, data: str, arm: str) -> Path:
    """Where the features of an arm are kept for the pictures of its clusters."""
    return output / "features" / f"{data}-{arm}.npz"


def _prepare() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker whose command was killed would go on for nobody
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def run_all(cells: list[dict], options: argparse.Namespace) -> None:
    """Run what the file lacks, as many at a time as there are workers; each line is written when its cell is done."""
    path = options.output / "cells.jsonl"
    done = {cell_key(cell) for cell in read_cells(path)} if path.is_file() else set()
    missing = [cell for cell in cells if cell_key(cell) not in done]
    folders = {Path(folder).name: folder for folder in options.data}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context, initializer=_prepare) as pool:
        running = [pool.submit(run, cell, folders[cell["data"]], options) for cell in missing]
        try:
            for future in tqdm(as_completed(running), total=len(running), desc="Cells", unit=" cells"):
                append_cell(path, future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or it would run the rest before it says what is wrong
            raise


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders with one sub-folder of images a class")
    parser.add_argument("--backbone", required=True, help="pretrained backbone: a folder or a Hub name")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="where cells and report go")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--trainable_blocks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--quick", action="store_true", help="two folds, one seed, the main arms")
    parser.add_argument("--choose", type=Path, help="run these settings (JSON lines) on halves of the labelled images")
    parser.add_argument("--folds", type=int, default=NUM_FOLDS, help="use only the first so many of the ten folds")
    parser.add_argument("--report_only", action="store_true", help="write the report of the cells there are")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace, planned: list[dict], data: list[str]) -> Path:
    """The report of the cells there are, with the features before and after training."""
    cells = read_cells(options.output / "cells.jsonl")
    path = write_report(cells, options.output / "report", command=COMMAND, planned=planned)
    for name in data:
        files = [features_path(options.output, name, arm) for arm in PICTURED]
        if all(file.is_file() for file in files):
            before, after = (np.load(file) for file in files)
            picture = options.output / "report" / f"embedding-{name}.png"
            plot_embedding(before["features"], after["features"], before["classes"], picture)
    return path


def choices(cells: list[dict]) -> str:
    """How the settings tried did on the labelled images kept for the choice, best answer of each arm first."""
    tried = {}
    for cell in cells:
        if cell["stage"] == "choose":
            key = cell["data"], cell["arm"], json.dumps(cell["settings"], sort_keys=True)
            tried.setdefault(key, []).append(cell["answers"])
    lines = [
        "| data | arm | settings | folds | best answer | accuracy | NLL |",
        "| --- | --- | --- | ---: | --- | ---: | ---: |",
    ]
    for (data, arm, settings), answers in sorted(tried.items()):
        names = [name for name in answers[0] if not name.startswith("inductive")]
        means = {n: [sum(a[n][m] for a in answers) / len(answers) for m in ("accuracy", "nll")] for n in names}
        best = max(names, key=lambda n: means[n][0]) if arm in TWO_STAGE else "transductive"
        accuracy, nll = means[best]
        lines.append(f"| {data} | {arm} | {settings} | {len(answers)} | {best} | {100 * accuracy:.1f} | {nll:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run, then report."""
    options = parse()
    _prepare()
    names = [Path(folder).name for folder in options.data]
    if options.choose:
        trials = [json.loads(line) for line in options.choose.read_text().splitlines() if line.strip()]
        cells = []
        for trial in trials:
            arm = trial.pop("arm")
            cells += product([arm], names, range(options.folds), (0,), ("10%",), stage="choose", settings=trial)
    else:
        cells = grid(names, options.quick, options.folds)
    if not options.report_only:
        run_all(cells, options)
    if options.choose:
        print(choices(read_cells(options.output / "cells.jsonl")))
    else:
        print(f"Report: {report(options, cells, names)}")


if __name__ == "__main__":
    main()
