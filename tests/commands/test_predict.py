"""`predict`: the model's own answers for every file that can be read, and the others by name."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.commands.predict import main
from modeling_bpgcn.commands.support_files import SUPPORT_FILES
from tests.model_factory import tiny_backbone
from tests.training_factory import ROOT


def answers(printed: str) -> list[dict]:
    return [json.loads(line) for line in printed.splitlines()]


def model_outputs(folder, files):
    model = BPGCNForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(**processor([Image.open(file) for file in files], return_tensors="pt"))


def test_json_lines_hold_the_models_answers(run, model_folder, pictures):
    files = sorted((pictures / "class 1").iterdir())[:5]
    options = ("--format", "jsonl", "--top_k", 2, "--neighbors", 3, "--batch_size", 2)
    status, out, _ = run(main, model_folder, *files, *options)
    outputs, given = model_outputs(model_folder, files), answers(out)
    assert status == 0
    assert [answer["file"] for answer in given] == [str(file) for file in files]
    probabilities = outputs.logits.exp()
    for row, answer in enumerate(given):
        order = probabilities[row].argsort(descending=True)[:2]
        assert [found["class"] for found in answer["predictions"]] == [f"class {c}" for c in order.tolist()]
        found = torch.tensor([found["probability"] for found in answer["predictions"]])
        torch.testing.assert_close(found, probabilities[row, order], atol=1e-5, rtol=0)
        heavy = outputs.neighbor_weights[row].argsort(descending=True)[:3]
        places = outputs.neighbor_indices[row, heavy]
        assert [near["id"] for near in answer["neighbors"]] == [100 + place for place in places.tolist()]
        assert [near["class"] for near in answer["neighbors"]] == [f"class {place // 10}" for place in places.tolist()]
        weights = torch.tensor([near["weight"] for near in answer["neighbors"]])
        torch.testing.assert_close(weights, outputs.neighbor_weights[row, heavy], atol=1e-5, rtol=0)
    assert len({json.dumps(answer["predictions"]) for answer in given}) > 1


def test_the_table_has_a_row_for_each_class(run, model_folder, pictures):
    _, out, _ = run(main, model_folder, pictures / "class 0" / "1?.png", "--top_k", 99, "--neighbors", 1)
    header, *rows = out.splitlines()
    assert header.split() == ["file", "class", "probability", "neighbors"]
    assert len(rows) == 10 * 3
    for number in range(10):
        first, *others = rows[3 * number : 3 * number + 3]
        assert first.startswith(str(pictures / "class 0" / f"1{number}.png"))
        assert "#1" in first
        assert all(row.startswith(" ") and "#" not in row for row in others)
        shares = [float(re.search(r"class \d +(\d\.\d+)", row)[1]) for row in (first, *others)]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=2e-4)


def test_what_it_does_without_neighbors(run, model_folder, pictures):
    _, out, err = run(main, model_folder, pictures / "class 2" / "3.png")
    assert out.splitlines()[0].split() == ["file", "class", "probability"]
    assert "1/1" in err  # the bar
    _, _, err = run(main, model_folder, pictures / "class 2" / "3.png", "--disable_tqdm")
    assert "1/1" not in err


def test_the_table_keeps_a_row_for_what_cannot_be_read(run, model_folder, pictures, tmp_path):
    (tmp_path / "broken\n.png").touch()
    status, out, err = run(main, model_folder, tmp_path, pictures / "class 0" / "1.png", tmp_path / "missing.png")
    assert status == 1
    _, first, second, third = out.splitlines()
    assert first.split() == [str(tmp_path / "broken\\n.png"), "-", "-"]
    assert second.startswith(str(pictures / "class 0" / "1.png"))
    assert third.split() == [str(tmp_path / "missing.png"), "-", "-"]
    assert err.endswith(
        "2 of 3 images could not be read:\n"
        f"  {tmp_path}/broken\\n.png: empty file\n  {tmp_path}/missing.png: No such file or directory\n"
    )


def test_a_file_of_answers_is_not_lost(run, model_folder, pictures, tmp_path):
    target, image = tmp_path / "answers.jsonl", pictures / "class 2" / "3.png"
    status, out, _ = run(main, model_folder, image, "--output", target)
    assert (status, out) == (0, "")
    [answer] = answers(target.read_text())
    assert answer["file"] == str(image)
    status, _, err = run(main, model_folder, pictures / "class 0", "--output", target)
    assert status == 2
    assert f"--output {target} exists" in err
    assert answers(target.read_text()) == [answer]
    assert run(main, model_folder, pictures / "class 0", "--output", target, "--overwrite")[0] == 0
    assert len(answers(target.read_text())) == 20
    status, _, err = run(main, model_folder, image, "--output", tmp_path / "no folder" / "answers")
    assert status == 2
    assert "no folder" in err


def test_support_images_are_named_by_their_files(run, model_folder, pictures, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in model_folder.iterdir():
        (model / file.name).symlink_to(file)
    table = ["id,file,class", *(f"{100 + row},{row}.png,class {row // 10}" for row in range(30))]
    (model / SUPPORT_FILES).write_text("\n".join(table))
    image = pictures / "class 1" / "12.png"
    _, out, _ = run(main, model, image, "--neighbors", 2, "--format", "jsonl")
    assert [near["file"] for near in answers(out)[0]["neighbors"]] == [
        f"{near['id'] - 100}.png" for near in answers(out)[0]["neighbors"]
    ]
    (model / SUPPORT_FILES).write_text("\n".join(table[:-1]))  # of another bank
    _, out, _ = run(main, model, image, "--neighbors", 2, "--format", "jsonl")
    assert all("file" not in near for near in answers(out)[0]["neighbors"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top_k", "0"], "argument --top_k: 0 must be at least 1"),
        (["--batch_size", "x"], "argument --batch_size: invalid"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
    ],
)
def test_options_that_cannot_be_are_named(run, model_folder, pictures, options, message):
    status, _, err = run(main, model_folder, pictures, *options)
    assert status == 2
    assert message in err


def test_a_model_without_a_bank_says_so_before_an_image_is_read(run, empty_model, tmp_path):
    os.mkfifo(tmp_path / "never read")
    status, out, err = run(main, empty_model, tmp_path / "never read", "--output", tmp_path / "answers")
    assert (status, out) == (2, "")
    assert f"MODEL {empty_model}: This model has no support bank to answer from." in err
    assert f"python -m modeling_bpgcn index {empty_model}" in err
    assert "never read" not in err
    assert not (tmp_path / "answers").exists()


def test_other_models_and_missing_ones_are_named(run, tmp_path):
    AutoModel.from_config(tiny_backbone()).save_pretrained(tmp_path)
    status, _, err = run(main, tmp_path, "x.png")
    assert status == 2
    assert f"MODEL {tmp_path} is of type dinov2, not bpgcn" in err
    status, _, err = run(main, tmp_path / "missing", "x.png")
    assert status == 2
    assert str(tmp_path / "missing") in err


def test_broken_files_among_many_are_named_by_a_process_of_its_own(model_folder, pictures, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    images = sorted(pictures.rglob("*.png"))
    for number in range(120):
        (folder / f"{number:03}.png").symlink_to(images[number % len(images)])
    broken = {"017.png": images[0].read_bytes()[:60], "064.png": b"", "119.png": b"no image at all"}
    for name, content in broken.items():
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    command = [sys.executable, "-m", "modeling_bpgcn", "predict", model_folder, folder, "--format", "jsonl"]
    finished = subprocess.run(
        [*map(str, command), "--num_workers", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 1, finished.stderr
    given = answers(finished.stdout)
    assert [answer["file"] for answer in given] == [str(folder / f"{number:03}.png") for number in range(120)]
    assert [answer["file"] for answer in given if "error" in answer] == [str(folder / name) for name in broken]
    assert sum("predictions" in answer for answer in given) == 117
    *_, summary, first, second, third = finished.stderr.splitlines()
    assert summary == "3 of 120 images could not be read:"
    for line, name in zip((first, second, third), broken, strict=True):
        assert line.startswith(f"  {folder / name}: ")
        assert finished.stderr.count(f"{folder / name}: ") == 2  # when it happens, and at the end
    assert "120/120" in finished.stderr
