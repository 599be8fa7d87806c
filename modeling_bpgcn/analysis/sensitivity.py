"""How loss and answers of a batch graph move with the temperature and the self weight, by forward mode: one pass with
dual numbers gives the derivative of every output for one number, also where no parameter is learned."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..modeling_bpgcn import BPGCNForImageClassification
from .fixed_objective import embedded, fixed_objective, labeled_inputs

NUMBERS = ("ranking_temperature", "self_weight")


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives for one number x, at its `value`: `loss` d L / d x; `logits` [N, C], of the log-probabilities;
    `neighbor_weights` [N, k], of the soft ranking. N nodes in the order of the batch."""

    value: float
    loss: float
    logits: Tensor
    neighbor_weights: Tensor


def sensitivity(
    model: BPGCNForImageClassification, batch: dict[str, Tensor], to: Sequence[str] = NUMBERS, *, seed: int = 0
) -> dict[str, Sensitivity]:
    """Sensitivity of the objective, and of the answers, on the graph of a batch; the model stays as it is.

    The loss is that of training without dropout, and `seed` says which labels it reveals. Who is a neighbour is taken
    as it is; of `straight_through` the derivative is that of the softmax behind, as in training.

    Args:
        batch: `pixel_values` or `features`, `labels` (-100 unknown), and `node_ids` and `support_classes` if there are
            any.
        to: `ranking_temperature` (its value also where it is learned), `self_weight`.

    Raises:
        ValueError: for an unknown number, or a batch without labels.
    """
    unknown = [name for name in to if name not in NUMBERS]
    if unknown:
        raise ValueError(f"to={unknown[0]!r} is unknown: choose from {', '.join(NUMBERS)}.")
    inputs = embedded(model, labeled_inputs(model, batch))
    found = {}
    for name in to:
        with torch.no_grad(), fixed_objective(model, seed), forward_ad.dual_level():
            with _dual(model, name, inputs["features"]) as value:
                outputs = model(**inputs, support="batch")
            loss, logits, weights = map(_tangent, (outputs.loss, outputs.logits, outputs.neighbor_weights))
        found[name] = Sensitivity(value, float(loss), logits, weights)
    return found


def loss_sensitivity(
    model: BPGCNForImageClassification, batch: dict[str, Tensor], *, seed: int = 0
) -> dict[str, float]:
    """d loss / d temperature and d loss / d self weight, see `sensitivity`."""
    return {name: found.loss for name, found in sensitivity(model, batch, seed=seed).items()}


@contextlib.contextmanager
def _dual(model: BPGCNForImageClassification, name: str, like: Tensor) -> Iterator[float]:
    """Within, the model reads the number as a dual one of tangent 1; yields its value."""
    temperature = model.bpgcn.ranking_temperature
    value = float(temperature() if name == "ranking_temperature" else model.config.self_weight)
    primal = like.new_tensor(value)
    dual = forward_ad.make_dual(primal, torch.ones_like(primal))
    if name == "ranking_temperature":
        with temperature.register_forward_hook(lambda *_: dual):
            yield value
        return
    model.config.self_weight = dual
    try:
        yield value
    finally:
        model.config.self_weight = value


def _tangent(output: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(output)
    return torch.zeros_like(primal) if tangent is None else tangent
