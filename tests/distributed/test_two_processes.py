"""Two real processes on the CPU: equal parameters, the same answers as one, and a run that survives being killed."""

import json
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForImageClassification

from modeling_bpgcn.training.run_folder import last_whole_checkpoint
from tests.distributed.launch import LAUNCHER, launched
from tests.training_factory import (
    digit_trainer,
    digits,
    kill_after_checkpoint,
    start_training,
    train,
    wait_for,
    write_recipe,
)

# 8 batches an epoch for each process and a checkpoint each 7 steps: none falls on the end of an epoch
RUN = {
    "per_device_train_batch_size": 6,
    "labeled_batch_fraction": None,
    "head_only_steps": 3,
    "max_steps": 55,
    "save_steps": 7,
}

SCRIPT = """
import json, sys
import torch
from tests.training_factory import digit_trainer, logged

folder = sys.argv[1]
options = {"max_steps": 4, "head_only_steps": 1, "save_strategy": "steps", "save_steps": 3}
trainer = digit_trainer(folder, transductive_evaluation=True, per_device_eval_batch_size=7, **options)
seen, embedded = [], []
forward = trainer.model.forward
def record(*args, **kwargs):
    if trainer.model.training and "node_ids" in kwargs:
        seen.append(kwargs["node_ids"].tolist())
    elif trainer.model.training:
        embedded.append(len(kwargs["pixel_values"]))
    return forward(*args, **kwargs)
trainer.model.forward = record
before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
trainer.train()
metrics = trainer.evaluate()
resumed = digit_trainer(folder, **options)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")  # in the middle of the second epoch
rank = trainer.args.process_index
torch.save({
    "world_size": trainer.args.world_size,
    "before": before,
    "state": trainer.model.state_dict(),
    "resumed": {name: p.detach() for name, p in resumed.model.named_parameters()},
    "metrics": metrics,
    "seen": seen,
    "embedded": embedded,
    "norms": {n: logged(trainer, n) for n in ("ranking_gradient_norm", "feature_gradient_norm", "grad_norm")},
}, f"{folder}/rank{rank}.pt")
trainer.save_model()
trainer.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes held after four steps together, and the model that they saved."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, launched(SCRIPT, folder)


def test_both_processes_end_with_equal_parameters_and_an_equal_bank(ranks):
    _, (one, two) = ranks
    assert one["world_size"] == two["world_size"] == 2
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert len(one["state"]["bpgcn.support_bank.features"]) == len(digits().train)
    unmoved = {name for name, value in one["before"].items() if torch.equal(value, one["state"][name])}
    assert unmoved == {"bpgcn.backbone.embeddings.mask_token"}


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(ranks):
    for found in ranks[1]:
        assert found["resumed"].keys() == found["before"].keys()
        for name, value in found["resumed"].items():
            assert torch.equal(value, found["state"][name]), name


def test_one_graph_spans_the_images_of_both_processes(ranks):
    _, (one, two) = ranks
    assert one["seen"] == two["seen"]
    assert one["embedded"] == two["embedded"] == [16] * 4
    assert all(len(set(batch)) == len(batch) == 32 for batch in one["seen"])
    assert {node for batch in one["seen"][:2] for node in batch} == set(digits().train["node_id"][:])


def test_the_gradient_norms_are_logged_there_too(ranks):
    _, (one, _) = ranks
    # the first step trains the head alone
    assert len(one["norms"]["ranking_gradient_norm"]) == len(one["norms"]["feature_gradient_norm"]) == 3
    assert all(norm > 0 for norms in one["norms"].values() for norm in norms)


def test_evaluation_equals_that_of_one_process(ranks):
    folder, (one, two) = ranks
    model = AutoModelForImageClassification.from_pretrained(folder)
    expected = digit_trainer(folder, model, transductive_evaluation=True).evaluate()
    for name in ("accuracy", "macro_f1", "ece", "neighbor_homophily"):
        for prefix in ("eval_", "eval_transductive_"):
            values = [metrics[f"{prefix}{name}"] for metrics in (one["metrics"], two["metrics"], expected)]
            assert values == pytest.approx([values[0]] * 3, abs=1e-6), f"{prefix}{name}"
    # Trainer's mean of the loss counts the images that pad the last batch
    assert one["metrics"]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0.02)
    assert 0 < expected["eval_accuracy"] < 1


@pytest.mark.slow
def test_a_run_of_two_processes_killed_mid_epoch_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    recipe = write_recipe(tmp_path, **RUN)
    whole = train(recipe, "--output_dir", tmp_path / "whole", launcher=LAUNCHER)
    assert whole.returncode == 0, whole.stdout
    assert whole.stdout.count("BPGCN, from the support bank") == 1  # one process reports

    command = (recipe, "--output_dir", tmp_path / "run")
    process = start_training(*command, launcher=LAUNCHER)
    kill_after_checkpoint(process, tmp_path / "run" / "checkpoint-14")
    checkpoint = Path(last_whole_checkpoint(tmp_path / "run"))
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert 14 <= state["global_step"] < 55
    assert state["epoch"] > 1
    assert state["epoch"] % 1 != 0
    assert not (tmp_path / "run" / "model.safetensors").exists()

    resumed = train(*command, launcher=LAUNCHER)
    assert resumed.returncode == 0, resumed.stdout
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "run")]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["full", "memory"])
def test_a_killed_process_ends_the_run_with_an_error_and_the_same_command_resumes_it(tmp_path, scope):
    own = {"full": {"gradient_cache_chunk_size": 8}, "memory": {"memory_size": 30}}.get(scope, {})
    recipe = write_recipe(tmp_path, **RUN | {"graph_scope": scope, "max_steps": 25, "save_steps": 5} | own)
    command = (recipe, "--output_dir", tmp_path / "run")
    process = start_training(*command, launcher=LAUNCHER)
    wait_for(process, tmp_path / "run" / "checkpoint-5" / "trainer_state.json")
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    assert len(workers) >= 2
    workers[-1].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert last_whole_checkpoint(tmp_path / "run")

    resumed = train(*command, launcher=LAUNCHER)
    assert resumed.returncode == 0, resumed.stdout
    whole = train(recipe, "--output_dir", tmp_path / "whole", launcher=LAUNCHER)
    assert whole.returncode == 0, whole.stdout
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
