"""The support bank that a model answers from, built from or extended by image files, and saved with the model."""

import argparse
import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.thumbnails import THUMBNAILS_FILE, Thumbnails, open_thumbnail, read_thumbnails, write_thumbnails
from .image_files import ImageFile, ImageReader, find_images
from .model_options import UNKNOWN, add_model_options, class_numbers, load_model, reader_options
from .support_files import read_support_files, write_support_files

LABEL_COLUMNS = ("file", "class")


def main(arguments: list[str] | None = None) -> None:
    """Embed every image that can be read, and save the model with them as its support bank, or in it.

    Raises:
        SystemExit: 1 after naming the images that could not be read, which are not in the bank; 2 after saying what is
            wrong with the options, the model or the classes.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if (Path(options.output) / "config.json").exists() and not options.overwrite:
            raise ValueError(f"--output {options.output} holds a model: name another folder, or pass --overwrite.")
        model, processor = load_model(options, with_bank=False)
        files = find_images(options.images)
        labels = support_labels(files, options.labels)
        classes = class_numbers(labels, model.config, options.labels or f"IMAGES {' '.join(options.images)}")
        held = read_support_files(model, options.model, options.revision) if options.add else {}
        thumbnails = read_thumbnails(options.model, model, options.revision) if options.add else Thumbnails({})
        paths = [file.path for file in files]
        rows = [{"path": path, "bytes": None} for path in paths]
        reader = ImageReader(rows, paths, processor, model.device, **reader_options(options))
        read, features = embed(model, reader)
        if not read:
            reader.finish()
        classes = classes[read]
        if not options.add:
            model.bpgcn.support_bank.clear()
        ids = model.add_support(features=features, classes=classes.to(model.device), image_processor=processor)
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)
        added = {id_: files[row] for id_, row in zip(ids.tolist(), read, strict=True)}
        write_support_files(options.output, model, held | {id_: file.name for id_, file in added.items()})
        keep_thumbnails(options, model.support_bank.ids.tolist(), thumbnails, added)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    known = classes[classes != UNKNOWN]
    labeled = f"{len(known)} of them labeled, of {len(known.unique())} classes"
    total = f"; {model.support_bank.size} in all" if options.add else ""
    print(f"saved {options.output}: {len(read)} support images, {labeled}{total}")
    reader.finish()


def _parser() -> ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_bpgcn index", description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="Folders with a sub-folder per class; images that lie directly in them, and single files, have no class.",
    )
    parser.add_argument("--add", action="store_true", help="Keep the images that the bank holds, and add these.")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="Where the model is saved with its bank.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model that is there, MODEL itself too.")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="CSV with the columns file and class (empty: unknown), instead of sub-folders. A file is named by its path"
        " below its folder, or as IMAGES name it; one that is not in the table has no class.",
    )
    parser.add_argument(
        "--thumbnails",
        action="store_true",
        help="Save small pictures of the images beside the model, some 5 kB each, so that the demo can show them.",
    )
    return parser


def keep_thumbnails(options: Namespace, ids: list[int], held: Thumbnails, added: dict[int, ImageFile]) -> None:
    """Write a table of the pictures held before and, if asked for, of the added files, for the bank's ids; without any,
    remove the table of an earlier bank."""
    if not options.thumbnails:
        added = {}
    if not held and not added:
        (Path(options.output) / THUMBNAILS_FILE).unlink(missing_ok=True)
        return
    images = (
        open_thumbnail({"path": added[id_].path, "bytes": None}) if id_ in added else held.file(id_)
        for id_ in tqdm(ids, desc="thumbnails", disable=options.disable_tqdm)
    )
    write_thumbnails(options.output, ids, images)


def support_labels(files: Sequence[ImageFile], table: str | None) -> list[str | None]:
    """The class of each file by name, None where unknown: that of the table, or else the first folder of its name.

    Raises:
        OSError: there is no such table.
        ValueError: the table lacks a column, gives a file two classes, or names one that is not among the files.
    """
    if table is None:
        parts = (Path(file.name).parts for file in files)
        return [folder[0] if len(folder) > 1 else None for folder in parts]
    classes = _read_table(table)
    names = [next((name for name in (file.name, file.path) if name in classes), None) for file in files]
    if strange := sorted(set(classes) - set(names)):
        raise ValueError(
            f"--labels {table} names {len(strange)} files that are not among the images, the first {strange[0]}: name"
            " them by their paths below IMAGES, or as IMAGES name them."
        )
    return [None if name is None else classes[name] for name in names]


def _read_table(path: str) -> dict[str, str | None]:
    classes: dict[str, str | None] = {}
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if missing := set(LABEL_COLUMNS) - set(table.fieldnames or ()):
            raise ValueError(
                f"--labels {path} has no column {' and '.join(sorted(missing))}: its first row must name"
                f" {' and '.join(LABEL_COLUMNS)}, separated by commas."
            )
        for row in table:
            name, value = row["file"], row["class"] or None
            if classes.setdefault(name, value) != value:
                raise ValueError(f"--labels {path} gives {name} two classes, {classes[name]} and {value}: keep one.")
    return classes


@torch.no_grad()
def embed(model: BPGCNForImageClassification, reader: ImageReader) -> tuple[list[int], Tensor | None]:
    """The rows that could be read, and their features [M, D]."""
    rows, parts = [], []
    for batch in reader:
        if batch.rows:
            rows += batch.rows
            parts.append(model.get_image_features(batch.pixel_values))
    return rows, torch.cat(parts) if parts else None
