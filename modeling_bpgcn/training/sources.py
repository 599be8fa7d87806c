"""Where images come from: a Hub name, a folder, parquet or `digits` -> splits by name, and their columns."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers.utils import logging

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".csv", ".jsonl", ".tar", ".zip"})
METADATA_FILES = frozenset(ImageFolder.METADATA_FILENAMES)
SAVED_FILES = ("dataset_dict.json", "state.json")
SPLIT_SYNONYMS = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
}


def load_splits(dataset: str, dataset_config: str | None = None, train_split: str = "train") -> dict[str, Dataset]:
    """Load all splits of a data set, undecoded; a source without splits becomes the training split.

    Raises:
        FileNotFoundError: `dataset` is a path that does not exist.
        ValueError: the folder holds no images, or the file is not parquet.
    """
    path = Path(dataset).expanduser()
    if dataset == "digits":
        return load_digit_splits()
    if path.is_dir():
        return load_folder(path, dataset_config, train_split)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(
                f"--dataset {dataset} is a file but not parquet: pass a folder of images or a .parquet file"
            )
        with explained(f"--dataset {dataset} was read as parquet: check that the file is whole and not empty"):
            return load_dataset("parquet", data_files={train_split: str(path)})
    if dataset.startswith((".", "/", "~")) or path.suffix == ".parquet" or len(path.parts) > 2:
        raise FileNotFoundError(f"--dataset {dataset}: there is no file or folder {path.absolute()}: check the path")
    looked_up = (
        f"--dataset {dataset} was looked up on the Hub, because it is not `digits` and there is no file or folder "
        f"{path.absolute()}: check the spelling, and the connection if it is on the Hub"
    )
    with explained(looked_up):
        return load_dataset(dataset, dataset_config)


@contextmanager
def explained(note: str) -> Iterator[None]:
    """Let errors of other libraries through as they are, with a note on what was tried and what to check."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def load_digit_splits() -> dict[str, Dataset]:
    """Load scikit-learn's scanned digits, 8 x 8 grey: 1347 to train on and 450 to test on, always the same ones."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    parts = train_test_split(np.arange(len(pixels)), test_size=0.25, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return {
        split: Dataset.from_dict({"image": list(pixels[rows]), "label": digits.target[rows]}, features=features)
        for split, rows in zip(("train", "test"), parts, strict=True)
    }


def load_folder(folder: Path, dataset_config: str | None, train_split: str) -> dict[str, Dataset]:
    """Load one sub-folder per class, or tables (parquet, metadata.csv, ...), or what `Dataset.save_to_disk` wrote.

    Raises:
        ValueError: the folder holds neither images nor tables, or an empty folder.
    """
    files = visible_files(folder)
    names = {file.name for file in files}
    if any((folder / name).exists() for name in SAVED_FILES):
        with explained(
            f"--dataset {folder} was read as a saved data set: check that it is whole and no split is empty"
        ):
            saved = load_from_disk(str(folder))
        return {train_split: saved} if isinstance(saved, Dataset) else saved
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    has_tables = any(file.suffix.lower() in TABLE_SUFFIXES for file in files)
    if names & METADATA_FILES or (has_tables and not images):
        with explained(f"--dataset {folder} was read as tables: check that the files are whole and no split is empty"):
            return load_dataset(str(folder), dataset_config)
    if not images:
        raise ValueError(f"--dataset {folder} holds no images: pass a folder with one sub-folder of images per class")
    return read_class_folders(folder, images, train_split)


def read_class_folders(folder: Path, images: list[Path], train_split: str) -> dict[str, Dataset]:
    """Read images at CLASS/.../IMAGE or SPLIT/CLASS/.../IMAGE below the folder; one that lies higher has no class.

    Raises:
        ValueError: a folder is empty, or there are train and test folders without class folders in them.
    """
    # Not `load_dataset("imagefolder")`: it drops the labels of a folder with one class (datasets 5.2).
    has_splits = any(len(image.parts) > 2 and same_split(image.parts[0], train_split) for image in images)
    splits = {}
    for image in images:
        split, *inner = image.parts if has_splits else (train_split, *image.parts)
        rows = splits.setdefault(split, {"image": [], "label": []})
        rows["image"].append(str(folder.absolute() / image))
        rows["label"].append(inner[0] if len(inner) > 1 else None)
    classes = {image.parts[0] for image in images if len(image.parts) > 1}
    if not has_splits and {"train", "test"} <= {SPLIT_SYNONYMS.get(name.lower(), name.lower()) for name in classes}:
        raise ValueError(
            f"--dataset {folder}: images lie directly in {sorted(classes)}: give each one sub-folder per class"
        )
    check_no_empty_folder(folder)
    loose = [str(image) for image in images if len(image.parts) <= 1 + has_splits]
    if loose:
        logger.warning(f"Images outside a class folder of {folder} count as images without class: {shortened(loose)}")
    features = Features({"image": Image(), "label": Value("string")})
    return {split: Dataset.from_dict(rows, features=features) for split, rows in splits.items()}


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, relative to it and sorted; hidden ones and macOS's shadow copies are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.absolute()}: check the path")
    # os.walk rather than rglob: sub-folders may be symbolic links.
    files = [Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(file for file in (file.relative_to(folder) for file in files) if is_visible(file))


def is_visible(path: Path) -> bool:
    """Whether no part of a relative path is hidden."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def check_no_empty_folder(folder: Path) -> None:
    """Raise ValueError if a folder below holds nothing: most likely a class whose images are missing."""
    walked = [(Path(parent).relative_to(folder), folders, files) for parent, folders, files in os.walk(folder)]
    empty = [str(path) for path, folders, files in walked if not folders and not files and is_visible(path)]
    if empty:
        raise ValueError(
            f"{folder} has empty folders: {shortened(empty)}; add the images of these classes or remove them"
        )


def read_unlabeled_folder(folder: str) -> Dataset:
    """Read all images below a folder, at any depth -> column `image`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images.
    """
    path = Path(folder).expanduser()
    images = [file for file in visible_files(path) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"--unlabeled_folder {folder} holds no images: check the path or leave the option out")
    return Dataset.from_dict(
        {"image": [str(path.absolute() / i) for i in images]}, features=Features({"image": Image()})
    )


def same_split(one: str, other: str) -> bool:
    """Whether two names mean the same split: `val` and `validation`, `Train` and `train`."""
    one, other = (SPLIT_SYNONYMS.get(name.lower(), name.lower()) for name in (one, other))
    return one == other


def find_split(splits: dict[str, Dataset], name: str, option: str) -> str:
    """The split of that name, or of a synonym if there is none; ValueError if there is neither."""
    for match in ([name] if name in splits else []) + [split for split in splits if same_split(split, name)]:
        return match
    raise ValueError(f"the data set has no split {name!r}, only {', '.join(splits)}: choose one with {option}")


def read_images(split: Dataset, name: str, column: str | None = None) -> Dataset:
    """Read the images of a split -> column `image`, undecoded. The column is found if only one can be meant.

    Raises:
        ValueError: the column is missing, or several could be meant.
    """
    typed = [key for key, feature in split.features.items() if isinstance(feature, Image)]
    named = [key for key in ("image", "img") if key in split.features]
    column = find_column(split, name, column, typed if len(typed) == 1 else named or typed, "--image_column")
    feature = split.features[column]
    storable = isinstance(feature, dict) or (
        isinstance(feature, Value) and feature.dtype.endswith(("string", "binary"))
    )
    if not isinstance(feature, Image) and not storable:
        raise ValueError(
            f"column {column!r} of split {name!r} holds {feature}, not images: choose another --image_column"
        )
    images = split.with_format(None).select_columns(column)
    images = images if column == "image" else images.rename_column(column, "image")
    return images.cast_column("image", Image())


def read_classes(split: Dataset, name: str, column: str | None = None) -> tuple[list, list]:
    """Read the class of each image of a split (None: unknown), and all classes in their order.

    Raises:
        ValueError: the column is missing, several could be meant, or it holds neither names nor integers.
    """
    typed = [key for key, feature in split.features.items() if isinstance(feature, ClassLabel)]
    named = [key for key in ("label", "labels") if key in split.features]
    column = find_column(split, name, column, typed if len(typed) == 1 else named or typed, "--label_column")
    feature, values = split.features[column], split.with_format(None).select_columns(column)[:][column]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values], feature.names
    if not isinstance(feature, Value) or not feature.dtype.endswith(
        ("string", "int8", "int16", "int32", "int64", "bool")
    ):
        raise ValueError(
            f"column {column!r} of split {name!r} holds {feature}, not classes: choose another --label_column"
        )
    values = [None if value == -100 else value for value in values]
    return values, sorted({value for value in values if value is not None})


def find_column(split: Dataset, name: str, column: str | None, candidates: list[str], option: str) -> str:
    """The requested column, or the only candidate; ValueError names the columns that there are."""
    if column is None and len(candidates) == 1:
        return candidates[0]
    if column in split.column_names:
        return column
    found = (
        f"has no column {column!r}" if column else f"leaves open which column is meant ({candidates or 'none fits'})"
    )
    raise ValueError(f"split {name!r} {found}; it has {', '.join(split.column_names)}: choose one with {option}")


def shortened(names: list, most: int = 10) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
