"""The prefix cache: what training reads from it, when it is rebuilt, and that neither a kill nor a rival spoils it."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from multiprocessing.context import ForkProcess as Process
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import default_data_collator

from modeling_bpgcn.image_features import run_first_blocks
from modeling_bpgcn.training import prefix_cache
from modeling_bpgcn.training.data import DataArguments, load_image_data
from modeling_bpgcn.training.freezing import train_last_blocks
from modeling_bpgcn.training.images import build_image_processor, image_transform
from modeling_bpgcn.training.prefix_cache import cache_prefix
from tests.model_factory import BACKBONES, captured_warnings, tiny_backbone
from tests.training_factory import (
    PROCESSOR,
    digit_trainer,
    digits,
    logged,
    parameters,
    tiny_digit_model,
)

BLOCKS = 3


def model_of(kind: str = "dinov2", trained_blocks: int = 1, dropout: float = 0.0, **overrides):
    """Three blocks of width 16, the last ones train; the same weights each time."""
    backbone = tiny_backbone(kind, hidden_size=16, num_hidden_layers=BLOCKS, hidden_dropout_prob=dropout)
    model = tiny_digit_model(backbone_config=backbone, **overrides)
    train_last_blocks(model.bpgcn.backbone, trained_blocks)
    return model.train()


def images_of(size: int = 8, augmentation: str = "none", **fields) -> datasets.Dataset:
    data = digits(**fields).train
    return data.with_transform(image_transform(build_image_processor(None, size, 4), augmentation))


def built(folder: Path, model=None, images=None, **options) -> prefix_cache.CachedPrefix:
    return cache_prefix(model or model_of(), images or images_of(), folder, progress=False, **options)


def rebuilding(folder: Path, **changes) -> list[str]:
    """What is said when the cache of the folder is asked for again."""
    with captured_warnings(prefix_cache.logger) as messages:
        built(folder, **changes)
    return messages


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prefix_cache.lock"}


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """How many images ran through the first blocks, each time."""
    counts = []

    def counted(backbone, pixel_values, num_blocks):
        counts.append(len(pixel_values))
        return run_first_blocks(backbone, pixel_values, num_blocks)

    monkeypatch.setattr(prefix_cache, "run_first_blocks", counted)
    return counts


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained_blocks", "size"), [(2, 8), (1, 12), (0, 8)])
@pytest.mark.parametrize("kind", BACKBONES)
def test_rows_are_the_states_of_the_images(kind, trained_blocks, size, tmp_path):
    model, images = model_of(kind, trained_blocks), images_of(size)
    rows = built(tmp_path, model, images, dtype="float32", batch_size=10)
    assert model.training
    assert model.bpgcn.prefix_blocks == BLOCKS - trained_blocks
    assert len(rows) == len(images) == 64
    model.eval()
    expected = run_first_blocks(model.bpgcn.backbone, images[:]["pixel_values"], BLOCKS - trained_blocks)
    for index in (0, 7, 63):
        row, image = rows[index], images[index]
        assert row.keys() == {"hidden_states", "labels", "node_ids"}
        assert (row["labels"], row["node_ids"]) == (image["labels"], image["node_ids"])
        assert_close(row["hidden_states"], expected[index], atol=1e-6, rtol=1e-6)
    assert set(rows.labels) == {-100, *range(10)}


@pytest.mark.parametrize("trained_blocks", [2, 0])
def test_training_from_the_rows_is_training_from_the_images(trained_blocks, tmp_path):
    model, images = model_of(trained_blocks=trained_blocks, head_dropout=0.0), images_of()
    rows = built(tmp_path, model, images, dtype="float32", batch_size=32)
    gradients = []
    for data in (images, rows):
        batch = default_data_collator(data.__getitems__(list(range(32))))
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss})
    assert any(".backbone." in name for name in gradients[0]) == (trained_blocks > 0)
    assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_cache_chunk_size": 5},
        {"graph_scope": "full", "gradient_cache_chunk_size": 24},
        {"graph_scope": "memory", "memory_size": 32},
        {"head_only_steps": 2, "freeze": ["layernorm"]},
        {"dataloader_num_workers": 2},
    ],
    ids=lambda options: "-".join(options) or "batch",
)
def test_a_run_from_the_rows_is_the_run_from_the_images(options, tmp_path):
    losses, weights = [], []
    for name in ("images", "rows"):
        trainer = digit_trainer(tmp_path / name, model_of(), augmentation="none", **options)
        if name == "rows":
            rows = built(tmp_path / "cache", trainer.bpgcn, trainer.train_dataset, dtype="float32")
            trainer.train_dataset, trainer.train_classes = rows, rows.labels
        trainer.train()
        losses.append(logged(trainer, "loss"))
        weights.append(parameters(trainer.model))
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)
    assert not torch.equal(
        weights[1]["bpgcn.backbone.encoder.layer.2.mlp.fc1.weight"],
        parameters(model_of())["bpgcn.backbone.encoder.layer.2.mlp.fc1.weight"],
    )


def test_half_precision_costs_half_the_space_and_a_bounded_error(tmp_path):
    whole, half = (built(tmp_path / dtype, dtype=dtype) for dtype in ("float32", "float16"))
    states, rounded = (torch.stack([row["hidden_states"] for row in rows]) for rows in (whole, half))
    assert (states.dtype, rounded.dtype) == (torch.float32, torch.float16)
    assert (rounded.float() - states).abs().max() <= 2**-11 * states.abs().max()
    sizes = [rows.path.stat().st_size - 64 * 5 * 16 * bytes_each for rows, bytes_each in ((whole, 4), (half, 2))]
    assert sizes == [128, 128]  # the header


@pytest.mark.parametrize(
    ("workers", "context"), [(2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)], ids=["fork", "spawn"]
)
def test_loaders_read_rows_with_workers_and_without(tmp_path, workers, context):
    rows = built(tmp_path)
    order = torch.randperm(64).tolist()
    batches = [
        list(DataLoader(rows, 10, sampler=order, num_workers=count, multiprocessing_context=method))
        for count, method in ((0, None), (workers, context))
    ]
    for column in ("hidden_states", "labels", "node_ids"):
        alone, helped = (torch.cat([batch[column] for batch in loaded]) for loaded in batches)
        assert torch.equal(alone, helped)
    assert batches[0][0]["hidden_states"].shape == (10, 5, 16)
    assert torch.equal(torch.cat([batch["node_ids"] for batch in batches[0]]), torch.tensor(rows.node_ids)[order])


def test_rows_are_sent_to_workers_without_the_states(tmp_path):
    rows = built(tmp_path)
    assert len(pickle.dumps(rows)) < rows.path.stat().st_size / 4
    assert torch.equal(pickle.loads(pickle.dumps(rows))[3]["hidden_states"], rows[3]["hidden_states"])


def test_the_random_stream_of_training_goes_on_as_without_it(tmp_path):
    torch.manual_seed(0)
    model, images = model_of(), images_of()
    before = torch.get_rng_state()
    built(tmp_path, model, images, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


# --- kept and rebuilt -------------------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(tmp_path, runs):
    first = built(tmp_path)
    assert sum(runs) == 64 + 1  # one on trial
    runs.clear()
    before = files(tmp_path)
    assert not rebuilding(tmp_path, batch_size=7)
    assert runs == []
    assert files(tmp_path) == before
    assert len(first) == 64


def test_the_record_says_what_the_states_came_from(tmp_path):
    built(tmp_path)
    record = json.loads((tmp_path / "prefix_cache.json").read_text())
    assert record["rows"] == 64
    key = record["key"]
    assert key["image_size"] == "8 x 8"
    assert (key["number_of_images"], key["number_of_blocks"], key["dtype"]) == (64, 2, "float16")
    assert key["backbone"]["model_type"] == "dinov2"
    assert key["image_processor"]["image_mean"] == [0.5] * 3


def changed_weights(module: str, trained_blocks: int = 1):
    model = model_of(trained_blocks=trained_blocks)
    with torch.no_grad():
        model.get_submodule(f"bpgcn.backbone.{module}").bias[3] += 1e-3
    return model


DIGEST = r"digest was \w{16}, now \w{16}"
CHANGES = {
    "weights of a block": ({"model": changed_weights("encoder.layer.1.mlp.fc1")}, rf"weight {DIGEST}\.$"),
    "weights of the patches": ({"model": changed_weights("embeddings.patch_embeddings.projection")}, "weight digest"),
    "image size": ({"images": images_of(12)}, "image size was 8 x 8, now 12 x 12; image processor.crop size.height"),
    "images": ({"images": images_of().select([*range(63), 0])}, rf"image {DIGEST}\.$"),
    "number of images": (
        {"images": images_of().select(range(63))},
        rf"number of images was 64, now 63; image {DIGEST}\.$",
    ),
    "order": ({"images": images_of().select([1, 0, *range(2, 64)])}, rf"image {DIGEST}\.$"),
    "dtype": ({"dtype": "float32"}, r"dtype was float16, now float32\.$"),
    "block": ({"model": model_of(trained_blocks=2)}, rf"number of blocks was 2, now 1; weight {DIGEST}\.$"),
    "config": ({"model": model_of(dropout=0.1)}, r"backbone.hidden dropout prob was 0.0, now 0.1\.$"),
    "backbone": ({"model": model_of("vit")}, rf"weight {DIGEST}; .*backbone.model type was dinov2, now vit"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_key_rebuilds_it_and_says_what_changed(change, tmp_path):
    changes, reason = CHANGES[change]
    built(tmp_path / "changed")
    messages = rebuilding(tmp_path / "changed", **changes)
    assert len([message for message in messages if "is rebuilt" in message]) == 1
    assert re.search(rf"The prefix cache in .*changed is rebuilt: {reason}", messages[-1]), messages
    built(tmp_path / "new", **changes)
    assert files(tmp_path / "changed") == files(tmp_path / "new")  # nothing of the old one is left


UNCHANGED = {
    "weights of a trained block": {"model": changed_weights("encoder.layer.2.mlp.fc1")},
    "weights of the final norm": {"model": changed_weights("layernorm")},
    "labels": {"images": images_of(labels_per_class=5)},
    "head": {"model": model_of(head="linear", num_neighbors=5)},
}


@pytest.mark.parametrize("change", UNCHANGED)
def test_what_the_states_do_not_depend_on_keeps_it(change, tmp_path, runs):
    built(tmp_path)
    runs.clear()
    assert not rebuilding(tmp_path, **UNCHANGED[change])
    assert runs == []


def test_classes_and_ids_come_from_the_data_set_of_the_day(tmp_path, runs):
    first = built(tmp_path)
    runs.clear()
    fewer = images_of(labels_per_class=2)
    second = built(tmp_path, images=fewer)
    assert runs == []
    assert second.labels == [row["labels"] for row in fewer]
    assert second.labels != first.labels


def test_a_changed_image_file_rebuilds_it(tmp_path):
    folder = tmp_path / "images"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8, 3), 20 * number + 100 * (name == "b"), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number}.bmp")

    def images() -> datasets.Dataset:
        arguments = DataArguments(str(folder), labels_per_class=2)
        return load_image_data(arguments).train.with_transform(image_transform(PROCESSOR))

    first = built(tmp_path / "cache", images=images())
    assert not rebuilding(tmp_path / "cache", images=images())
    time.sleep(0.01)
    PIL.Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(folder / "a" / "2.bmp")  # of the same size
    with captured_warnings(prefix_cache.logger) as messages:
        second = built(tmp_path / "cache", images=images())
    assert "is rebuilt: image digest was " in messages[0]
    different = [not torch.equal(first[row]["hidden_states"], second[row]["hidden_states"]) for row in range(8)]
    assert different == [row == 2 for row in range(8)]  # and the first one reads what it was built from


@pytest.mark.parametrize("damage", ["record", "fields", "shorter", "lost"])
def test_a_damaged_cache_is_rebuilt(damage, tmp_path):
    path = built(tmp_path).path
    before = files(tmp_path)
    if damage in ("record", "fields"):
        (tmp_path / "prefix_cache.json").write_text("{" if damage == "record" else "[]")
    elif damage == "shorter":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    reason = "prefix_cache.json cannot be read" if damage in ("record", "fields") else f"{path.name} is damaged"
    assert rebuilding(tmp_path) == [f"The prefix cache in {tmp_path} is rebuilt: {reason}."]
    assert files(tmp_path) == before


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["flip", "crop_flip", "shift"])
def test_random_augmentation_is_refused(augmentation, tmp_path):
    with pytest.raises(ValueError, match="training images change at random: set --augmentation none, or leave"):
        built(tmp_path, images=images_of(augmentation=augmentation))
    assert not list(tmp_path.iterdir())


def test_data_without_the_transform_is_refused(tmp_path):
    for images in (digits().train, digits().train.with_transform(lambda rows: rows), [1, 2]):
        with pytest.raises(ValueError, match=r"needs a data set with_transform\(image_transform\(processor\)\)"):
            built(tmp_path, images=images)


def test_a_backbone_that_trains_from_the_first_block_is_refused(tmp_path):
    adapted = model_of(trained_blocks=0)
    get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (model_of(trained_blocks=BLOCKS), adapted):
        with pytest.raises(ValueError, match="the first block or the embeddings train: set trainable_blocks to fewer"):
            built(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stores float16 or float32, not 'bfloat16'"):
        built(tmp_path, dtype="bfloat16")


def test_a_full_disk_is_named_before_it_is_full(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 10_000))
    with pytest.raises(ValueError, match=r"of 64 x 5 x 16 float16 numbers takes 10,368 bytes, but .* room for 10,000"):
        built(tmp_path)
    assert not files(tmp_path)


def test_states_too_large_for_half_precision_are_named(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.bpgcn.backbone.encoder.layer[0].mlp.fc2.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"states of these images reach 1e\+06 and cannot be stored as float16: store"):
        built(tmp_path, model)
    rows = built(tmp_path, model, dtype="float32")
    assert rows[0]["hidden_states"].max() > 9e5


def test_a_backbone_whose_parts_differ_from_the_whole_is_refused(tmp_path):
    model = model_of()
    model.bpgcn.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1, *inputs[1:]))
    with pytest.raises(ValueError, match="Dinov2Model computes something else when its first blocks run apart"):
        built(tmp_path, model)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropout_in_the_first_blocks_is_pointed_out(field, tmp_path):
    backbone = tiny_backbone(hidden_size=16, **{field: 0.25})
    model = tiny_digit_model(backbone_config=backbone).train()
    train_last_blocks(model.bpgcn.backbone, 1)
    for _ in range(2):
        messages = rebuilding(tmp_path, model=model)
        assert "first blocks have dropout (up to 0.25); the prefix cache holds what they compute without" in messages[0]


# --- processes --------------------------------------------------------------------------------------------------------


def build_slowly(folder: Path, delay: float, workers: int) -> None:
    """Build the cache slowly enough to be met at it, recording every second batch; `report.json` says what was done."""
    run, count = prefix_cache.run_first_blocks, 0

    def slow(*inputs):
        nonlocal count
        time.sleep(delay)
        count += len(inputs[1])
        return run(*inputs)

    prefix_cache.run_first_blocks, prefix_cache.BATCHES_BETWEEN_RECORDS = slow, 2
    with captured_warnings(prefix_cache.logger) as said:
        rows = built(folder, batch_size=4, num_workers=workers)
    states = rows[0]["hidden_states"].float().tolist()
    report = {"ran": count, "states": states, "said": said}
    folder.with_name(f"report-{os.getpid()}.json").write_text(json.dumps(report))


def start(folder: Path, delay: float, workers: int = 0) -> Process:
    """A process that builds the cache: a copy of this one, which has imported all that it needs."""
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(folder, delay, workers))
    process.start()
    return process


def wait_until(process: Process, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if process.exitcode is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"it did not come to that; exit code {process.exitcode}")
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_in_the_middle_it_goes_on_and_ends_as_if_it_was_not(workers, tmp_path, runs):
    record = tmp_path / "killed" / "prefix_cache.json"
    process = start(tmp_path / "killed", 0.1, workers)
    wait_until(process, lambda: record.is_file() and json.loads(record.read_text())["rows"] >= 16)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rows = json.loads(record.read_text())["rows"]
    assert 16 <= rows < 64
    [path] = (tmp_path / "killed").glob("hidden_states-*.npy")
    with path.open("ab") as file:
        file.write(b"torn row")  # what a kill in the middle of a write leaves
    with captured_warnings(prefix_cache.logger) as messages:
        built(tmp_path / "killed", batch_size=4)
    assert not [message for message in messages if "rebuilt" in message]
    assert sum(runs) == 64 - rows + 1
    built(tmp_path / "clean", batch_size=4)
    assert files(tmp_path / "killed") == files(tmp_path / "clean")


def test_killed_before_the_first_record_it_starts_anew(tmp_path):
    process = start(tmp_path / "killed", 60)
    wait_until(process, (tmp_path / "killed" / "prefix_cache.lock").exists)
    process.kill()
    process.join()
    assert not rebuilding(tmp_path / "killed", batch_size=4)
    built(tmp_path / "clean", batch_size=4)
    assert files(tmp_path / "killed") == files(tmp_path / "clean")


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    processes = [start(tmp_path / "shared", 0.05) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("report-*.json")]
    waited, ran = sorted(reports, key=lambda report: report["ran"])
    assert (waited["ran"], ran["ran"]) == (0, 64 + 1)
    assert waited["states"] == ran["states"]
    expected = f"Waiting for another process that builds the prefix cache in {tmp_path / 'shared'}."
    assert (waited["said"], ran["said"]) == ([expected], [])
    built(tmp_path / "clean", batch_size=4)
    assert files(tmp_path / "shared") == files(tmp_path / "clean")


def test_a_run_with_another_key_leaves_the_rows_of_the_first_one_readable(tmp_path):
    first = built(tmp_path)
    expected = [row["hidden_states"] for row in first]
    second = built(tmp_path, model=model_of(trained_blocks=2))
    assert not first.path.exists()
    assert all(torch.equal(row["hidden_states"], states) for row, states in zip(first, expected, strict=True))
    assert not torch.equal(second[0]["hidden_states"], expected[0])
