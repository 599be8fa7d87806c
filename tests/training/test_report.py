"""What a run leaves for people: the table, the pictures, the model card, and commands to try next."""

import json
import shlex
from pathlib import Path

import PIL.Image
import pytest
import torch

from modeling_bpgcn.training import report
from modeling_bpgcn.training.data import DataArguments
from modeling_bpgcn.training.images import image_transform
from modeling_bpgcn.training.report import draw_neighbors, format_table, keep_thumbnails, own_results, write_report
from modeling_bpgcn.training.thumbnails import read_thumbnails
from tests.training_factory import PROCESSOR, digit_trainer, digits

METRICS = {"test_accuracy": 0.5, "test_macro_f1": 0.25, "test_ece": 0.125, "test_neighbor_homophily": 0.75}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trained run with its bank, in a folder with a space in its name."""
    trainer = digit_trainer(tmp_path_factory.mktemp("runs") / "my run", max_steps=2, curves=True)
    trainer.train()
    trainer.build_support_bank()
    return trainer


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_models_own_rows_are_inductive_and_transductive_where_asked():
    assert own_results(METRICS | {"test_loss": 1.0, "epoch": 2.0}) == [
        {
            "method": "BPGCN, from the support bank",
            "accuracy": 0.5,
            "macro_f1": 0.25,
            "ece": 0.125,
            "neighbor_homophily": 0.75,
        }
    ]
    both = own_results(METRICS | {"test_transductive_accuracy": 0.625})
    assert [row["method"] for row in both] == ["BPGCN, from the support bank", "BPGCN, transductive"]
    assert both[1] == {"method": "BPGCN, transductive", "accuracy": 0.625}


def test_the_table_is_in_percent_and_marks_what_was_not_measured():
    rows = [{"method": "a baseline", "accuracy": 0.5, "baseline": True}, *own_results(METRICS)]
    assert format_table(rows).splitlines() == [
        "                              accuracy  macro-F1   ECE  homophily",
        "a baseline                        50.0         -     -          -",
        "BPGCN, from the support bank      50.0      25.0  12.5       75.0",
    ]


def test_a_metric_that_no_row_has_is_no_column():
    assert format_table([{"method": "m", "accuracy": 1.0}]).splitlines() == ["   accuracy", "m     100.0"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture_shows_what_the_model_answers_and_rests_on(trainer, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot_neighbors", lambda queries, path, names: drawn.extend(queries))
    data = digits()
    draw_neighbors(trainer, data, image_transform(PROCESSOR), tmp_path / "neighbors.png")
    assert 2 <= len(drawn) <= report.NUM_PICTURED
    model = trainer.model.eval()
    train_images = {image.convert("RGB").tobytes(): row for row, image in enumerate(data.train["image"])}
    for query in drawn:
        row = next(i for i, image in enumerate(data.test["image"]) if image.convert("RGB").tobytes() == pixels(query))
        assert query.label == data.test[row]["label"]
        with torch.no_grad():
            answer = model(trainer.eval_dataset[row]["pixel_values"][None])
        assert query.prediction == int(answer.logits.argmax())
        assert query.probability == pytest.approx(answer.logits.max().exp().item(), rel=1e-4)
        assert query.neighbor_weights == pytest.approx(answer.neighbor_weights[0].tolist(), rel=1e-3)
        # each neighbour's picture is that of the support image whose class is drawn under it
        rows = [train_images[image.convert("RGB").tobytes()] for image in query.neighbor_images]
        assert rows == answer.neighbor_indices[0].tolist()
        assert query.neighbor_classes == [data.train[row]["label"] for row in rows]


def pixels(query) -> bytes:
    return query.image.convert("RGB").tobytes()


def test_wrong_answers_come_first_then_one_of_each_class():
    answers = torch.tensor([0, 1, 1, 2, 2, 0, 3, 4, 5])
    labels = torch.tensor([0, 1, 1, 0, 1, 2, 3, 4, 5])
    assert report._pick(answers, labels) == [3, 4, 0, 1, 6, 7]
    assert report._pick(labels, labels) == [0, 1, 5, 6, 7, 8]


def test_thumbnails_are_those_of_the_support_images_unless_they_are_many(trainer, tmp_path, monkeypatch):
    data, model = digits(), trainer.bpgcn
    ids = model.support_bank.ids.tolist()
    monkeypatch.setattr(report, "MAX_THUMBNAILS", len(ids) - 1)
    keep_thumbnails(ids, data, tmp_path)
    assert read_thumbnails(str(tmp_path), model) == {}
    monkeypatch.setattr(report, "MAX_THUMBNAILS", len(ids))
    keep_thumbnails(ids, data, tmp_path)
    found = read_thumbnails(str(tmp_path), model)
    assert list(found) == ids
    for node, image in zip(data.train["node_id"], data.train["image"], strict=True):
        assert found[node].tobytes() == image.convert("RGB").tobytes()


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(trainer):
    """The folder after `write_report`, and what it printed."""
    results = [{"method": "fixed graph", "accuracy": 0.25, "baseline": True}, *own_results(METRICS)]
    arguments = DataArguments("digits", labels_per_class=4, max_images=64)
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **options: printed.append(text))
        write_report(trainer, digits(), arguments, results, image_transform(PROCESSOR), {"num_neighbors": 4}, None)
    (text,) = printed
    return Path(trainer.args.output_dir), text, results


def test_results_pictures_card_and_example_are_written(written):
    folder, _, results = written
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("neighbors.png", "training_curves.png", "example.png"):
        with PIL.Image.open(folder / name) as image:
            assert min(image.size) >= 8
    card = (folder / "README.md").read_text()
    assert "**BPGCN, from the support bank**" in card
    assert "![Test images and their neighbours](neighbors.png)" in card
    assert "| fixed graph |" in card
    assert "num_neighbors" in card


def test_the_table_the_protocol_and_the_paths_are_printed(written):
    folder, text, results = written
    assert format_table(results) in text
    assert "64 test images, never seen in training; 40 of 64 training images labelled." in text
    for name in ("training_curves.png", "neighbors.png", "README.md"):
        assert str(folder / name) in text


def test_the_commands_are_printed_that_a_shell_reads_as_meant(written):
    folder, text, _ = written
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    .venv/bin/")]
    ask, drop, fewer, logs = commands
    assert " " in str(folder)
    assert ask[:2] == [".venv/bin/python", "-c"]
    compile(ask[2], "printed", "exec")
    assert len(ask) == 3
    assert repr(str(folder)) in ask[2]
    assert repr(str(folder / "example.png")) in ask[2]
    assert drop == [".venv/bin/python", "-m", "modeling_bpgcn", "app", str(folder)]
    assert fewer[:3] == [".venv/bin/accelerate", "launch", "train.py"]
    assert fewer[3] == str(folder / "recipe.yaml")
    assert fewer[4:] == ["--labels_per_class", "2", "--output_dir", f"{folder}-fewer-labels"]
    assert logs == [".venv/bin/tensorboard", "--logdir", str(folder)]


@pytest.mark.parametrize(
    ("options", "fewer"),
    [
        ({"labeled_fraction": 0.1}, "--labeled_fraction 0.05"),
        ({"labels_per_class": 1}, "--labels_per_class 1"),
        ({"test_fraction": 0.5}, "--labels_per_class 5"),
    ],
)
def test_half_of_the_labels_in_the_terms_of_the_run(options, fewer):
    assert fewer in report._what_next(Path("runs/a"), DataArguments("digits", **options))


def test_a_simple_folder_gives_commands_that_are_simple_to_read():
    text = report._what_next(Path("runs/digits"), DataArguments("digits"))
    assert ".venv/bin/python -m modeling_bpgcn app runs/digits\n" in text
    assert "print(pipeline('image-classification', 'runs/digits')('runs/digits/example.png'))\"" in text
    assert "launch train.py runs/digits/recipe.yaml " in text
    assert text.endswith("tensorboard --logdir runs/digits")
