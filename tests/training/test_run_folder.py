"""The output folder: its own run finds it again, another run is refused, and only whole checkpoints resume."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_bpgcn.training import run_folder
from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.run_folder import (
    checkpoint_bytes,
    explained_writing,
    last_whole_checkpoint,
    prepare_run,
    read_settings,
)
from tests.training_factory import RECIPE, arguments, digit_trainer, tiny_digit_model, write_recipe


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def settings(tmp_path, folder):
    """The arguments of a run, as `train.py` reads them."""

    def make(*options: str, **changes) -> tuple:
        return parse_arguments([str(write_recipe(tmp_path, output_dir=str(folder), **changes)), *options])

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    digit_trainer(folder, max_steps=4, save_strategy="steps", save_steps=2).train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "interrupted"))


# --- whose folder it is -----------------------------------------------------------------------------------------------


def test_a_fresh_folder_is_made_and_remembers_its_settings(folder, settings):
    assert prepare_run(str(folder), settings()) is None
    record = json.loads((folder / "run.json").read_text())
    assert record["num_neighbors"] == 4
    assert record["backbone_config"]["hidden_size"] == 16
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "run.json"]


def test_the_recipe_of_a_run_gives_the_same_settings_again(folder, settings):
    first = settings("--num_neighbors", "3", "--freeze", "embeddings")
    prepare_run(str(folder), first)
    again = parse_arguments([str(folder / "recipe.yaml"), "--output_dir", str(folder)])
    assert read_settings(again) == read_settings(first)
    assert read_settings(again)["freeze"] == ["embeddings"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["num_neighbors"] == 3
    # what was asked for, and none of what Trainer made of it
    known = set(RECIPE) | {"freeze", "seed"}
    assert recipe.keys() <= known, recipe.keys() - known


def test_nested_settings_of_trainer_are_kept_as_a_recipe_writes_them(folder, settings):
    nested = settings(accelerator_config={"even_batches": False})
    prepare_run(str(folder), nested)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["accelerator_config"] == {"even_batches": False}
    with pytest.raises(ValueError, match=r"accelerator_config was \{'even_batches': False\}, now not set"):
        prepare_run(str(folder), settings())


def test_the_same_settings_resume_from_the_last_whole_checkpoint(folder, settings, finished):
    assert prepare_run(str(folder), settings()) is None
    assert prepare_run(str(folder), settings()) is None
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    assert prepare_run(str(folder), settings()) == str(folder / "checkpoint-2")
    shutil.copytree(finished / "checkpoint-4", folder / "checkpoint-10")
    assert prepare_run(str(folder), settings()) == str(folder / "checkpoint-10")


@pytest.mark.parametrize(
    "options",
    [
        ("--logging_steps", "5"),
        ("--dataloader_num_workers", "2"),
        ("--save_steps", "50", "--save_total_limit", "1"),
        ("--baselines", "all"),
        ("--transductive_evaluation", "true"),
        ("--report_to", "tensorboard"),
    ],
    ids=lambda options: options[0][2:],
)
def test_settings_that_do_not_change_the_result_may_change(folder, settings, options):
    prepare_run(str(folder), settings())
    assert prepare_run(str(folder), settings(*options)) is None


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--num_neighbors", "5"), "num_neighbors was 4, now 5"),
        (("--learning_rate", "0.1"), "learning_rate was 0.001, now 0.1"),
        (("--seed", "1"), "seed was not set, now 1"),
        (("--augmentation", "none"), "augmentation was shift, now not set"),
        (("--max_steps", "11"), "max_steps was 10, now 11"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_other_settings_are_another_run(folder, settings, options, difference):
    prepare_run(str(folder), settings())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"output_dir {folder} holds another run: {difference}. Choose another --outp"):
        prepare_run(str(folder), settings(*options))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_difference_is_named(folder, settings):
    prepare_run(str(folder), settings())
    with pytest.raises(ValueError, match="num_neighbors was 4, now 5; seed was not set, now 1"):
        prepare_run(str(folder), settings("--num_neighbors", "5", "--seed", "1"))


@pytest.mark.parametrize("name", ["config.json", "checkpoint-7"])
def test_a_folder_with_a_foreign_model_is_refused_and_left_alone(folder, settings, name):
    folder.mkdir(parents=True)
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"output_dir {folder} holds another run \({name}\)"):
        prepare_run(str(folder), settings())
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_folder_with_other_files_is_taken(folder, settings):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert prepare_run(str(folder), settings()) is None
    assert (folder / "notes.txt").read_text() == "mine"


# --- whole checkpoints ------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_taken_by_its_number(interrupted):
    assert last_whole_checkpoint(interrupted) == str(interrupted / "checkpoint-4")
    (interrupted / "checkpoint-2").rename(interrupted / "checkpoint-10")
    assert last_whole_checkpoint(interrupted) == str(interrupted / "checkpoint-10")


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None


def test_other_names_are_no_checkpoints(interrupted):
    (interrupted / "checkpoint-best").mkdir()
    (interrupted / "checkpoint-9.zip").write_text("")
    assert last_whole_checkpoint(interrupted) == str(interrupted / "checkpoint-4")


@pytest.mark.parametrize(
    "missing", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_an_incomplete_checkpoint_is_passed_over(interrupted, missing, how):
    path = interrupted / "checkpoint-4" / missing
    assert path.stat().st_size > 0
    path.unlink() if how == "missing" else path.write_bytes(b"")
    assert last_whole_checkpoint(interrupted) == str(interrupted / "checkpoint-2")


def test_a_truncated_state_is_passed_over(interrupted):
    state = interrupted / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-20])
    assert last_whole_checkpoint(interrupted) == str(interrupted / "checkpoint-2")
    shutil.copy(state, interrupted / "checkpoint-2" / "trainer_state.json")
    assert last_whole_checkpoint(interrupted) is None


def test_a_run_of_several_processes_has_several_random_states(interrupted):
    checkpoint = interrupted / "checkpoint-4"
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    assert last_whole_checkpoint(interrupted) == str(checkpoint)


# --- a folder that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["below a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, settings, place):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if place == "below a file" else Path("/proc/run")
    with pytest.raises(OSError, match=rf"output_dir {folder} cannot be written \(.+\)\. Choose another --output_dir"):
        prepare_run(str(folder), settings())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path, settings):
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="cannot be written"):
        prepare_run(str(tmp_path / "run"), settings())


def test_too_little_space_is_said_before_training(folder, settings, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 3 * 2**20, 3 * 2**20)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    assert prepare_run(str(folder), settings(), 3 * 2**20) is None
    message = f"output_dir {folder}: 3 MiB are free, but the checkpoints of this run take about 5 MiB. Free some space"
    with pytest.raises(ValueError, match=message):
        prepare_run(str(folder), settings(), 5 * 2**20)


def test_the_space_of_checkpoints_is_about_what_their_tensors_take(finished):
    model = tiny_digit_model()
    weights = sum(value.nbytes for value in load_file(finished / "checkpoint-4" / "model.safetensors").values())
    states = torch.load(finished / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"].values()
    moments = sum(value.nbytes for state in states for value in state.values())
    assert weights > 10_000
    # those kept and one being written, and the model at the end
    kept = checkpoint_bytes(model, arguments(finished, save_strategy="steps", save_total_limit=3))
    assert kept == pytest.approx(5 * weights + 4 * moments, rel=0.02)
    assert checkpoint_bytes(model, arguments(finished, save_strategy="no")) == pytest.approx(weights, rel=0.02)


# --- errors while writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_an_error_while_writing_names_the_folder_and_where_the_run_goes_on(interrupted, error):
    part = interrupted / "checkpoint-6"
    message = f"^{part} cannot be written .* goes on from {interrupted / 'checkpoint-4'}"
    with pytest.raises(OSError, match=message) as raised, explained_writing(part, str(interrupted)):
        raise error
    assert raised.value.__cause__ is error
    assert str(error) in str(raised.value)
