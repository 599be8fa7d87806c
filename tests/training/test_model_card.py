"""The model card: what the run measured is what the card says, to readers and to the Hub."""

import ast
import re
import shutil
import socket

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from modeling_bpgcn.training import model_card
from modeling_bpgcn.training.model_card import results_table, write_model_card

RESULTS = [
    {"method": "linear head on frozen features", "baseline": True, "accuracy": 0.812, "macro_f1": 0.8},
    {"method": "BPGCN", "accuracy": 0.9876, "macro_f1": 0.98, "ece": 0.0213, "neighbor_homophily": 0.951},
    {"method": "BPGCN, transductive", "accuracy": 0.991},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the model card asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _write(folder, **changes):
    arguments = {
        "model_name": "someone/bpgcn-digits",
        "label_names": [str(i) for i in range(10)],
        "data": {"name": "Digits", "id": "someone/digits", "split": "test", "training images": 1437, "labeled": 144},
        "results": RESULTS,
        "settings": {"num_neighbors": 10, "backbone_learning_rate": 0.0003, "seed": 0, "unlabeled_dir": None},
    } | changes
    return write_model_card(folder / "README.md", **arguments)


def _text(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_metadata_survives_the_round_trip(tmp_path):
    card = _write(tmp_path, base_model="facebook/dinov2-small", license="apache-2.0")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert (data.base_model, data.license, data.datasets) == ("facebook/dinov2-small", "apache-2.0", ["someone/digits"])
    assert "bpgcn" in data.tags


def test_the_model_index_holds_the_models_own_results(tmp_path):
    _write(tmp_path)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "accuracy": 0.9876,
        "f1": 0.98,
        "expected_calibration_error": 0.0213,
        "neighbor_homophily": 0.951,
    }
    assert {(result.dataset_type, result.dataset_split) for result in results} == {("someone/digits", "test")}


def test_the_page_shows_results_data_settings_and_versions(tmp_path):
    _write(tmp_path, versions={"torch": "1.2.3"})
    page = _text(tmp_path)
    assert "| **BPGCN** | 98.8 | 98.0 | 0.021 | 95.1 |" in page
    assert "| linear head on frozen features | 81.2 | 80.0 | – | – |" in page
    assert "| training images | 1437 |" in page
    assert "| num_neighbors | 10 |\n| backbone_learning_rate | 0.0003 |\n| seed | 0 |" in page
    assert "unlabeled_dir" not in page
    assert "10 classes: 0, 1, 2" in page
    assert "- torch 1.2.3" in page
    assert "One run with one seed" in page


def test_nothing_of_the_template_is_left_unfilled(tmp_path):
    _write(tmp_path)
    page = _text(tmp_path)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|None|\n\n\n", page)
    assert page.endswith("\n")
    names = set(re.findall(r"\{\{ (\w+)", model_card._template()))
    assert {"card_data", "results_table", "settings_rows", "data_rows", "version_list"} <= names


def test_snippets_are_python_and_name_the_model(tmp_path):
    _write(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", _text(tmp_path), flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        ast.parse(snippet)
        assert '"someone/bpgcn-digits"' in snippet


def test_versions_are_read_off_the_installation(tmp_path):
    import torch

    _write(tmp_path)
    assert f"- torch {torch.__version__.split('+')[0]}" in _text(tmp_path)


def test_many_classes_are_cut_short(tmp_path):
    _write(tmp_path, label_names=[f"class {i}" for i in range(50)])
    assert "50 classes: class 0, " in _text(tmp_path)
    assert "class 19 and 30 more." in _text(tmp_path)


def test_folders_of_the_machine_stay_private_and_tables_hold(tmp_path):
    settings = {"data": str(tmp_path / "flowers"), "note": "a|b\nc", "blocks": [1, 2]}
    _write(tmp_path, settings=settings)
    page = _text(tmp_path)
    assert str(tmp_path) not in page
    assert "| data | flowers |\n| note | a\\|b c |\n| blocks | 1, 2 |" in page


def test_a_local_model_has_a_title_and_no_data_set_on_the_hub(tmp_path):
    _write(tmp_path, model_name="runs/digits", data={"name": "Digits"})
    page = _text(tmp_path)
    assert "\n# digits\n" in page
    assert 'name = "runs/digits"' in page
    assert ModelCard.load(tmp_path / "README.md").data.datasets is None


def test_pictures_are_linked_relative_to_the_card(tmp_path):
    (tmp_path / "plots").mkdir()
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save(tmp_path / "plots" / "curves.png")
    _write(tmp_path, pictures={"Training curves": tmp_path / "plots" / "curves.png", "Again": "plots/curves.png"})
    assert "![Training curves](plots/curves.png)\n\n![Again](plots/curves.png)\n\n## How to use" in _text(tmp_path)


def test_the_template_of_a_wheel_lies_beside_the_module(tmp_path, monkeypatch):
    shutil.copy(model_card.__file__, tmp_path / "model_card.py")
    (tmp_path / "model_card.md").write_text("the installed template", encoding="utf-8")
    monkeypatch.setattr(model_card, "__file__", str(tmp_path / "model_card.py"))
    assert model_card._template() == "the installed template"


def test_results_table_keeps_unknown_columns():
    table = results_table([{"method": "a", "accuracy": 1.0, "seconds": 12.5, "note": "x"}])
    assert (
        table == "| method | accuracy | seconds | note |\n| --- | ---: | ---: | ---: |\n| **a** | 100.0 | 12.500 | x |"
    )


def test_bad_input_is_named_with_its_remedy(tmp_path):
    with pytest.raises(ValueError, match="data has no 'name'"):
        _write(tmp_path, data={"training images": 3})
    with pytest.raises(ValueError, match=r"None of the 1 results is the model's own"):
        _write(tmp_path, results=RESULTS[:1])
    with pytest.raises(ValueError, match=r"missing.png is not a file below"):
        _write(tmp_path, pictures={"x": "missing.png"})
    with pytest.raises(ValueError, match=r"is not a file below .*: save it beside the model card"):
        _write(tmp_path / "card", pictures={"x": __file__})
