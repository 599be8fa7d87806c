"""Data sets as the graph needs them: what is loaded, which classes stay hidden, what is tested, and what is refused."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser

from modeling_bpgcn.training.data import UNKNOWN, DataArguments, load_image_data

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def some_image(number=0, size=8) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write_classes(folder: Path, counts: dict[str, int], suffix="png") -> Path:
    """One sub-folder per class; every image differs."""
    for offset, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            some_image(1000 * offset + number).save(folder / name / f"{number:03d}.{suffix}")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_classes(tmp_path / "photos", {"cat": 10, "dog": 20, "owl": 30})


def load(dataset, minimum_size=1, **options):
    return load_image_data(DataArguments(str(dataset), **options), minimum_size)


def labels(dataset) -> list[int]:
    return dataset["label"][:]


def ids(dataset) -> list[int]:
    return dataset["node_id"][:]


def counts(dataset) -> dict[int, int]:
    return dict(sorted(Counter(labels(dataset)).items()))


def true_class(dataset) -> list[str]:
    """The class that each image's folder says."""
    return [Path(image["path"]).parent.name for image in dataset.cast_column("image", Image(decode=False))["image"]]


def pixels(dataset) -> list[bytes]:
    return [image.tobytes() for image in dataset["image"]]


def parquet_rows(number, label=lambda row: row % 2, seed=0) -> dict[str, list]:
    return {"image": [some_image(seed + row) for row in range(number)], "label": [label(row) for row in range(number)]}


NAMED = Features({"image": Image(), "label": ClassLabel(names=["no", "yes"])})


# --- sources


def test_folder_with_one_sub_folder_per_class(folder):
    data = load(folder, test_fraction=0.5)
    assert data.label_names == ["cat", "dog", "owl"]
    assert data.train.column_names == data.test.column_names == ["image", "label", "node_id"]
    assert counts(data.train) == counts(data.test) == {0: 5, 1: 10, 2: 15}
    for part in (data.train, data.test):
        assert [data.label_names[label] for label in labels(part)] == true_class(part)
    assert data.train[0]["image"].size == (8, 8)
    assert data.train.features["node_id"] == data.train.features["label"] == Value("int64")


def test_images_deeper_in_a_class_folder_are_of_that_class(tmp_path):
    write_classes(tmp_path / "cat", {"indoors": 3, "outdoors": 3})
    write_classes(tmp_path, {"dog": 4})
    assert counts(load(tmp_path, test_fraction=0.5).train) == {0: 3, 1: 2}


def test_hidden_files_and_other_files_are_left_out(folder):
    write_classes(folder, {".thumbnails": 2, "__MACOSX": 2})
    (folder / "cat" / ".hidden.png").write_bytes(b"x")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "notes.csv").write_text("a,b")
    data = load(folder, labels_per_class=1)
    assert data.label_names == ["cat", "dog", "owl"]
    assert len(data.train) == 60


def test_class_folders_may_be_links_and_suffixes_capital(tmp_path, folder):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(folder / name)
    (folder / "cat" / "000.png").rename(folder / "cat" / "000.PNG")
    assert len(load(tmp_path / "linked", labels_per_class=1).train) == 30


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "val"), ("training", "valid")])
def test_folder_with_train_and_test_sub_folders(tmp_path, train, test):
    write_classes(tmp_path / train, {"cat": 3, "dog": 4})
    write_classes(tmp_path / test, {"dog": 2})  # of one class only: its label must not get lost
    data = load(tmp_path)
    assert not data.test_in_graph
    assert data.label_names == ["cat", "dog"]
    assert (counts(data.train), counts(data.test)) == ({0: 3, 1: 4}, {1: 2})


def test_folder_with_three_splits_tests_on_test(tmp_path):
    for split, number in (("train", 3), ("val", 4), ("test", 5)):
        write_classes(tmp_path / split, {"cat": number, "dog": number})
    data = load(tmp_path, validation_split="validation")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 8, 10]
    everyone = ids(data.train) + ids(data.validation) + ids(data.test)
    assert len(set(everyone)) == 24
    assert load(tmp_path).validation is None


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, {"bus": 3, "train": 3})
    assert load(tmp_path, labels_per_class=1).label_names == ["bus", "train"]


@pytest.fixture
def parquet(tmp_path) -> Path:
    Dataset.from_dict(parquet_rows(12), features=NAMED).to_parquet(tmp_path / "all.parquet")
    return tmp_path / "all.parquet"


def test_parquet_file(parquet):
    data = load(parquet, test_fraction=0.5)
    assert data.label_names == ["no", "yes"]
    assert counts(data.train) == counts(data.test) == {0: 3, 1: 3}
    assert all(image.size == (8, 8) for image in data.test["image"])


def test_folder_of_parquet_with_splits_in_the_file_names(tmp_path):
    for split, number in (("train", 6), ("validation", 2), ("test", 4)):
        path = tmp_path / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(parquet_rows(number), features=NAMED).to_parquet(path)
    data = load(tmp_path, validation_split="validation")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [6, 2, 4]


def test_folder_that_save_to_disk_wrote(tmp_path):
    train, test = (Dataset.from_dict(parquet_rows(number), features=NAMED) for number in (6, 4))
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert [len(part) for part in (load(tmp_path / "both").train, load(tmp_path / "both").test)] == [6, 4]
    assert len(load(tmp_path / "one", labels_per_class=1).test) == 4


def test_folder_with_metadata_file(tmp_path):
    for number in range(4):
        some_image(number).save(tmp_path / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "label": "ab"[number % 2]} for number in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(tmp_path, test_fraction=0.5)
    assert data.label_names == ["a", "b"]
    assert counts(data.test) == {0: 1, 1: 1}


def test_digits_are_always_split_the_same_way():
    first, second = load("digits", labels_per_class=10), load("digits", labels_per_class=5, split_seed=3)
    assert (len(first.train), len(first.test)) == (1347, 450)
    assert first.label_names == list("0123456789")
    assert not first.test_in_graph
    assert labels(first.test) == labels(second.test)
    assert pixels(first.test) == pixels(second.test)
    image = first.train[0]["image"]
    assert (image.mode, image.size) == ("L", (8, 8))
    assert image.getextrema()[1] == 255
    assert counts(first.train) == {UNKNOWN: 1247} | dict.fromkeys(range(10), 10)


def test_a_name_on_the_hub_that_cannot_be_reached_says_what_was_tried():
    with pytest.raises(Exception, match=r"nobody/nothing") as caught:
        load("nobody/nothing")
    assert any("was looked up on the Hub" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "~/no-such-folder-here", "some.parquet", "a/b/c"])
def test_a_missing_path_is_named(path):
    with pytest.raises(FileNotFoundError, match=r"--dataset .* there is no file or folder /"):
        load(path)


# --- columns


def write_parquet(path: Path, rows: dict, features: dict | None = None) -> Path:
    Dataset.from_dict(rows, features=features and Features(features)).to_parquet(path)
    return path


def test_columns_are_found_by_type(tmp_path):
    rows = {"photo": [some_image(row) for row in range(4)], "species": [0, 1, 0, 1], "width": [8] * 4}
    features = {"photo": Image(), "species": ClassLabel(names=["a", "b"]), "width": Value("int64")}
    data = load(write_parquet(tmp_path / "x.parquet", rows, features), test_fraction=0.5)
    assert data.train.column_names == ["image", "label", "node_id"]
    assert data.label_names == ["a", "b"]


def test_columns_can_be_named(tmp_path):
    rows = {"front": [some_image(row) for row in range(4)], "back": [some_image(9)] * 4, "fine": [0, 1, 2, 3]}
    rows["coarse"] = [0, 0, 1, 1]
    four, two = ClassLabel(names=list("abcd")), ClassLabel(names=list("xy"))
    features = {"front": Image(), "back": Image(), "fine": four, "coarse": two}
    path = write_parquet(tmp_path / "x.parquet", rows, features)
    data = load(path, image_column="front", label_column="coarse", labels_per_class=1)
    assert data.label_names == ["x", "y"]
    assert len(set(pixels(data.train))) == 4
    with pytest.raises(ValueError, match=r"\['front', 'back'\].*choose one with --image_column"):
        load(path, label_column="coarse")
    with pytest.raises(ValueError, match=r"\['fine', 'coarse'\].*front, back, fine, coarse: .*--label_column"):
        load(path, image_column="front")


def test_missing_columns_name_the_available_ones(parquet):
    with pytest.raises(ValueError, match=r"no column 'picture'; it has image, label: choose one with --image_column"):
        load(parquet, image_column="picture")
    with pytest.raises(ValueError, match=r"no column 'species'; it has image, label: choose one with --label_column"):
        load(parquet, label_column="species")


def test_a_split_without_classes_names_its_columns(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"image": [some_image()] * 2}, {"image": Image()})
    with pytest.raises(ValueError, match=r"none fits.*it has image: choose one with --label_column"):
        load(path)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["owl", "ant", "owl", "ant"], ["ant", "owl"]),
        ([10, 9, 10, 9], ["9", "10"]),
        ([True, False, True, False], ["False", "True"]),
    ],
)
def test_classes_may_be_names_or_numbers(tmp_path, values, names):
    rows = {"img": [some_image(row) for row in range(4)], "labels": values}
    feature = Value({str: "string", int: "int32", bool: "bool"}[type(values[0])])
    path = write_parquet(tmp_path / "x.parquet", rows, {"img": Image(), "labels": feature})
    data = load(path, test_fraction=0.5)
    assert data.label_names == names
    assert counts(data.test) == {0: 1, 1: 1}


def test_plain_bytes_are_taken_as_images(tmp_path):
    some_image().save(tmp_path / "x.png")
    rows = {"image": [(tmp_path / "x.png").read_bytes()] * 4, "label": [0, 1, 0, 1]}
    data = load(write_parquet(tmp_path / "x.parquet", rows), test_fraction=0.5)
    assert data.train[0]["image"].size == (8, 8)


def test_columns_of_the_wrong_kind_are_refused(tmp_path):
    rows = {"image": [some_image()] * 2, "label": [0.5, 1.5], "width": [8, 9]}
    features = {"image": Image(), "label": Value("float32"), "width": Value("int64")}
    path = write_parquet(tmp_path / "x.parquet", rows, features)
    with pytest.raises(ValueError, match=r"column 'label' .*not classes: choose another --label_column"):
        load(path)
    with pytest.raises(ValueError, match=r"column 'width' .*not images: choose another --image_column"):
        load(path, label_column="width", image_column="width")


def test_declared_classes_without_any_image_are_left_out_and_named(tmp_path, caplog):
    names = ClassLabel(names=["a", "unused", "b"])
    path = write_parquet(tmp_path / "x.parquet", parquet_rows(4, lambda row: 2 * (row % 2)), NAMED | {"label": names})
    with caplog.at_level(logging.WARNING):
        data = load(path, test_fraction=0.5)
    assert data.label_names == ["a", "b"]
    assert counts(data.train) == {0: 1, 1: 1}
    assert "unused" in caplog.text


# --- which classes training sees


def test_hidden_images_stay_as_nodes_and_are_what_is_tested(folder):
    data = load(folder, labeled_fraction=0.1)
    assert data.test_in_graph
    assert data.validation is None
    assert counts(data.train) == {UNKNOWN: 54, 0: 1, 1: 2, 2: 3}
    assert counts(data.test) == {0: 9, 1: 18, 2: 27}
    hidden = [node for node, label in zip(ids(data.train), labels(data.train), strict=True) if label == UNKNOWN]
    assert ids(data.test) == hidden
    assert [data.label_names[label] for label in labels(data.test)] == true_class(data.test)
    image_of = dict(zip(ids(data.train), pixels(data.train), strict=True))
    assert pixels(data.test) == [image_of[node] for node in ids(data.test)]


def test_hidden_classes_are_nowhere_in_the_training_data(folder):
    data = load(folder, labels_per_class=2, validation_fraction=0.5)
    assert data.train.data.column_names == ["image", "label", "node_id"]
    underneath = data.train.data.column("label").to_pylist()  # the table below the selected rows
    assert len(underneath) > len(data.train)
    assert Counter(underneath) == {UNKNOWN: 57, 0: 1, 1: 1, 2: 1}


def test_hiding_copies_no_images(parquet):
    raw = load_dataset("parquet", data_files=str(parquet), split="train")
    data = load(parquet, labels_per_class=2)
    address = {
        dataset.data.column("image").chunk(0).field("bytes").buffers()[2].address for dataset in (data.train, data.test)
    }
    assert len(raw) == len(data.train) > len(data.test) > 0
    assert len(address) == 1


def test_labels_per_class_takes_all_of_a_small_class(folder):
    data = load(folder, labels_per_class=15)
    assert counts(data.train) == {UNKNOWN: 20, 0: 10, 1: 15, 2: 15}
    assert counts(data.test) == {1: 5, 2: 15}


def test_labeled_fraction_leaves_every_class_at_least_one(tmp_path):
    write_classes(tmp_path, {"rare": 2, "common": 30})
    assert counts(load(tmp_path, labeled_fraction=0.01).train) == {UNKNOWN: 30, 0: 1, 1: 1}


def test_draws_repeat_with_the_seed_and_change_with_it(folder):
    first, second, other = (load(folder, labels_per_class=3, split_seed=seed) for seed in (0, 0, 1))
    assert labels(first.train) == labels(second.train)
    assert labels(first.train) != labels(other.train)
    assert ids(first.train) == ids(other.train)


def test_more_labels_contain_the_fewer(folder):
    few, many = (load(folder, labels_per_class=number) for number in (2, 6))
    assert set(ids(many.test)) < set(ids(few.test))


def test_validation_takes_labeled_images_out_of_training(folder):
    data = load(folder, labels_per_class=10, validation_fraction=0.2)
    assert counts(data.validation) == {0: 2, 1: 2, 2: 2}
    assert counts(data.train) == {UNKNOWN: 30, 0: 8, 1: 8, 2: 8}
    assert counts(data.test) == {1: 10, 2: 20}
    assert not set(ids(data.validation)) & set(ids(data.train))
    assert [data.label_names[label] for label in labels(data.validation)] == true_class(data.validation)


def test_test_fraction_is_held_out_of_the_graph(folder):
    data = load(folder, test_fraction=0.2, labels_per_class=2)
    assert not data.test_in_graph
    assert counts(data.test) == {0: 2, 1: 4, 2: 6}
    assert counts(data.train) == {UNKNOWN: 42, 0: 2, 1: 2, 2: 2}
    assert not set(ids(data.test)) & set(ids(data.train))
    assert ids(load(folder, test_fraction=0.2).test) == ids(data.test)


def test_test_fraction_instead_of_an_existing_test_split_says_so(tmp_path, caplog):
    write_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    write_classes(tmp_path / "test", {"cat": 9, "dog": 9})
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, test_fraction=0.5).test) == 4
    assert "'test' is not used" in caplog.text


def test_with_a_test_split_hidden_images_are_nodes_and_not_tested(tmp_path):
    write_classes(tmp_path / "train", {"cat": 5, "dog": 5})
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2})
    data = load(tmp_path, labels_per_class=1)
    assert not data.test_in_graph
    assert counts(data.train) == {UNKNOWN: 8, 0: 1, 1: 1}
    assert counts(data.test) == {0: 2, 1: 2}


def test_the_classes_of_the_test_images_do_not_reach_training(tmp_path):
    results = []
    for number, label in enumerate((lambda row: row % 2, lambda row: 1 - row % 2)):
        place = tmp_path / str(number)
        place.mkdir()
        Dataset.from_dict(parquet_rows(8), features=NAMED).to_parquet(place / "train.parquet")
        Dataset.from_dict(parquet_rows(6, label, seed=50), features=NAMED).to_parquet(place / "test.parquet")
        results.append(load(place, labels_per_class=2, validation_fraction=0.5))
    one, other = results
    assert labels(one.test) != labels(other.test)
    assert one.train[:] == other.train[:]
    assert one.validation[:] == other.validation[:]


def test_images_that_the_data_set_leaves_without_class_are_nodes(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", parquet_rows(9, lambda row: row % 3 - 1), NAMED)
    data = load(path, labels_per_class=1)
    assert counts(data.train) == {UNKNOWN: 7, 0: 1, 1: 1}
    assert counts(data.test) == {0: 2, 1: 2}


def test_loose_images_of_a_folder_are_nodes_and_named(folder, caplog):
    some_image(5).save(folder / "loose.png")
    with caplog.at_level(logging.WARNING):
        data = load(folder, labels_per_class=10)
    assert len(data.train) == 61
    assert len(data.test) == 30
    assert "loose.png" in caplog.text


def test_unlabeled_folder_joins_training(tmp_path, folder):
    write_classes(tmp_path / "more", {"deep/er": 5})
    data = load(folder, labels_per_class=5, unlabeled_folder=str(tmp_path / "more"))
    assert counts(data.train) == {UNKNOWN: 50, 0: 5, 1: 5, 2: 5}
    assert len(set(ids(data.train))) == 65
    assert counts(data.test) == {0: 5, 1: 15, 2: 25}
    assert data.train[64]["image"].size == (8, 8)


def test_unlabeled_folder_must_exist_and_hold_images(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere"):
        load(folder, labels_per_class=5, unlabeled_folder=str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"--unlabeled_folder .*/void holds no images"):
        load(folder, labels_per_class=5, unlabeled_folder=str(tmp_path / "void"))


def test_max_images_keeps_the_shares_of_the_classes(folder):
    data = load(folder, max_images=12, labels_per_class=1)
    assert len(data.train) == 12
    assert Counter(true_class(data.train)) == {"cat": 2, "dog": 4, "owl": 6}


def test_duplicate_images_are_separate_nodes(tmp_path):
    for name in ("blue", "green", "red"):
        (tmp_path / name).mkdir()
        for number in range(4):
            PIL.Image.new("RGB", (8, 8), "white").save(tmp_path / name / f"{number}.png")
    data = load(tmp_path, labels_per_class=2)
    assert len(set(ids(data.train))) == len(data.train) == 12
    assert len(set(pixels(data.train))) == 1


# --- what is refused


def test_options_come_from_the_command_line():
    parser = HfArgumentParser(DataArguments)
    line = "--dataset x --labeled_fraction 0.1 --skip_unreadable_images true --augmentation flip --max_images 5"
    (arguments,) = parser.parse_args_into_dataclasses(line.split())
    assert arguments == DataArguments(
        "x", labeled_fraction=0.1, skip_unreadable_images=True, augmentation="flip", max_images=5
    )
    assert all(entry.metadata["help"] for entry in DataArguments.__dataclass_fields__.values())
    assert "labels_per_class" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labeled_fraction": 0.0}, r"labeled_fraction 0\.0 must be above 0"),
        ({"labeled_fraction": 10}, r"labeled_fraction 10 .*not percent"),
        ({"labels_per_class": 0}, r"labels_per_class 0 must be at least 1"),
        ({"labeled_fraction": 0.1, "labels_per_class": 3}, r"labeled_fraction and labels_per_class.*only one"),
        ({"validation_fraction": 1.0}, r"validation_fraction 1\.0 must be .*below 1"),
        ({"test_fraction": -0.1}, r"test_fraction -0\.1 must be at least 0"),
        ({"test_fraction": 0.1, "test_split": "test"}, r"test_split and test_fraction.*only one"),
        ({"validation_fraction": 0.1, "validation_split": "val"}, r"validation_split and validation_fraction"),
        ({"max_images": 0}, r"max_images 0 must be at least 1"),
        ({"image_size": 0}, r"image_size 0 must be at least 1"),
        ({"augmentation": "mixup"}, r"augmentation 'mixup': choose one of none, flip"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments("digits", **options)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"holds no images: pass a folder with one sub-folder"):
        load(tmp_path)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    some_image().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is a file but not parquet"):
        load(tmp_path / "x.png")


def test_a_folder_with_one_class_is_refused(tmp_path):
    write_classes(tmp_path, {"cat": 3})
    with pytest.raises(ValueError, match=r"has 1 classes \(cat\), but it takes two: .*one sub-folder"):
        load(tmp_path, test_fraction=0.5)


def test_a_folder_with_a_single_loose_image_is_refused(tmp_path):
    some_image().save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"has 0 classes \(none\), but it takes two"):
        load(tmp_path)


def test_an_empty_class_folder_is_refused(folder):
    (folder / "fox").mkdir()
    with pytest.raises(ValueError, match=r"empty folders: fox; add the images of these classes or remove them"):
        load(folder, labels_per_class=1)


def test_split_folders_without_class_folders_are_refused(tmp_path):
    write_classes(tmp_path, {"train": 3, "test": 3})
    with pytest.raises(ValueError, match=r"lie directly in \['test', 'train'\]: give each one sub-folder per class"):
        load(tmp_path)


def test_a_test_folder_without_classes_is_refused_and_another_can_be_chosen(tmp_path):
    write_classes(tmp_path / "train", {"cat": 4, "dog": 4})
    write_classes(tmp_path / "val", {"cat": 2, "dog": 2})
    write_classes(tmp_path, {"test": 3})
    with pytest.raises(
        ValueError, match=r"3 of 3 images of split 'test' have no class: .*--test_split.*--test_fraction"
    ):
        load(tmp_path)
    assert len(load(tmp_path, test_split="val").test) == 4


def test_a_test_class_that_training_lacks_is_refused(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    write_classes(tmp_path / "test", {"cat": 3, "fox": 3})
    with pytest.raises(ValueError, match=r"split 'test' has classes that do not occur in training: fox; add"):
        load(tmp_path)


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    write_classes(tmp_path / "val", {"fox": 3})
    with pytest.raises(ValueError, match=r"split 'val' has classes that do not occur in training: fox"):
        load(tmp_path, validation_split="val", test_fraction=0.3)


@pytest.mark.parametrize("options", [{"validation_fraction": 0.5, "labels_per_class": 1}, {"test_fraction": 0.9}])
def test_a_class_without_a_labeled_image_is_refused(tmp_path, options):
    write_classes(tmp_path, {"cat": 1, "dog": 30, "owl": 30})
    with pytest.raises(ValueError, match=r"classes without a labeled training image: cat.*hold out fewer"):
        load(tmp_path, **options)


def test_fewer_images_than_classes_are_refused(folder):
    with pytest.raises(ValueError, match=r"classes without a labeled training image: owl; .*--max_images"):
        load(folder, max_images=2, labels_per_class=1)


@pytest.mark.parametrize("options", [{}, {"labeled_fraction": 1.0}, {"labels_per_class": 99}])
def test_nothing_to_test_on_is_refused(folder, options):
    with pytest.raises(ValueError, match=r"no test split .*--labeled_fraction .*--test_fraction"):
        load(folder, **options)


def test_a_missing_split_names_the_available_ones(tmp_path):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    write_classes(tmp_path / "test", {"cat": 3, "dog": 3})
    with pytest.raises(ValueError, match=r"no split 'fold3', only test, train: choose one with --test_split"):
        load(tmp_path, test_split="fold3")
    with pytest.raises(ValueError, match=r"one role only.*--validation_split or --test_split"):
        load(tmp_path, test_split="train")


@pytest.mark.parametrize("content", [b"", b"not parquet"])
def test_broken_parquet_says_what_to_check(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    for dataset in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises((ValueError, DatasetsError), match=r"arquet|generating") as caught:
            load(dataset)
        assert f"--dataset {dataset} was read as" in caught.value.__notes__[0]


def test_an_empty_split_says_what_to_check(tmp_path):
    for split, number in (("train", 4), ("test", 0)):
        Dataset.from_dict(parquet_rows(number), features=NAMED).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"\"test\" corresponds to no data") as caught:
        load(tmp_path)
    assert f"--dataset {tmp_path} was read as tables: check that" in caught.value.__notes__[0]


def test_unreadable_images_are_named_before_training_or_skipped(tmp_path, folder, caplog):
    write_classes(tmp_path / "more", {"x": 2})
    broken = [folder / "cat" / "003.png", tmp_path / "more" / "x" / "001.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    options = {"labels_per_class": 3, "unlabeled_folder": str(tmp_path / "more")}
    with pytest.raises(ValueError, match=r"1 of 60 images of split 'train' cannot be used:\n  .*cat/003\.png"):
        load(folder, **options)
    with caplog.at_level(logging.WARNING):
        data = load(folder, skip_unreadable_images=True, **options)
    assert all(str(path) in caplog.text for path in broken)
    assert len(data.train) == 59 + 1
    assert 3 not in ids(data.train)
    assert len(pixels(data.train)) == len(set(ids(data.train))) == 60


def test_a_class_whose_images_are_all_unreadable_is_refused_also_when_skipping(tmp_path):
    write_classes(tmp_path, {"cat": 2, "dog": 4, "owl": 4})
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"classes without a labeled training image: cat"):
        load(tmp_path, skip_unreadable_images=True, labels_per_class=2)


def test_images_smaller_than_a_patch_are_refused(folder):
    with pytest.raises(ValueError, match=r"60 of 60 images .*\n.*8 x 8 pixels, smaller than a patch of 14 x 14"):
        load(folder, minimum_size=14, labels_per_class=2)


@pytest.mark.skipif(not (SHARED / "flowers17").is_dir(), reason="the data beside the project is not there")
def test_flowers17_as_one_of_ten_folds_is_labeled():
    data = load(SHARED / "flowers17", minimum_size=16, labeled_fraction=0.1)
    assert counts(data.train) == {UNKNOWN: 1224} | dict.fromkeys(range(17), 8)
    assert len(data.test) == 1224
