"""How much gradient the ranking passes on at each temperature: to most images none where it is cold, as their softmax
is saturated, and to all less and less where it is warm, as 1 / tau."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..modeling_bpgcn import BPGCNForImageClassification
from .graph_gradients import config_values, embed_nodes, graph_gradients, prepare, temperature_of
from .undisturbed import undisturbed


@dataclass(frozen=True)
class TemperatureSweep:
    """
    What `temperature_sweep` found, for each of the `temperatures`.

    Args:
        ranking_norms: of the features' gradient [N, D] that has passed the edge weights, 0 where none arrives.
        typical_norms: the same if every image had the gradient of the median one. The softmax of a cold ranking is
            saturated for most images, while the few that sit between two equally near neighbours get a gradient of up
            to 1 / tau: these hold up the whole norm, not this one.
        feature_norms: of that of the messages.
        effective_neighbors: mean perplexity of the rows of edge weights, at most `num_neighbors`.
        current: the model's own temperature.
        num_neighbors: k of this graph.
    """

    temperatures: list[float]
    ranking_norms: list[float]
    typical_norms: list[float]
    feature_norms: list[float]
    effective_neighbors: list[float]
    current: float
    num_neighbors: int


def temperature_sweep(
    model: BPGCNForImageClassification | PeftModel,
    batch: dict[str, Tensor],
    temperatures: Sequence[float],
    *,
    seed: int = 0,
) -> TemperatureSweep:
    """
    The gradient at the features of one batch, at each temperature; the images are embedded once.

    Args:
        model, batch, seed: as in `gradient_flow`, and left as they were.
        temperatures: tau > 0 each, ascending for the picture's sake.

    Raises:
        ValueError: as `gradient_flow`, and for no temperature or one that is not above 0.
    """
    if not temperatures or not all(0 < tau < math.inf for tau in temperatures):
        raise ValueError(f"temperatures={list(temperatures)} must be numbers above 0, at least one.")
    model, batch = prepare(model, batch)
    found = []
    with undisturbed(model), torch.enable_grad():
        features = embed_nodes(model, batch).detach().requires_grad_()
        current = temperature_of(model)
        for tau in temperatures:
            with _temperature(model, tau):
                graph = graph_gradients(model, batch, features, seed)
            ranking, messages = (_image_norms(path, features) for path in (graph.through_edges, graph.messages))
            typical = ranking.median() * math.sqrt(len(ranking))
            norms = (ranking.norm().item(), typical.item(), messages.norm().item())
            found.append((tau, *norms, graph.effective_neighbors))
    columns = (list(column) for column in zip(*found, strict=True))
    return TemperatureSweep(*columns, current=current, num_neighbors=graph.ranking.indices.shape[1])


def _image_norms(gradient: Tensor | None, features: Tensor) -> Tensor:
    """The norm [N] of each image's gradient [N, D], in float64: squares of small ones vanish in float32."""
    return (torch.zeros_like(features) if gradient is None else gradient).double().norm(dim=-1)


@contextmanager
def _temperature(model: nn.Module, tau: float) -> Iterator[None]:
    """Another temperature for a while, learned or not; a learned one keeps to its bounds."""
    learned = [p for name, p in model.named_parameters() if name.endswith("log_temperature")]
    before = [p.detach().clone() for p in learned]
    with config_values(model.config, ranking_temperature=tau):
        try:
            _fill(learned, [math.log(tau)] * len(learned))
            yield
        finally:
            _fill(learned, before)


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor | float]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.fill_(value)
