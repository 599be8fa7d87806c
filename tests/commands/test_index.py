"""`index`: a bank from folders of images, saved with the model, that answers as one built in Python."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.commands.index import main
from modeling_bpgcn.commands.predict import main as predict
from modeling_bpgcn.commands.support_files import SUPPORT_FILES
from modeling_bpgcn.training.thumbnails import read_thumbnails


@pytest.fixture
def few(pictures, tmp_path):
    """CLASS/NUMBER.png, ten of each class: those of `model_folder`."""
    for name in ("class 0", "class 1", "class 2"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(10):
            shutil.copy(pictures / name / f"{number}.png", tmp_path / "few" / name)
    return tmp_path / "few"


def bank(folder):
    return BPGCNForImageClassification.from_pretrained(folder).support_bank


def table(folder) -> list[dict]:
    with (folder / SUPPORT_FILES).open() as file:
        return list(csv.DictReader(file))


def test_folders_are_classes_and_the_bank_is_that_of_python(run, empty_model, model_folder, few, tmp_path):
    status, out, err = run(main, empty_model, few, "--output", tmp_path / "new", "--batch_size", 7)
    assert (status, out) == (0, f"saved {tmp_path / 'new'}: 30 support images, 30 of them labeled, of 3 classes\n"), err
    built, expected = bank(tmp_path / "new"), bank(model_folder)
    assert torch.equal(built.classes, expected.classes)
    for name in ("features", "propagated", "state_0"):
        assert getattr(expected, name).abs().sum() > 0
        torch.testing.assert_close(getattr(built, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert built.ids.tolist() == list(range(30))
    assert table(tmp_path / "new")[10] == {"id": "10", "file": "class 1/0.png", "class": "class 1"}
    status, out, _ = run(predict, tmp_path / "new", few / "class 1" / "0.png", "--neighbors", 4)
    assert status == 0
    assert "class 1/0.png class 1 " in out  # itself, by its file


def test_images_of_no_class_folder_are_unknown(run, empty_model, few, tmp_path):
    shutil.copy(few / "class 0" / "1.png", few / "loose.png")
    status, out, _ = run(main, empty_model, few, few / "class 2" / "3.png", "--output", tmp_path / "new")
    assert status == 0
    assert "31 support images, 30 of them labeled, of 3 classes" in out
    assert bank(tmp_path / "new").classes.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [-100]
    assert table(tmp_path / "new")[-1] == {"id": "30", "file": "loose.png", "class": ""}


def test_classes_can_come_from_a_table(run, empty_model, few, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(f"class,file\nclass 2,class 0/0.png\n,class 0/1.png\nclass 1,{few / 'class 2' / '9.png'}\n")
    status, _, err = run(main, empty_model, few, "--output", tmp_path / "new", "--labels", labels)
    assert status == 0, err
    assert bank(tmp_path / "new").classes.tolist() == [2] + [-100] * 28 + [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\na,b\n", "has no column class"),
        ("", "has no column class and file"),
        ("file,class\nnone.png,class 0\n", "names 1 files that are not among the images, the first none.png"),
        ("file,class\nclass 0/1.png,class 0\nclass 0/1.png,class 1\n", "gives class 0/1.png two classes"),
        ("file,class\nclass 0/1.png,dog\n", "classes that the model does not know: dog. It knows class 0, class 1"),
    ],
)
def test_tables_that_cannot_be_are_named(run, empty_model, few, tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    options = ("--output", tmp_path / "new", "--labels", tmp_path / "labels.csv")
    status, _, err = run(main, empty_model, few, *options)
    assert status == 2
    assert message in err
    assert not (tmp_path / "new").exists()


def test_folders_of_unknown_classes_are_named(run, empty_model, few, tmp_path):
    (few / "class 0").rename(few / "dogs")
    status, _, err = run(main, empty_model, few, "--output", tmp_path / "new")
    assert status == 2
    assert f"IMAGES {few} has classes that the model does not know: dogs" in err


def test_broken_images_are_left_out_and_named(run, empty_model, few, tmp_path):
    (few / "class 0" / "0.png").write_bytes(b"")
    status, out, err = run(main, empty_model, few, "--output", tmp_path / "new")
    assert status == 1
    assert "29 support images" in out
    assert "1 of 30 images could not be read:" in err
    assert bank(tmp_path / "new").classes.tolist() == [0] * 9 + [1] * 10 + [2] * 10
    assert table(tmp_path / "new")[0] == {"id": "0", "file": "class 0/1.png", "class": "class 0"}


def test_a_model_is_replaced_only_when_asked_for_even_in_its_place(run, empty_model, few, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(empty_model, model)
    status, _, err = run(main, model, few, "--output", model)
    assert status == 2
    assert f"--output {model} holds a model" in err
    assert bank(model).size == 0
    before = BPGCNForImageClassification.from_pretrained(empty_model).bpgcn.backbone.state_dict()
    assert run(main, model, few, "--output", model, "--overwrite")[0] == 0
    after = BPGCNForImageClassification.from_pretrained(model)
    assert after.support_bank.size == 30
    for name, value in after.bpgcn.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_images_can_be_added_to_a_bank(run, empty_model, few, pictures, tmp_path):
    assert run(main, empty_model, few, "--output", tmp_path / "one")[0] == 0
    more = ("--add", "--output", tmp_path / "two")
    status, out, err = run(main, tmp_path / "one", pictures / "class 0" / "1?.png", few, *more)
    assert status == 0, err
    assert "40 support images, 30 of them labeled, of 3 classes; 70 in all" in out
    one, two = bank(tmp_path / "one"), bank(tmp_path / "two")
    assert torch.equal(two.features[:30], one.features)
    assert two.classes.tolist() == one.classes.tolist() + [-100] * 10 + one.classes.tolist()
    assert two.ids.tolist() == list(range(70))
    rows = table(tmp_path / "two")
    assert [rows[row]["file"] for row in (0, 30, 69)] == ["class 0/0.png", "10.png", "class 2/9.png"]


def test_a_bank_of_other_pixels_is_not_added_to(run, empty_model, few, tmp_path):
    assert run(main, empty_model, few, "--output", tmp_path / "one")[0] == 0
    settings = json.loads((tmp_path / "one" / "preprocessor_config.json").read_text())
    (tmp_path / "one" / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    status, _, err = run(main, tmp_path / "one", few, "--add", "--output", tmp_path / "two")
    assert status == 2
    assert "The support bank does not fit this model" in err
    assert not (tmp_path / "two").exists()
    status, _, err = run(predict, tmp_path / "one", few)
    assert status == 2
    assert f"MODEL {tmp_path / 'one'}: The support bank does not fit this model" in err


def test_nothing_is_saved_where_no_image_can_be_read(run, empty_model, tmp_path):
    status, out, err = run(main, empty_model, tmp_path / "missing", "--output", tmp_path / "new")
    assert (status, out) == (1, "")
    assert "missing: No such file" in err
    assert not (tmp_path / "new").exists()


def test_thumbnails_are_kept_beside_the_bank_they_are_of(run, empty_model, few, pictures, tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert run(main, empty_model, few, "--output", one, "--thumbnails")[0] == 0
    more = pictures / "class 0" / "1?.png"
    assert run(main, one, more, "--add", "--output", two, "--thumbnails")[0] == 0
    assert run(main, one, more, "--add", "--output", three)[0] == 0
    expected = [few / f"class {label}" / f"{number}.png" for label in range(3) for number in range(10)]
    expected += [pictures / "class 0" / f"{number}.png" for number in range(10, 20)]
    for folder, count in ((one, 30), (two, 40), (three, 30)):
        found = read_thumbnails(str(folder), BPGCNForImageClassification.from_pretrained(folder))
        assert list(found) == list(range(count))
        for id_, path in enumerate(expected[:count]):
            with Image.open(path) as image:
                assert found[id_].tobytes() == image.tobytes()
    assert run(main, one, few / "class 1", few / "class 0", "--output", one, "--overwrite")[0] == 0
    assert read_thumbnails(str(one), BPGCNForImageClassification.from_pretrained(one)) == {}  # they were of others
