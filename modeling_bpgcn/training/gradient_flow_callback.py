"""The gradient's way during training: measured now and then on images of its own, logged, and drawn at the end."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..analysis.gradient_flow import GradientFlow, gradient_flow
from ..analysis.gradient_flow_plot import plot_gradient_flow
from ..analysis.gradient_verdict import FAULT
from .gradient_cache import WholeSet
from .statistics import StepStatistics

logger = logging.get_logger(__name__)

FLOW_PICTURE = "gradient_flow.png"


class GradientFlowCallback(TrainerCallback):
    """Every `gradient_flow_steps` steps (0: never) run `gradient_flow` on the same images: its main numbers join the
    next log, and `gradient_flow.png` in the output folder shows the first and the last of this run.

    The images are the first of a training batch as the sampler makes it, whatever the scope of the graph. Training goes
    on as without the callback: same weights, same random numbers. The first of several processes does it alone.

    Args:
        statistics: whose values the trainer logs.
        num_images: nodes of the graph, at most.
    """

    def __init__(self, statistics: StepStatistics, num_images: int = 64):
        self.statistics, self.num_images = statistics, num_images
        self._batch: dict[str, Tensor] | None = None
        self._flows: dict[str, GradientFlow] = {}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._flows.clear()
        if not args.gradient_flow_steps:
            return
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("gradient_flow_steps needs whole parameters, but FSDP shards them: leave it out.")
        if state.is_world_process_zero:
            self._batch = first_images(train_dataloader, self.num_images)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._batch is None or state.global_step % args.gradient_flow_steps:
            return
        flow = gradient_flow(model, self._batch, seed=args.seed)
        self.statistics.update(flow.numbers())
        if flow.verdict.startswith(FAULT):
            logger.warning_once(flow.verdict)
        if len(self._flows) == 2:
            self._flows.popitem()
        self._flows[f"step {state.global_step}"] = flow

    def on_train_end(self, args, state, control, **kwargs):
        self._batch = None
        if self._flows:
            plot_gradient_flow(self._flows, Path(args.output_dir) / FLOW_PICTURE)


def first_images(loader, num_images: int) -> dict[str, Tensor]:
    """The first images of the batch that the loader's sampler makes now; the loader itself is not touched."""
    loader = loader.chunks if isinstance(loader, WholeSet) else loader
    rows = next(iter(loader.batch_sampler.batch_sampler))[:num_images]
    with torch.random.fork_rng(devices=[]):  # of what reads an image at random
        return loader.collate_fn(loader.dataset.__getitems__(rows))
