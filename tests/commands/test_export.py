"""`export`: files that answer as the model does, or a non-zero exit status."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.commands import export
from modeling_bpgcn.commands.export import main
from modeling_bpgcn.export import bank_inputs, run_file
from tests.model_factory import tiny_images

QUIET = "--disable_tqdm"


def test_torch_export_with_the_bank_beside_it(run, model_folder, pictures, tmp_path):
    options = (
        "--format",
        "torch_export",
        "--bank",
        "input",
        QUIET,
        "--check",
        pictures / "class 0",
        "--num_workers",
        0,
    )
    status, out, err = run(main, model_folder, "--output", tmp_path / "new", *options)
    assert status == 0, err
    names = ["config.json", "model.pt2", "preprocessor_config.json", "support_bank.safetensors", "support_images.csv"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert "\nmodel.pt2 " in out
    assert "\nsupport_bank.safetensors " in out
    assert "20 of 20 given images get the model's class" in out
    model = BPGCNForImageClassification.from_pretrained(model_folder)
    stored = load_file(tmp_path / "new" / "support_bank.safetensors")
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in bank_inputs(model).items()
    }
    pixel_values = tiny_images(4, model.config.backbone_config.image_size)
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).logits
    found = run_file(tmp_path / "new" / "model.pt2", stored)(pixel_values)["logits"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_onnx_of_another_image_size(run, model_folder, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    side = 2 * BPGCNForImageClassification.from_pretrained(model_folder).config.backbone_config.image_size
    status, out, err = run(main, model_folder, "--output", tmp_path / "new", "--image_size", side, QUIET)
    assert status == 0, err
    assert "\nmodel.onnx " in out
    assert "8 of 8 synthetic images get the model's class" in out
    processor = AutoImageProcessor.from_pretrained(tmp_path / "new", backend="pil")
    assert processor.crop_size.height == side
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "bpgcn"
    assert len((tmp_path / "new" / "support_images.csv").read_text().splitlines()) == 31
    status, _, err = run(main, model_folder, "--output", tmp_path / "new")
    assert status == 2
    assert f"--output {tmp_path / 'new'} is not an empty folder" in err


def test_another_answer_than_the_models_is_an_error(run, model_folder, tmp_path, monkeypatch):
    def wrong(path, support):
        right = run_file(path, support)
        return lambda pixel_values: (lambda given: given | {"logits": given["logits"] + 0.01})(right(pixel_values))

    monkeypatch.setattr(export, "run_file", wrong)
    options = ("--format", "torch_export", "--overwrite", QUIET)
    (tmp_path / "notes.txt").write_text("kept")
    status, out, _ = run(main, model_folder, "--output", tmp_path, *options)
    assert status == 1
    assert "model.pt2" in out
    assert " 1.0e-02" in out
    assert "The exported model does not answer as MODEL does." in out
    assert (tmp_path / "notes.txt").exists()


def test_missing_packages_and_options_that_do_not_fit_are_named(run, model_folder, empty_model, tmp_path, monkeypatch):
    def missing(*packages):
        raise ImportError("ONNX files need onnxscript: pip install 'bpgcn[onnx]'.")

    monkeypatch.setattr(export, "require", missing)
    output = ("--output", tmp_path / "new")
    status, _, err = run(main, model_folder, *output)
    assert status == 2
    assert "pip install 'bpgcn[onnx]'" in err
    assert not (tmp_path / "new").exists()
    status, _, err = run(main, model_folder, *output, "--format", "torch_export", "--opset", 20)
    assert status == 2
    assert "--opset 20 is of ONNX files" in err
    status, _, err = run(main, model_folder, *output, "--format", "torch_export", "--image_size", 9)
    assert status == 2
    assert "image size 9 is not a multiple" in err
    assert not (tmp_path / "new").exists()
    status, _, err = run(main, empty_model, *output, "--format", "torch_export")
    assert status == 2
    assert "no support bank to answer from" in err
