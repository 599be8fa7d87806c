"""What happens between steps: the temperature's schedule, and the curves."""

import math
from pathlib import Path

from transformers import TrainerCallback

from ..analysis.plots import plot_training_curves
from .sampler import MixedBatchSampler


class TemperatureSchedule(TrainerCallback):
    """Move `config.ranking_temperature` from where it starts to `final_temperature`, in equal steps or along a cosine.

    The value depends on the step alone, so a resumed run goes on as it would have.
    """

    def __init__(self, initial: float, final: float, kind: str):
        self.initial, self.final, self.kind = initial, final, kind

    def value(self, step: int, max_steps: int) -> float:
        """tau at the start of `step`; `final` from the last step on."""
        progress = min(step / max(max_steps - 1, 1), 1.0)
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.initial + (self.final - self.initial) * progress

    def apply(self, model, step: int, max_steps: int) -> None:
        """Give the model the temperature of `step`."""
        model.config.ranking_temperature = self.value(step, max_steps)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # a resumed run may have no step left
        self.apply(model, max(state.global_step - 1, 0), state.max_steps)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.apply(model, state.global_step, state.max_steps)


class SamplerEpoch(TrainerCallback):
    """Tell the batch sampler which epoch begins: a resumed epoch of several processes wraps it one level deeper than
    accelerate 1.15 looks, and would repeat the order of the first epoch."""

    def __init__(self, sampler: MixedBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class CurvesCallback(TrainerCallback):
    """Keep `training_curves.png` in the output folder up to date."""

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            plot_training_curves(state.log_history, Path(args.output_dir) / "training_curves.png")
