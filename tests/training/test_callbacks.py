"""The temperature over the steps, and the curves that a run draws."""

import math

import PIL.Image
import pytest
import torch

from modeling_bpgcn.training.callbacks import TemperatureSchedule
from tests.training_factory import digit_trainer, logged, tiny_digit_model

LINEAR = {"temperature_schedule": "linear", "final_temperature": 0.02}


# --- the schedule as a function of the step ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("first", "last"), [(0.1, 0.02), (0.02, 0.1)])
@pytest.mark.parametrize("steps", [2, 3, 50])
def test_it_starts_and_ends_as_asked_and_moves_one_way(kind, first, last, steps):
    schedule = TemperatureSchedule(first, last, kind)
    values = [schedule.value(step, steps) for step in range(steps)]
    assert values[0] == first
    assert values[-1] == pytest.approx(last, rel=1e-12)
    assert values == sorted(values, reverse=first > last)
    assert len(set(values)) == steps
    assert schedule.value(steps, steps) == schedule.value(10 * steps, steps) == values[-1]


def test_linear_takes_equal_steps_and_cosine_starts_and_ends_slowly():
    linear, cosine = (
        torch.tensor([TemperatureSchedule(0.1, 0.02, kind).value(step, 21) for step in range(21)], dtype=torch.float64)
        for kind in ("linear", "cosine")
    )
    assert torch.allclose(linear.diff(), torch.full((20,), -0.004, dtype=torch.float64))
    assert torch.allclose(cosine, 0.02 + 0.08 * (1 + torch.cos(torch.linspace(0, math.pi, 21).double())) / 2)
    assert cosine[10] == pytest.approx(0.06)
    assert cosine.diff()[0].abs() < 0.2 * cosine.diff()[10].abs()


def test_a_run_of_one_step_uses_the_initial_temperature():
    assert TemperatureSchedule(0.1, 0.02, "linear").value(0, 1) == 0.1


# --- in training ------------------------------------------------------------------------------------------------------


def test_a_constant_temperature_stays(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=3)
    trainer.train()
    assert logged(trainer, "temperature") == [0.1] * 3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_model_and_its_logs_follow_the_schedule(tmp_path, kind):
    trainer = digit_trainer(tmp_path, max_steps=5, temperature_schedule=kind, final_temperature=0.02)
    trainer.train()
    schedule = TemperatureSchedule(0.1, 0.02, kind)
    assert logged(trainer, "temperature") == pytest.approx([schedule.value(step, 5) for step in range(5)])
    assert trainer.model.config.ranking_temperature == pytest.approx(0.02)
    assert trainer.bpgcn.bpgcn.ranking_temperature() == pytest.approx(0.02)
    # the ranking itself sharpens, not only the number
    effective = logged(trainer, "effective_neighbors")
    assert effective[-1] < effective[0]


def test_a_resumed_run_goes_on_where_the_schedule_was(tmp_path):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, **LINEAR}
    whole = digit_trainer(tmp_path / "a", **options)
    whole.train()
    resumed = digit_trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logged(resumed, "temperature") == logged(whole, "temperature")
    assert len(logged(whole, "temperature")) == 5


def test_a_run_resumed_with_no_step_left_has_the_last_temperature(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, **LINEAR}
    digit_trainer(tmp_path, **options).train()
    resumed = digit_trainer(tmp_path, **options)
    assert resumed.model.config.ranking_temperature == 0.1
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.model.config.ranking_temperature == pytest.approx(0.02)


def test_a_learned_temperature_moves_with_its_own_rate(tmp_path):
    def run(rate):
        model = tiny_digit_model(learn_temperature=True)
        options = {"max_steps": 4, "lr_scheduler_type": "constant", "temperature_learning_rate": rate}
        trainer = digit_trainer(tmp_path, model, temperature_schedule="learned", **options)
        trainer.train()
        return trainer, float(model.bpgcn.ranking_temperature.log_temperature.detach())

    start = math.log(0.1)
    trainer, moved = run(1e-2)
    values = logged(trainer, "temperature")
    assert values[0] == pytest.approx(0.1)
    # Adam's first step is as long as the rate
    assert abs(math.log(values[1]) - start) == pytest.approx(1e-2, rel=0.01)
    assert len(set(values)) == 4
    assert trainer.bpgcn.bpgcn.ranking_temperature().item() == pytest.approx(math.exp(moved))
    assert run(0.0)[1] == pytest.approx(start, abs=1e-7)


@pytest.mark.parametrize(("schedule", "learn"), [("learned", False), ("constant", True)])
def test_schedule_and_model_must_agree_on_learning_it(tmp_path, schedule, learn):
    model = tiny_digit_model(learn_temperature=learn)
    message = f"temperature_schedule='{schedule}' but the model has learn_temperature={learn}: they must agree"
    with pytest.raises(ValueError, match=message):
        digit_trainer(tmp_path, model, temperature_schedule=schedule)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_the_curves_are_drawn_at_each_evaluation_and_at_the_end(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=2, curves=True)
    picture = tmp_path / "training_curves.png"
    trainer.evaluate()
    assert not picture.exists()
    trainer.train()
    with PIL.Image.open(picture) as image:
        assert min(image.size) > 300
    picture.unlink()
    trainer.evaluate()
    assert picture.is_file()
