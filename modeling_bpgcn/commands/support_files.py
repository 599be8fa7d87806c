"""Which file each image of a support bank came from: a table beside the model, so that answers can name it."""

import csv
from pathlib import Path

from transformers.utils import cached_file, logging

from ..modeling_bpgcn import BPGCNForImageClassification

logger = logging.get_logger(__name__)

SUPPORT_FILES = "support_images.csv"


def write_support_files(folder: str, model: BPGCNForImageClassification, files: dict[int, str]) -> None:
    """Write a row of id, file and class (empty: unknown) for each image of the model's bank, in its order."""
    bank = model.support_bank
    rows = zip(bank.ids.tolist(), class_names(model), strict=True)
    with (Path(folder) / SUPPORT_FILES).open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:
        writer = csv.writer(table)
        writer.writerow(("id", "file", "class"))
        writer.writerows((id_, files.get(id_, ""), name or "") for id_, name in rows)


def read_support_files(model: BPGCNForImageClassification, name: str, revision: str | None = None) -> dict[int, str]:
    """The files of the model's bank by id; none where no table lies beside the model, or one of another bank."""
    path = cached_file(name, SUPPORT_FILES, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as table:
        rows = list(csv.DictReader(table))
    bank = [
        (str(id_), name or "") for id_, name in zip(model.support_bank.ids.tolist(), class_names(model), strict=True)
    ]
    if [(row.get("id"), row.get("class")) for row in rows] != bank:
        logger.warning(f"{path} is of another support bank: neighbors are named by their ids. Build it with `index`.")
        return {}
    return {int(row["id"]): row["file"] for row in rows if row["file"]}


def class_names(model: BPGCNForImageClassification) -> list[str | None]:
    """The class of each image of the bank, None where unknown."""
    names = model.config.id2label
    return [str(names[number]) if number >= 0 else None for number in model.support_bank.classes.tolist()]
