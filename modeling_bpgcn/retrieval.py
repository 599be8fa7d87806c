"""Image retrieval: the support images nearest to a query, with the model's own similarity and weights."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .ranking import inner_product_form
from .sparse_ops import edge_dot


@dataclass
class BPGCNRetrievalOutput(ModelOutput):
    """The k nearest support images of each query, best first. Shapes: [B, k] each.

    `ids` and `classes` (-100 unknown) int64; `weights`, those of the ranking; `scores`, the similarities; and
    `neighbor_indices`, rows of the bank. Where a query has fewer candidates the id is -1, the class -100, the weight 0
    and the score -inf.
    """

    ids: Tensor | None = None
    classes: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    neighbor_indices: Tensor | None = None


@torch.no_grad()
def retrieve(
    model,
    pixel_values: Tensor | None = None,
    features: Tensor | None = None,
    node_ids: Tensor | None = None,
    num_neighbors: int | None = None,
) -> BPGCNRetrievalOutput:
    """Rank the support bank of a `BPGCNModel` for each query.

    Args:
        pixel_values: [B, channels, height, width] images, or `features` [B, D] what the backbone made of them.
        node_ids: [B] int64 names of the images: support images of a query's own id are none of its neighbours.
        num_neighbors: k, at most the bank's size; the config's unless given. The weights are those of this many:
            normalised over the k where `ranking_normalization` is `selected`.

    Raises:
        ValueError: for an empty bank, or a k below 1.
    """
    features = model.embed(pixel_values, features)
    ranking = model.rank_in_bank(features, node_ids, num_neighbors)
    bank, options = model.support_bank, model.rank_options()
    keys = bank.keys(options["metric"], features.dtype)
    query, key, _ = inner_product_form(features.to(keys.vectors.dtype), keys, options["metric"])
    scores = edge_dot(ranking.indices, query, key)
    ids, classes = bank.ids[ranking.indices], bank.classes[ranking.indices]
    if node_ids is not None and options["exclude_self"]:
        ordered = bank.ids.sort().values
        own = torch.searchsorted(ordered, node_ids, right=True) - torch.searchsorted(ordered, node_ids)
        none = torch.arange(ids.shape[1], device=ids.device) >= (bank.size - own)[:, None]  # candidates come first
        ids, classes = ids.masked_fill(none, -1), classes.masked_fill(none, -100)
        scores = scores.masked_fill(none, -torch.inf)
    return BPGCNRetrievalOutput(
        ids=ids, classes=classes, weights=ranking.weights, scores=scores, neighbor_indices=ranking.indices
    )
