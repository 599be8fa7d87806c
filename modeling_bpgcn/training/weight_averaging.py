"""Averaged weights: what is evaluated and saved is an exponential moving average of the weights that train."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from .evaluation import BankEvaluator

WEIGHTS_FILE = "training_weights.safetensors"


def check_averaging(args: TrainingArguments) -> None:
    """Raise a `ValueError` for an `ema_decay` out of range."""
    if not (math.isfinite(args.ema_decay) and 0 <= args.ema_decay < 1):
        raise ValueError(f"ema_decay={args.ema_decay} must be at least 0 and below 1.")


def check_averaging_runs(trainer: Trainer) -> None:
    """Raise a `ValueError` where no process has whole weights to average."""
    for name, there in {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}.items():
        if trainer.args.ema_decay and there:
            raise ValueError(f"ema_decay cannot be used with {name}, which shards the weights: leave out one of them.")


class WeightAverage(TrainerCallback):
    r"""After each step t of the optimizer, of every parameter w that trains:

        a <- d a + (1 - d) w,    d = min(decay, 1 - 1 / t)

    an exponential moving average (Polyak and Juditsky 1992 averaged uniformly, as this does until t reaches 1 / (1 -
    decay), so that where the run started is forgotten). At the end of training the model keeps the average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: dict[str, Tensor] = {}
        self.training_weights: dict[str, Tensor] = {}  # kept here while the model has the average

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @staticmethod
    def _copy(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in parameters.items()}

    def on_step_end(self, args, state, control, **kwargs):
        """Take in the weights of this step."""
        weights = self._parameters()
        if not self.average:
            self.average = self._copy(weights)
            return
        share = max(1 - self.decay, 1 / state.global_step)
        for name, weight in weights.items():
            self.average[name].lerp_(weight, share)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the average in the model."""
        self._put(self.average)
        self.drop()

    def drop(self) -> None:
        """Forget the average: the model keeps the weights that it has."""
        self.average = {}

    def _put(self, values: dict[str, Tensor]) -> None:
        weights = self._parameters()
        for name, value in values.items():
            weights[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the average; afterwards the weights that train, bit for bit."""
        if not self.average or self.training_weights:
            yield
            return
        self.training_weights = self._copy(self._parameters())
        self._put(self.average)
        try:
            yield
        finally:
            self._put(self.training_weights)
            self.training_weights = {}

    def save(self, folder: str | Path) -> None:
        """Beside a checkpoint, whose model is the average, write the weights that train."""
        if self.training_weights:
            weights = {name: value.contiguous() for name, value in self.training_weights.items()}
            save_file(weights, Path(folder) / WEIGHTS_FILE)

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint that the model has just read; one of a run without averaging starts an average."""
        path = Path(folder) / WEIGHTS_FILE
        self.drop()
        if path.is_file():
            self.average = self._copy(self._parameters())
            self._put(load_file(path))


class AveragingTrainer(BankEvaluator):
    """`BankEvaluator` that evaluates and saves averaged weights where `ema_decay` asks for them."""

    def __init__(self, model, args, **kwargs):
        super().__init__(model, args, **kwargs)
        check_averaging_runs(self)
        self._average = WeightAverage(self.model, args.ema_decay)
        if args.ema_decay:
            self.add_callback(self._average)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `BankEvaluator`, of the averaged weights."""
        with self._average.applied():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        with self._average.applied():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            self._average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.ema_decay:
            self._average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._average.drop()  # the best checkpoint holds its own
        super()._load_best_model()
