"""The arms of the evidence benchmark: the model as it is shipped, and what is taken from it in each of the others."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from ..ranking import Ranking, similarity

# what trains the backbone before the graph is ranked once, of which the fixed graph is what remains without any
TWO_STAGE = {
    "frozen": None,
    "ce": {"head": "linear", "head_loss_weight": 1.0, "propagation_loss_weight": 0.0, "neighborhood_loss_weight": 0.0},
    "neighborhood": {"head": "linear", "head_loss_weight": 0.0, "neighborhood_loss_weight": 1.0},
}
END_TO_END = ("uniform", "detached", "full", "ranking_only", "random")
ARMS = (*TWO_STAGE, *END_TO_END)
# fields of the config that leave a classifier of single images, beside those of `TWO_STAGE`
NO_GRAPH = {
    "label_embedding": False,
    "average_precision_loss_weight": 0.0,
    "propagation_loss_weight": 0.0,
    "consistency_loss_weight": 0.0,
    "propagation_consistency_loss_weight": 0.0,
    "propagation_mix": 0.0,
    "learn_temperature": False,
}


def ablate(model: BPGCNForImageClassification, arm: str) -> BPGCNForImageClassification:
    """Take from a model what the arm goes without, in training and in its answers.

    `uniform`: every neighbour weighs the same; `detached`: the weights carry no gradient; `ranking_only`: the messages
    carry none; `random`: neighbours are drawn by lot, with weights by similarity; `full`: nothing.

    Raises:
        ValueError: for an arm that is not trained end to end.
    """
    if arm not in END_TO_END:
        raise ValueError(f"arm={arm!r} is not trained end to end: choose one of {', '.join(END_TO_END)}.")
    changes = {"uniform": _uniform, "detached": _detached}
    if arm in changes:
        model.bpgcn.rank = _changed(model.bpgcn.rank, changes[arm])
    elif arm == "random":
        model.bpgcn.rank = _random_ranking(model)
    elif arm == "ranking_only" and model.head is not None:
        model.head.register_forward_pre_hook(lambda head, args: (args[0].detach(), *args[1:]))
    return model


def _changed(rank: Callable[..., Ranking], change: Callable[[Ranking], Ranking]) -> Callable[..., Ranking]:
    def changed(*args, **kwargs) -> Ranking:
        return change(rank(*args, **kwargs))

    return changed


def _detached(ranking: Ranking) -> Ranking:
    return ranking._replace(weights=ranking.weights.detach())


def _uniform(ranking: Ranking) -> Ranking:
    return ranking._replace(weights=torch.full_like(ranking.weights, 1 / ranking.weights.shape[1]))


def _random_ranking(model: BPGCNForImageClassification) -> Callable[..., Ranking]:
    def rank(query: Tensor, query_ids=None, key: Tensor | None = None, key_ids=None) -> Ranking:
        config = model.config
        keys, key_ids = (query, query_ids) if key is None else (key, key_ids)
        draw = torch.rand(len(query), len(keys), device=query.device)
        if key is None:
            draw.fill_diagonal_(-1.0)
        elif query_ids is not None and key_ids is not None:
            draw.masked_fill_(query_ids[:, None] == key_ids, -1.0)
        indices = draw.topk(min(config.num_neighbors, len(keys) - 1)).indices
        with torch.autocast(query.device.type, enabled=False):
            scores = similarity(query.float(), keys.float(), config.ranking_metric).gather(1, indices)
        return Ranking(indices, torch.softmax(scores / model.bpgcn.ranking_temperature(), dim=-1))

    return rank
