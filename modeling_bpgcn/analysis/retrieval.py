"""How well a model retrieves: mAP and recall@k of queries against its support bank, by the model's own similarity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank_search import SCORES_AT_ONCE
from ..ranking import similarity
from .ranking_metrics import average_precision


@torch.no_grad()
def evaluate_retrieval(
    model, features: Tensor, classes: Tensor, node_ids: Tensor | None = None, recall_at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """
    Rank the support images of known class for each query and say how early those of its class come.

    Args:
        model: with a filled support bank; its `ranking_metric` is the similarity.
        features (`torch.Tensor` of shape `(Q, D)`): of the queries, as `bank_building.embed_images` makes them.
        classes (`torch.Tensor` of shape `(Q,)`): of the queries; those of unknown class (-100) are left out.
        node_ids (`torch.Tensor` of shape `(Q,)`, *optional*): names of the queries; a support image of a query's own
            id is not ranked for it.
        recall_at: the k of recall@k, the share of queries with their class among the first k.

    Returns:
        `dict[str, float]`: `map` and `recall@k`, means over the `queries` (their number is given too) that have an
        image of their class in the bank.

    Raises:
        ValueError: for shapes that do not fit, an empty bank, a k below 1, or no query with an image of its class.
    """
    base = model.base_model
    bank, metric = base.support_bank, base.config.ranking_metric
    if (
        features.ndim != 2
        or classes.shape != features.shape[:1]
        or (node_ids is not None and len(node_ids) != len(classes))
    ):
        raise ValueError(
            f"features {tuple(features.shape)} and classes {tuple(classes.shape)} must have the shapes (Q, D) and (Q,),"
            " and node_ids, if given, one id for each query."
        )
    if bank.size == 0:
        raise ValueError("The support bank is empty: call model.build_support_bank(dataset, ...) first.")
    if min(recall_at) < 1:
        raise ValueError(f"recall_at={tuple(recall_at)}: each k must be at least 1.")
    keys, known = bank.keys(metric, features.dtype), bank.classes >= 0
    parts = {name: [] for name in ("map", *(f"recall@{k}" for k in recall_at))}
    for rows in (classes >= 0).nonzero()[:, 0].split(max(1, SCORES_AT_ONCE // bank.size)):
        allowed = known if node_ids is None else known & (node_ids[rows, None] != bank.ids)
        scores = similarity(features[rows].to(keys.vectors.dtype), keys, metric).masked_fill(~allowed, -torch.inf)
        scores, order = scores.sort(dim=-1, descending=True)
        relevant = (bank.classes[order] == classes[rows, None]) & (scores > -torch.inf)  # [q, M]
        some = relevant.any(-1)
        parts["map"].append(average_precision(scores[some], relevant[some]))
        for k in recall_at:
            parts[f"recall@{k}"].append(relevant[some, :k].any(-1).to(scores.dtype))
    values = {name: torch.cat(part) if part else features.new_empty(0) for name, part in parts.items()}
    if not len(values["map"]):
        raise ValueError("No query of known class has an image of its class in the support bank.")
    return {name: value.mean().item() for name, value in values.items()} | {"queries": len(values["map"])}
