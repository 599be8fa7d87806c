"""Files of exported models: run by onnxruntime or torch alone, with what their users must know in the metadata."""

import builtins
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil

from modeling_bpgcn.export import BANKS, bank_inputs, compare, export_onnx, run_file, save_program
from tests.export.export_factory import fill, model_with_bank
from tests.export.test_program import EUCLIDEAN, RELAXATIONS, assert_agrees
from tests.model_factory import HEAD_NAMES, tiny_images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return model_with_bank()


@pytest.fixture(scope="module")
def processor():
    return BitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False, image_mean=[0.5, 0.25, 0.75])


@pytest.fixture(scope="module")
def onnx_file(model, processor, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx", 8, image_processor=processor)


@pytest.fixture(scope="module")
def program_file(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    return save_program(model, path, 8, bank="input", image_processor=processor)


def in_another_process(code: str, *arguments) -> str:
    """The output of code that must run without this package."""
    code = "import sys\nsys.modules['modeling_bpgcn'] = sys.modules['transformers'] = None\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_onnx_agrees_on_64_images_in_batches_of_any_size(model, onnx_file):
    run, pixel_values = run_file(onnx_file), tiny_images(64)
    for batch_size in (64, 7, 1):
        found = compare(model, run, pixel_values, batch_size)
        assert found.agrees
        assert found.logits < 1e-5
        assert (found.same_class, found.ties, found.other_neighbors) == (64, 0, 0)
    assert_agrees(run, model, pixel_values)


def test_program_agrees_on_64_images_with_banks_of_any_size(model, program_file):
    model = copy.deepcopy(model)
    for count in (6, 41):
        fill(model, count)
        assert_agrees(run_file(program_file, bank_inputs(model)), model, tiny_images(64))


def test_onnx_with_the_bank_as_input_of_any_size(tmp_path):
    model = model_with_bank(bank_dtype="float16", graph_normalization="symmetric", **EUCLIDEAN)
    path = export_onnx(model, tmp_path / "model.onnx", 8, bank="input")
    inputs = {value.name: value.shape for value in onnxruntime.InferenceSession(path).get_inputs()}
    assert list(inputs) == ["pixel_values", *bank_inputs(model)]
    assert len({shape[0] for name, shape in inputs.items() if name != "pixel_values"}) == 1
    for count in (20, 5, 37):
        fill(model, count)
        assert_agrees(run_file(path, bank_inputs(model)), model, tiny_images(7))


def test_onnx_takes_the_first_of_equal_images(tmp_path):
    model = model_with_bank(ranking_relaxation="entmax")
    features, classes = model.support_bank.features, model.support_bank.classes
    model.set_support_bank(features.repeat_interleave(3, 0), classes.repeat_interleave(3))
    assert_agrees(run_file(export_onnx(model, tmp_path / "model.onnx", 8, opset=20)), model, tiny_images(16))
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 20


def test_onnxruntime_alone_runs_it_and_knows_how_to_prepare_images(onnx_file, model, tmp_path):
    code = """
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
logits, indices, weights = session.run(None, {"pixel_values": numpy.load(sys.argv[2])})
assert "torch" not in sys.modules
about = session.get_modelmeta().custom_metadata_map
print(json.dumps([logits.tolist(), indices.tolist(), [value.name for value in session.get_outputs()], about]))
"""
    pixel_values = tiny_images(5)
    np.save(tmp_path / "images.npy", pixel_values.numpy())
    logits, indices, names, about = json.loads(in_another_process(code, onnx_file, tmp_path / "images.npy"))
    with torch.no_grad():
        expected = model(pixel_values=pixel_values)
    torch.testing.assert_close(torch.tensor(logits), expected.logits, atol=1e-5, rtol=0)
    assert indices == expected.neighbor_indices.tolist()
    assert names == ["logits", "neighbor_indices", "neighbor_weights"]
    assert (about["model_type"], about["bank"]) == ("bpgcn", "constant")
    assert json.loads(about["class_names"]) == list(model.config.id2label.values())
    assert json.loads(about["image_processor"])["image_mean"] == [0.5, 0.25, 0.75]
    assert json.loads(about["bank_fingerprint"]) == model.support_bank.fingerprint


def test_torch_alone_runs_a_program(program_file, model, tmp_path):
    code = """
import json, torch
extra = {"metadata.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
given = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    logits = module(given.pop("pixel_values"), **given)["logits"]
print(json.dumps([logits.tolist(), json.loads(extra["metadata.json"])]))
"""
    pixel_values = tiny_images(5)
    torch.save({"pixel_values": pixel_values} | bank_inputs(model), tmp_path / "given.pt")
    logits, about = json.loads(in_another_process(code, program_file, tmp_path / "given.pt"))
    with torch.no_grad():
        expected = model(pixel_values=pixel_values)
    torch.testing.assert_close(torch.tensor(logits), expected.logits, atol=1e-5, rtol=0)
    assert about["bank"] == "input"
    assert "bank_fingerprint" not in about
    assert json.loads(about["class_names"]) == list(model.config.id2label.values())


def test_missing_packages_are_named(model, onnx_file, monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("onnx"):
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need onnx: pip install 'bpgcn\[onnx\]'\."):
        export_onnx(model, onnx_file, 8)
    with pytest.raises(ImportError, match=r"need onnxruntime: pip install 'bpgcn\[onnx\]'\."):
        run_file(onnx_file)


@pytest.mark.slow
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("normalization", ["all", "selected"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_onnx_of_every_relaxation(relaxation, normalization, bank, tmp_path):
    model = model_with_bank(ranking_relaxation=relaxation, ranking_normalization=normalization)
    path = export_onnx(model, tmp_path / "model.onnx", 8, bank=bank)
    assert_agrees(run_file(path, bank_inputs(model) if bank == "input" else None), model, tiny_images(16))


@pytest.mark.slow
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_onnx_of_every_head(head, bank, tmp_path):
    model = model_with_bank(head=head)
    path = export_onnx(model, tmp_path / "model.onnx", 8, bank=bank)
    assert_agrees(run_file(path, bank_inputs(model) if bank == "input" else None), model, tiny_images(16))
