"""How good a model is on labeled images: its answers, its neighbors, and its features as a retrieval system."""

import argparse
import json
import sys
from argparse import ArgumentParser, Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from torch import Tensor

from ..analysis.ranking_metrics import ranking_quality
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.metrics import classification_metrics
from ..training.sources import find_split, load_splits, read_classes, read_images, same_split
from .image_files import ImageReader
from .model_options import UNKNOWN, add_model_options, class_numbers, load_model, reader_options

QUERIES_AT_ONCE = 512
SAME_IMAGE = 1 - 1e-6  # cosine of two features of one picture
# name: how the table calls it
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": "expected calibration error",
    "neighbor_homophily": "neighbor homophily",
    "map": "retrieval mAP",
    "recall": "retrieval recall@{k}",
}


class LabeledImages(NamedTuple):
    """`files`, rows of `path` and `bytes`, their `names` and `labels` [N]; `split` is what they are called."""

    files: list[dict]
    names: list[str]
    labels: Tensor
    split: str


class Answers(NamedTuple):
    """Of N images: features [N, D], log-probabilities [N, C], and the classes of the k neighbours [N, k]."""

    features: Tensor
    logits: Tensor
    neighbor_classes: Tensor


def main(arguments: list[str] | None = None) -> None:
    """Print the metrics as a table or as JSON.

    Raises:
        SystemExit: 1 after naming the images that could not be read, which count nowhere; 2 after saying what is wrong
            with the options, the model or the data.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        model, processor = load_model(options)
        data = load_labeled_images(options, model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    reader = ImageReader(data.files, data.names, processor, model.device, **reader_options(options))
    rows, answers = answer(model, reader, options.transductive)
    if not rows:
        reader.finish()
    results = metrics(model, answers, data.labels[rows])
    about = {
        "model": options.model,
        "data": options.data,
        "split": data.split,
        "images": len(rows),
        "unreadable": len(reader.failures),
        "support_images": model.support_bank.size,
        "protocol": "transductive" if options.transductive else "inductive",
        "num_neighbors": model.config.num_neighbors,
    }
    print(json.dumps(about | results, indent=2) if options.format == "json" else _table(about, results))
    reader.finish()


def _parser() -> ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_bpgcn evaluate", description=__doc__)
    add_model_options(parser)
    help_of_data = "A folder with one sub-folder of images per class, a data set on the Hub, parquet, or `digits`."
    parser.add_argument("data", metavar="DATA", help=help_of_data)
    parser.add_argument("--dataset_config", help="Name of the configuration of a Hub data set.")
    parser.add_argument("--split", help="Split of the images. Default: test, else validation, else the only one.")
    parser.add_argument("--image_column", help="Column of the images. Default: the only one.")
    parser.add_argument("--label_column", help="Column of the classes. Default: the only one.")
    parser.add_argument(
        "--transductive",
        action="store_true",
        help="Let all images and the support bank be one graph, instead of answering each from the bank alone.",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="Default: table.")
    return parser


def load_labeled_images(options: Namespace, model: BPGCNForImageClassification) -> LabeledImages:
    """The images of known class of the split that is asked for, undecoded.

    Raises:
        OSError: there are no such data.
        ValueError: the split cannot be chosen, or has no class, or one that the model does not know.
    """
    splits = load_splits(options.data, options.dataset_config)
    name = _choose_split(splits, options.split)
    images = read_images(splits[name], name, options.image_column).cast_column("image", Image(decode=False))
    values, _ = read_classes(splits[name], name, options.label_column)
    values = [None if value is None else str(value) for value in values]
    labels = class_numbers(values, model.config, f"DATA {options.data}")
    known = (labels != UNKNOWN).nonzero()[:, 0]
    if not len(known):
        raise ValueError(f"DATA {options.data} has no image of known class in split {name}: nothing can be measured.")
    files = [row["image"] or {"path": None, "bytes": None} for row in images.select(known.tolist())]
    names = [file["path"] or f"row {row} of split {name}" for row, file in zip(known.tolist(), files, strict=True)]
    return LabeledImages(files, names, labels[known], name)


def _choose_split(splits: dict[str, Dataset], wanted: str | None) -> str:
    if wanted is not None:
        return find_split(splits, wanted, "--split")
    for usual in ("test", "validation"):
        for name in splits:
            if same_split(name, usual):
                return name
    if len(splits) > 1:
        raise ValueError(f"the data set has the splits {', '.join(splits)}: choose one with --split")
    return next(iter(splits))


@torch.inference_mode()
def answer(
    model: BPGCNForImageClassification, reader: ImageReader, transductive: bool
) -> tuple[list[int], Answers | None]:
    """The rows that could be read, and the answers for them, on the CPU."""
    rows, parts = [], []
    classes = model.support_bank.classes
    for batch in reader:
        if not batch.rows:
            continue
        rows += batch.rows
        outputs = model(pixel_values=batch.pixel_values, support="none" if transductive else "bank")
        if transductive:
            parts.append(outputs.features)
        else:
            parts.append(Answers(outputs.features, outputs.logits, classes[outputs.neighbor_indices]))
    if not rows:
        return rows, None
    if transductive:
        features = torch.cat(parts)
        outputs = model(features=features, support="transductive")
        classes = torch.cat([classes, classes.new_full((len(rows),), UNKNOWN)])
        parts = [Answers(features, outputs.logits, classes[outputs.neighbor_indices])]
    return rows, Answers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


@torch.inference_mode()
def metrics(model: BPGCNForImageClassification, answers: Answers, labels: Tensor) -> dict[str, float]:
    """Those of `METRICS` that there are: none of retrieval where the bank holds no image of known class.

    Retrieval ranks the images of known class in the bank by cosine; mAP leaves out queries whose class it lacks.
    """
    results = classification_metrics(answers.logits, labels, answers.neighbor_classes)
    classes, features = model.support_bank.classes.cpu(), model.support_bank.features.cpu().float()
    support, M = features[classes >= 0], int((classes >= 0).sum())
    if not M:
        return results
    unit = F.normalize(support, dim=-1).T
    queries = F.normalize(answers.features.float(), dim=-1).split(QUERIES_AT_ONCE)
    if held := sum(int((rows @ unit > SAME_IMAGE).any(-1).sum()) for rows in queries):
        print(
            f"{held} of {len(labels)} images look as if they were in the support bank too, with their class: the"
            " figures are too good. Leave them out of the data or of the bank.",
            file=sys.stderr,
        )
    nodes, classes = torch.cat([support, answers.features.float()]), torch.cat([classes[classes >= 0], labels])
    k = model.config.num_neighbors
    quality = ranking_quality(nodes, classes, torch.arange(M, len(nodes)), torch.arange(M), k)
    if not quality["average_precision"].isnan().all():
        results["map"] = quality["average_precision"].nanmean().item()
    return results | {"recall": quality["recall"].mean().item()}


def _table(about: dict, results: dict[str, float]) -> str:
    lines = [
        f"{about['model']} on {about['images']} images of {about['data']}, split {about['split']}",
        f"{about['protocol']}, from {about['support_images']} support images",
        "",
    ]
    names = {name: shown.format(k=about["num_neighbors"]) for name, shown in METRICS.items() if name in results}
    width = max(map(len, names.values()))
    return "\n".join(lines + [f"{shown.ljust(width)}  {results[name]:.4f}" for name, shown in names.items()])
