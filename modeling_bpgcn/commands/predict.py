"""Classes of image files, with probabilities and, if asked for, the support images that each answer rests on."""

import argparse
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from .image_files import ImageReader, find_images, printable
from .model_options import add_model_options, at_least, load_model, reader_options
from .support_files import class_names, read_support_files

WIDEST_FILE, WIDEST_CLASS = 60, 30  # columns of the table; what is longer pushes the rest of its row aside


def main(arguments: list[str] | None = None) -> None:
    """Answer for every image that can be read.

    Raises:
        SystemExit: 1 after naming the images that could not be read; 2 after saying what is wrong with the options or
            the model.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    lines = (options.format or ("jsonl" if options.output else "table")) == "jsonl"
    try:
        if options.output and Path(options.output).exists() and not options.overwrite:
            raise ValueError(f"--output {options.output} exists: name another file, or pass --overwrite to replace it.")
        model, processor = load_model(options)
        files = read_support_files(model, options.model, options.revision) if options.neighbors else {}
        output = _opened(options) if options.output else nullcontext()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    paths = [file.path for file in find_images(options.images)]
    rows = [{"path": path, "bytes": None} for path in paths]
    reader = ImageReader(rows, paths, processor, model.device, **reader_options(options))
    table = Table(paths, model, options)
    with output as file:
        if not lines:
            _write(file, table.header())
        for answers in predict(model, reader, options.top_k, options.neighbors, files):
            text = [json.dumps(answer) for answer in answers] if lines else table.rows(answers)
            _write(file, "\n".join(text))
    reader.finish()


def _opened(options: Namespace) -> TextIO:
    return Path(options.output).open("w" if options.overwrite else "x", encoding="utf-8", errors="backslashreplace")


def _parser() -> ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_bpgcn predict", description=__doc__)
    add_model_options(parser)
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="Files, folders (with all below) or globs.")
    parser.add_argument("--top_k", type=at_least(1), default=1, help="Classes of each image, best first. Default: 1.")
    parser.add_argument(
        "--neighbors",
        type=at_least(0),
        default=0,
        help="Support images of each answer, weightiest first; at most the model's num_neighbors. Default: 0.",
    )
    parser.add_argument(
        "--format",
        choices=("table", "jsonl"),
        help="A table, or a JSON object on each line. Default: jsonl into a file, else table.",
    )
    parser.add_argument("--output", metavar="FILE", help="Write here instead of to the terminal.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an output file that exists.")
    return parser


@torch.inference_mode()
def predict(
    model: BPGCNForImageClassification, reader: ImageReader, top_k: int, neighbors: int, files: dict[int, str]
) -> Iterator[list[dict]]:
    """Answers batch by batch, one for each file in its order, as `--format jsonl` has them.

    An answer has `file` and either `error` or `predictions` (`class` and `probability`, best first), with `neighbors`
    also these: `id`, `class` (None: unknown), `weight` and, where `files` has it, `file` of each support image.
    """
    names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
    support = list(zip(model.support_bank.ids.tolist(), class_names(model), strict=True)) if neighbors else []
    for batch in reader:
        answers = {row: {"file": reader.names[row], "error": reason} for row, reason in batch.failures.items()}
        if batch.rows:
            outputs = model(pixel_values=batch.pixel_values)
            best = _best(outputs.logits.softmax(-1), top_k)
            rests_on = [[]] * len(batch.rows)
            if neighbors:
                nearest = _best(outputs.neighbor_weights, neighbors)
                indices = outputs.neighbor_indices.tolist()
                rests_on = [[(row[i], w) for i, w in near] for row, near in zip(indices, nearest, strict=True)]
            for row, found, near in zip(batch.rows, best, rests_on, strict=True):
                answer = {"file": reader.names[row]}
                answer["predictions"] = [{"class": names[c], "probability": p} for c, p in found]
                if neighbors:
                    answer["neighbors"] = [_neighbor(*support[index], weight, files) for index, weight in near]
                answers[row] = answer
        yield [answers[row] for row in sorted(answers)]


def _best(values: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Column and value of the largest of each row [B, n], in falling order."""
    top = values.float().topk(min(count, values.shape[-1]))
    return [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _neighbor(id_: int, class_name: str | None, weight: float, files: dict[int, str]) -> dict:
    neighbor = {"id": id_, "class": class_name, "weight": weight}
    return neighbor | {"file": files[id_]} if id_ in files else neighbor


class Table:
    """Rows for a terminal, in columns whose widths are known before the first answer."""

    def __init__(self, paths: list[str], model: BPGCNForImageClassification, options: Namespace):
        self.neighbors = options.neighbors
        self.file_width = _width(["file", *map(printable, paths)], WIDEST_FILE)
        self.class_width = _width(["class", *(printable(str(n)) for n in model.config.id2label.values())], WIDEST_CLASS)

    def header(self) -> str:
        return self._row("file", "class", "probability", "neighbors" if self.neighbors else "")

    def rows(self, answers: list[dict]) -> list[str]:
        """A row for each class of each answer, the neighbours in the first of them."""
        lines = []
        for answer in answers:
            file, near = printable(answer["file"]), ", ".join(map(_shown, answer.get("neighbors", [])))
            if "error" in answer:
                lines.append(self._row(file, "-", "-", ""))
            for found in answer.get("predictions", []):
                lines.append(self._row(file, printable(found["class"]), f"{found['probability']:.4f}", near))
                file = near = ""
        return lines

    def _row(self, file: str, class_name: str, probability: str, neighbors: str) -> str:
        cells = (file.ljust(self.file_width), class_name.ljust(self.class_width), probability.rjust(11), neighbors)
        return "  ".join(cells).rstrip()


def _width(cells: list[str], widest: int) -> int:
    return min(widest, max(map(len, cells)))


def _shown(neighbor: dict) -> str:
    image = neighbor.get("file", f"#{neighbor['id']}")
    return f"{printable(image)} {printable(neighbor['class'] or 'unknown')} {neighbor['weight']:.3f}"


def _write(file: TextIO | None, text: str) -> None:
    if file is None:
        tqdm.write(text, file=sys.stdout)  # above the progress bar, where both are on one terminal
    else:
        print(text, file=file, flush=True)
