"""Data sets as the graph needs them: which images are nodes, which classes training may see, what is tested."""

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging

from .images import AUGMENTATIONS, check_images
from .sources import find_split, load_splits, read_classes, read_images, read_unlabeled_folder, same_split, shortened

logger = logging.get_logger(__name__)

UNKNOWN = -100
# Each draw has its own stream of random numbers: changing one fraction leaves the other draws as they were.
SUBSET, TEST, LABELED, VALIDATION = range(4)


@dataclass
class DataArguments:
    """Which images to train, choose and test on, and which of their classes training may see."""

    dataset: str = field(
        metadata={"help": "A data set on the Hub, a folder of images or parquet files, a parquet file, or `digits`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the configuration of a Hub data set."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only one of images, or `image` or `img`."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the classes. Default: the only one of classes, or `label`, `labels`."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to test on. Default: `test`, else `validation`, else none."}
    )
    validation_split: str | None = field(default=None, metadata={"help": "Split to choose the best model on."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Share of the labeled training images to hold out and choose the best model on."}
    )
    test_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training images to hold out and test on, instead of a test split."}
    )
    labeled_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training images, at least one a class, that keep their class; the others are "
            "unlabeled nodes. Without a test split those are also what is tested (transductive)."
        },
    )
    labels_per_class: int | None = field(
        default=None, metadata={"help": "The same as a number of images a class, instead of --labeled_fraction."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of every random split."})
    unlabeled_folder: str | None = field(
        default=None, metadata={"help": "Folder of images without classes that join training as unlabeled nodes."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the square the backbone sees. Default: what its image processor says."}
    )
    augmentation: str = field(
        default="none", metadata={"help": "Random change of the training images.", "choices": list(AUGMENTATIONS)}
    )
    skip_unreadable_images: bool = field(
        default=False, metadata={"help": "Go on without the images that cannot be used, and list them."}
    )
    max_images: int | None = field(
        default=None, metadata={"help": "Use at most this many images of each split (for a quick try)."}
    )

    def __post_init__(self):
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1 (a share, not percent)")
        if self.labeled_fraction is not None and not 0 < self.labeled_fraction <= 1:
            raise ValueError(f"labeled_fraction {self.labeled_fraction} must be above 0 and at most 1 (not percent)")
        for name in ("labels_per_class", "image_size", "max_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for one, other in (
            ("labeled_fraction", "labels_per_class"),
            ("test_split", "test_fraction"),
            ("validation_split", "validation_fraction"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} are two ways to say the same: pass only one of them")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation {self.augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}")


@dataclass
class ImageData:
    """Splits with columns `image`, `label` (int64; -100: unknown) and `node_id` (int64, unique over all splits).

    `test_in_graph`: the test images are the training images whose class is hidden, under the same ids (transductive).
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    label_names: list[str]
    test_in_graph: bool


@dataclass
class Nodes:
    """The images of one split, before it is decided which of them training sees and with which classes."""

    images: Dataset  # columns image, node_id; never reordered, so that a column of labels can be added without a copy
    labels: np.ndarray  # [N], UNKNOWN where the data set itself says no class
    rows: np.ndarray  # [M] the rows in use

    @property
    def known_rows(self) -> np.ndarray:
        return self.rows[self.labels[self.rows] != UNKNOWN]

    def take(self, rows: np.ndarray, visible: np.ndarray) -> Dataset:
        """The given rows with their label where the row is among `visible` and UNKNOWN elsewhere, also underneath."""
        labels = np.full(len(self.labels), UNKNOWN, dtype=np.int64)
        labels[visible] = self.labels[visible]
        return self.images.add_column("label", labels).select_columns(["image", "label", "node_id"]).select(rows)


def load_image_data(arguments: DataArguments, minimum_size: int = 1) -> ImageData:
    """Load, check and split a data set. Pixels stay where they are until they are used, also when classes are hidden.

    Args:
        arguments: what to load and how to split it.
        minimum_size: shortest useful side of an image in pixels, the backbone's patch size.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the data cannot be used as asked; the message names the culprit and the remedy.
    """
    splits = load_splits(arguments.dataset, arguments.dataset_config, arguments.train_split)
    roles = choose_splits(splits, arguments)
    classes = {role: read_classes(splits[name], name, arguments.label_column) for role, name in roles.items()}
    label_names = used_classes(*classes["train"], arguments.dataset)
    nodes, first_id = {}, 0
    for role, name in roles.items():
        labels = encode_classes(classes[role][0], label_names, name, all_known=role != "train")
        images = read_images(splits[name], name, arguments.image_column)
        nodes[role] = use_images(images, labels, first_id, arguments, minimum_size, f"split {name!r}")
        first_id += len(images)

    parts = split_training_images(nodes.pop("train"), label_names, arguments, tested_elsewhere="test" in nodes)
    test_in_graph = "test" not in nodes and arguments.test_fraction == 0
    parts |= {role: part.take(part.rows, visible=part.rows) for role, part in nodes.items()}
    if arguments.unlabeled_folder is not None:
        images = read_unlabeled_folder(arguments.unlabeled_folder)
        labels = np.full(len(images), UNKNOWN)
        extra = use_images(images, labels, first_id, arguments, minimum_size, arguments.unlabeled_folder)
        parts["train"] = concatenate_datasets([parts["train"], extra.take(extra.rows, visible=extra.known_rows)])
    return ImageData(label_names=[str(name) for name in label_names], test_in_graph=test_in_graph, **parts)


def choose_splits(splits: dict[str, Dataset], arguments: DataArguments) -> dict[str, str]:
    """Map the roles `train`, `validation` and `test`, as far as they are filled, to names of splits.

    Raises:
        ValueError: a split is missing, or would play two roles.
    """
    roles = {"train": find_split(splits, arguments.train_split, "--train_split")}
    for role, name in (("validation", arguments.validation_split), ("test", arguments.test_split)):
        if name is not None:
            roles[role] = find_split(splits, name, f"--{role}_split")
    if len(set(roles.values())) < len(roles):
        raise ValueError(f"a split can have one role only, not {roles}: change --validation_split or --test_split")
    free = [split for split in splits if split not in roles.values()]
    usual = [split for name in ("test", "validation") for split in free if same_split(split, name)]
    if usual and "test" not in roles:
        if arguments.test_fraction:
            logger.warning(f"Split {usual[0]!r} is not used: --test_fraction asks to test on training images instead")
        else:
            roles["test"] = usual[0]
    return roles


def used_classes(values: list, classes: list, dataset: str) -> list:
    """The classes in their order, without those that no training image has; ValueError unless there are two or more."""
    present = set(values)
    used = [name for name in classes if name in present]
    if len(used) < 2:
        raise ValueError(
            f"--dataset {dataset} has {len(used)} classes ({shortened(used) or 'none'}), but it takes two: pass "
            "a folder with one sub-folder of images per class, or choose another --label_column"
        )
    if len(used) < len(classes):
        logger.warning(
            f"Left out, as no training image has them: {shortened([n for n in classes if n not in present])}"
        )
    return used


def encode_classes(values: list, label_names: list, split: str, all_known: bool) -> np.ndarray:
    """Number the classes [N], UNKNOWN where the value is None.

    Raises:
        ValueError: a class is not among the training classes, or unknown although all must be known.
    """
    numbers = {name: label for label, name in enumerate(label_names)} | {None: UNKNOWN}
    strange = sorted({str(value) for value in values if value not in numbers})
    if strange:
        raise ValueError(
            f"split {split!r} has classes that do not occur in training: {shortened(strange)}; add labeled training "
            "images of them, or remove them"
        )
    if all_known and None in values:
        raise ValueError(
            f"{values.count(None)} of {len(values)} images of split {split!r} have no class: choose another with "
            "--test_split or --validation_split, or hold out training images with --test_fraction"
        )
    return np.array([numbers[value] for value in values], dtype=np.int64)


def use_images(
    images: Dataset, labels: np.ndarray, first_id: int, arguments: DataArguments, minimum_size: int, name: str
) -> Nodes:
    """Give the images their node ids, draw `max_images` of them and check these."""
    images = images.add_column("node_id", np.arange(first_id, first_id + len(images)))
    rows = np.arange(len(images))
    if arguments.max_images is not None and len(images) > arguments.max_images:
        ranks, counts = class_ranks(labels, arguments.split_seed, SUBSET)
        rows = np.sort(np.argsort(ranks / counts, kind="stable")[: arguments.max_images])
    checked = check_images(images.select(rows), "image", minimum_size, arguments.skip_unreadable_images, name)
    return Nodes(images, labels, np.asarray(checked["node_id"][:]) - first_id)


def split_training_images(
    nodes: Nodes, label_names: list, arguments: DataArguments, tested_elsewhere: bool
) -> dict[str, Dataset | None]:
    """Split the training images into `train`, `validation` and, unless tested elsewhere, `test`.

    Raises:
        ValueError: a class has no labeled training image left, or nothing is left to test on.
    """
    seed = arguments.split_seed
    held_out = draw_share(nodes, nodes.known_rows, arguments.test_fraction, seed, TEST)
    candidates = np.setdiff1d(nodes.known_rows, held_out)
    labeled = draw_labeled(nodes, candidates, arguments)
    validation = draw_share(nodes, labeled, arguments.validation_fraction, seed, VALIDATION)
    seen = np.setdiff1d(labeled, validation)
    check_classes(nodes.labels[seen], label_names)
    train_rows = np.setdiff1d(nodes.rows, np.concatenate([held_out, validation]))
    parts = {"train": nodes.take(train_rows, visible=seen), "validation": None}
    if len(validation):
        parts["validation"] = nodes.take(validation, visible=validation)
    if tested_elsewhere:
        return parts
    tested = held_out if arguments.test_fraction else np.setdiff1d(candidates, labeled)
    if not len(tested):
        raise ValueError(
            f"--dataset {arguments.dataset} has no test split and no training image with a hidden class to test on: "
            "pass --labeled_fraction or --labels_per_class (smaller), --test_fraction, or --test_split"
        )
    return parts | {"test": nodes.take(tested, visible=tested)}


def draw_labeled(nodes: Nodes, rows: np.ndarray, arguments: DataArguments) -> np.ndarray:
    """Draw the rows that keep their class; a larger number contains the smaller one."""
    if arguments.labels_per_class is None:
        share = 1.0 if arguments.labeled_fraction is None else arguments.labeled_fraction
        return draw_share(nodes, rows, share, arguments.split_seed, LABELED)
    ranks, _ = class_ranks(nodes.labels[rows], arguments.split_seed, LABELED)
    return rows[ranks < arguments.labels_per_class]


def draw_share(nodes: Nodes, rows: np.ndarray, share: float, seed: int, stream: int) -> np.ndarray:
    """Draw a share of the rows of each class, at least one unless the share is 0."""
    ranks, counts = class_ranks(nodes.labels[rows], seed, stream)
    return rows[ranks < np.maximum(np.rint(share * counts), share > 0)]


def class_ranks(labels: np.ndarray, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Place of each image in a random order of its class [N], and the size of that class [N]."""
    shuffled = np.random.default_rng([seed, stream]).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks, counts[inverse]


def check_classes(labels: np.ndarray, label_names: list) -> None:
    """Raise ValueError if a class is not among the labels that training sees."""
    missing = [label_names[label] for label in np.setdiff1d(np.arange(len(label_names)), labels)]
    if missing:
        raise ValueError(
            f"classes without a labeled training image: {shortened(missing)}; add images of them, or hold out fewer "
            "(--validation_fraction, --test_fraction, --max_images)"
        )
