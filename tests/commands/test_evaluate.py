"""`evaluate`: the metrics of the model's own answers on labelled images, from the bank or as one graph."""

import json
import shutil

import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from transformers import AutoImageProcessor

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.commands.evaluate import main
from modeling_bpgcn.training.metrics import classification_metrics
from tests.training_factory import PROCESSOR, tiny_digit_model


@pytest.fixture(scope="module")
def unseen(pictures, tmp_path_factory):
    """CLASS/NUMBER.png, ten of each class that are not in the bank."""
    folder = tmp_path_factory.mktemp("unseen")
    for name in ("class 0", "class 1", "class 2"):
        (folder / name).mkdir()
        for number in range(10, 20):
            shutil.copy(pictures / name / f"{number}.png", folder / name)
    return folder


@pytest.fixture(scope="module")
def loaded(model_folder, unseen):
    """The model, and pixels and labels of `unseen` in the order of their files."""
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    files = sorted(unseen.rglob("*.png"))
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([int(file.parent.name.removeprefix("class ")) for file in files])
    return BPGCNForImageClassification.from_pretrained(model_folder).eval(), pixels, labels


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
def test_metrics_are_those_of_the_models_answers(run, model_folder, unseen, loaded, protocol):
    options = ["--transductive"] if protocol == "transductive" else []
    status, out, err = run(main, model_folder, unseen, "--format", "json", "--batch_size", 7, *options)
    assert status == 0, err
    results = json.loads(out)
    model, pixels, labels = loaded
    outputs = model(pixel_values=pixels, support="bank" if protocol == "inductive" else "transductive")
    classes = torch.cat([model.support_bank.classes, torch.full((30,), -100)])
    expected = classification_metrics(outputs.logits, labels, classes[outputs.neighbor_indices])
    assert set(expected) == {"accuracy", "macro_f1", "ece", "neighbor_homophily"}
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    bank = torch.nn.functional.normalize(model.support_bank.features, dim=-1)
    similarity = torch.nn.functional.normalize(outputs.features, dim=-1) @ bank.T
    relevant = labels[:, None] == model.support_bank.classes
    precision = [average_precision_score(r, s) for r, s in zip(relevant.numpy(), similarity.numpy(), strict=True)]
    assert results["map"] == pytest.approx(sum(precision) / len(precision), abs=1e-4)
    nearest = relevant.gather(1, similarity.topk(4).indices)
    assert results["recall"] == pytest.approx(nearest.any(-1).float().mean().item(), abs=1e-6)
    assert (results["images"], results["support_images"], results["num_neighbors"]) == (30, 30, 4)
    assert (results["protocol"], results["split"], results["unreadable"]) == (protocol, "train", 0)


def test_the_two_protocols_differ(run, model_folder, unseen):
    inductive, transductive = (
        json.loads(run(main, model_folder, unseen, "--format", "json", *options)[1])
        for options in ([], ["--transductive"])
    )
    assert inductive["ece"] != transductive["ece"]
    assert inductive["map"] == pytest.approx(transductive["map"])


def test_the_table(run, model_folder, unseen):
    _, out, err = run(main, model_folder, unseen)
    first, second, blank, *rows = out.splitlines()
    assert first == f"{model_folder} on 30 images of {unseen}, split train"
    assert (second, blank) == ("inductive, from 30 support images", "")
    names = [row.rpartition("  ")[0].strip() for row in rows]
    assert names == [
        "accuracy",
        "macro-F1",
        "expected calibration error",
        "neighbor homophily",
        "retrieval mAP",
        "retrieval recall@4",
    ]
    assert all(0 <= float(row.split()[-1]) <= 1 for row in rows)
    assert "too good" not in err


def test_images_of_the_bank_are_pointed_out(run, model_folder, pictures):
    status, _, err = run(main, model_folder, pictures)
    assert status == 0
    assert "30 of 60 images look as if they were in the support bank too" in err


def test_unreadable_and_unlabeled_images_count_nowhere(run, model_folder, unseen, tmp_path):
    shutil.copytree(unseen, tmp_path / "data")
    (tmp_path / "data" / "class 0" / "11.png").write_bytes(b"no image")
    shutil.copy(unseen / "class 0" / "12.png", tmp_path / "data" / "loose.png")
    status, out, err = run(main, model_folder, tmp_path / "data", "--format", "json")
    assert status == 1
    assert (json.loads(out)["images"], json.loads(out)["unreadable"]) == (29, 1)
    assert "1 of 30 images could not be read:" in err


def test_data_sets_are_read_by_split(run, tmp_path):
    names = {number: str(number) for number in range(10)}
    model = tiny_digit_model()
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    model.set_support_bank(torch.randn(20, 16), torch.arange(20) % 10)
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    status, out, err = run(main, tmp_path, "digits", "--format", "json", "--batch_size", 512)
    assert status == 0, err
    assert (json.loads(out)["images"], json.loads(out)["split"]) == (450, "test")
    status, _, err = run(main, tmp_path, "digits", "--split", "dev")
    assert status == 2
    assert "no split 'dev', only train, test: choose one with --split" in err


def test_classes_that_the_model_does_not_know_are_named(run, model_folder):
    status, _, err = run(main, model_folder, "digits")
    assert status == 2
    assert "DATA digits has classes that the model does not know: 0, 1, 2" in err


def test_missing_data_and_banks_are_named(run, model_folder, empty_model, tmp_path):
    status, _, err = run(main, model_folder, tmp_path / "missing")
    assert status == 2
    assert str(tmp_path / "missing") in err
    assert "no support bank" in run(main, empty_model, "digits")[2]
