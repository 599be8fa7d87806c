"""Averaged weights: the moving average of its definition, what is evaluated and saved, and resuming bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.training.weight_averaging import WEIGHTS_FILE, check_averaging_runs
from tests.training.test_trainer import StopAt
from tests.training_factory import arguments, digit_trainer, logged, parameters

DECAY = {"ema_decay": 0.7}


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(parameters(model))


def watched(folder, **options):
    """A trainer, trained, and the weights that its steps made."""
    trainer, weights = digit_trainer(folder, **options), Weights()
    trainer.add_callback(weights)
    trainer.train()
    return trainer, weights.steps


def by_definition(steps: list[dict], decay: float) -> dict[str, torch.Tensor]:
    average = steps[0]
    for t, weights in enumerate(steps[1:], start=2):
        d = min(decay, 1 - 1 / t)
        average = {name: d * average[name] + (1 - d) * value for name, value in weights.items()}
    return average


def test_the_model_ends_with_the_moving_average_and_trains_as_without_it(tmp_path):
    plain, expected_steps = watched(tmp_path / "plain")
    averaged, steps = watched(tmp_path / "averaged", **DECAY)
    for weights, expected in zip(steps, expected_steps, strict=True):
        assert_close(weights, expected, rtol=0, atol=0)
    average = by_definition(steps, 0.7)
    assert_close(parameters(averaged.model), average)
    moved = [name for name, value in average.items() if (value - steps[-1][name]).abs().max() > 1e-5]
    assert any(".backbone." in name for name in moved)
    assert any(name.startswith("head.") for name in moved)
    assert_close(parameters(plain.model), expected_steps[-1], rtol=0, atol=0)


def test_at_first_the_average_is_uniform(tmp_path):
    averaged, steps = watched(tmp_path, ema_decay=0.99)
    assert_close(parameters(averaged.model), {n: sum(w[n] for w in steps) / len(steps) for n in steps[0]})


def test_evaluation_answers_with_the_average_and_gives_the_weights_back(tmp_path):
    whole = digit_trainer(tmp_path / "whole", max_steps=4, lr_scheduler_type="constant", **DECAY)
    whole.train()
    expected = whole.evaluate()
    options = {"lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 4}
    trainer, steps = watched(tmp_path / "run", **options, **DECAY)
    found = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert found == pytest.approx(expected["eval_loss"], rel=1e-6)
    _, without = watched(tmp_path / "without", **options)
    assert_close(steps, without, rtol=0, atol=0)


@pytest.mark.parametrize("saved_at", [2, 5])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, saved_at):
    options = {"save_strategy": "steps", "save_steps": saved_at, **DECAY}
    whole = digit_trainer(tmp_path / "whole", **options)
    whole.train()
    cut = digit_trainer(tmp_path / "cut", **options)
    cut.add_callback(StopAt(saved_at + 1))
    cut.train()
    folder = tmp_path / "cut" / f"checkpoint-{saved_at}"
    resumed = digit_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert_close(parameters(resumed.model), parameters(whole.model), rtol=0, atol=0)


def test_a_checkpoint_holds_the_average_as_its_model_and_the_weights_beside_it(tmp_path):
    _, steps = watched(tmp_path, save_strategy="steps", save_steps=4, **DECAY)
    folder = tmp_path / "checkpoint-4"
    saved = parameters(BPGCNForImageClassification.from_pretrained(folder))
    assert_close(saved, by_definition(steps[:4], 0.7))
    beside = load_file(folder / WEIGHTS_FILE)
    assert_close(beside, {name: steps[3][name] for name in beside}, rtol=0, atol=0)
    assert any((saved[name] - value).abs().max() > 1e-5 for name, value in beside.items())


def test_the_best_model_is_the_average_of_its_step(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, steps = watched(tmp_path, **options, **DECAY)
    best = trainer.state.best_global_step
    assert best < 6  # by its highest loss
    assert_close(parameters(trainer.model), by_definition(steps[:best], 0.7))


def test_a_checkpoint_without_an_average_starts_one(tmp_path):
    digit_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    resumed, weights = digit_trainer(tmp_path, **DECAY), Weights()
    resumed.add_callback(weights)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = weights.steps[0]
    for later in weights.steps[1:]:
        expected = {name: 0.7 * value + 0.3 * later[name] for name, value in expected.items()}
    assert_close(parameters(resumed.model), expected)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"ema_decay=.* must be at least 0 and below 1"):
        arguments(tmp_path, ema_decay=decay)


@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharded_weights_are_refused(tmp_path, flag, name):
    flags = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | {flag: True}
    check_averaging_runs(SimpleNamespace(args=arguments(tmp_path), **flags))
    with pytest.raises(ValueError, match=f"ema_decay cannot be used with {name}"):
        check_averaging_runs(SimpleNamespace(args=arguments(tmp_path, **DECAY), **flags))
