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
import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_bpgcn.analysis.evidence_cells import append_cell, cell_key, read_cells
from modeling_bpgcn.analysis.experiment import read_images, run_cell
from modeling_bpgcn.analysis.protocol import NUM_FOLDS, make_split

MAIN = ("frozen", "ce", "neighborhood", "detached", "full")
ABLATIONS = ("uniform", "ranking_only", "random")
# chosen for each arm and data set on halves of the labelled images, see evidence.md; the ablations train as `full` does
LEARNING_RATES = {
    "ce": {"default": 2e-4},
    "neighborhood": {"default": 5e-4},
    "full": {"default": 5e-4, "trashnet": 3e-4},
}
FOLDS = range(NUM_FOLDS)
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
    rates = LEARNING_RATES.get(cell["arm"], LEARNING_RATES["full"])
    return {"learning_rate": rates.get(cell["data"], rates["default"])}


def grid(data: list[str], quick: bool) -> list[dict]:
    """The cells of the report, those that tell most first."""
    if quick:
        return product(MAIN, data, range(2), (0,), ("10%",))
    cells = product(MAIN, data, FOLDS, (0,), ("10%", "4"))
    cells += product(ABLATIONS, data, FOLDS, (0,), ("10%",))
    cells += product(MAIN, data, range(3), (0,), ("1", "2", "8"))
    cells += product(MAIN, data, range(3), (0,), ("10%",), noises=(0.1, 0.3))
    cells += product(MAIN, data, FOLDS, (1, 2), ("10%", "4"))
    cells += product(MAIN, data, range(3, NUM_FOLDS), (0,), ("1", "2", "8"))
    return cells + product(MAIN, data, range(3, NUM_FOLDS), (0,), ("10%",), noises=(0.1, 0.3))


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
    return cell | run_cell(images, options.backbone, split, cell["arm"], cell["seed"], settings, trace)


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
    parser.add_argument("--folds", type=int, default=NUM_FOLDS, help="folds of --choose")
    parser.add_argument("--report_only", action="store_true", help="write the report of the cells there are")
    return parser.parse_args(arguments)


def main() -> None:
    """Run, then report."""
    options = parse()
    _prepare()
    names = [Path(folder).name for folder in options.data]
    if options.choose:
        trials = [json.loads(line) for line in options.choose.read_text().splitlines() if line.strip()]
        cells = [
            cell
            for trial in trials
            for cell in product(
                [trial.pop("arm")], names, range(options.folds), (0,), ("10%",), stage="choose", settings=trial
            )
        ]
    else:
        cells = grid(names, options.quick)
    run_all(cells, options)


if __name__ == "__main__":
    main()
