"""How good a ranking of images is: what retrieval, graph and metric learning ask of it, image by image."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 512  # bounds the memory of the sort: rows x candidates


@torch.no_grad()
def ranking_quality(
    features: Tensor, classes: Tensor, queries: Tensor, candidates: Tensor, num_neighbors: int = 10
) -> dict[str, Tensor]:
    r"""
    Rank the candidates of each query by cosine similarity, the query itself left out, and say how good the order is.

    With $r_{(j)} = 1$ where the j-th candidate shares the query's class, and k = `num_neighbors` or, if fewer, the
    number of candidates that every query has:

    - `average_precision`: $\frac{1}{\sum_j r_{(j)}} \sum_j r_{(j)} P(j)$ over all candidates, where P(j) is the share
      of the query's class among the candidates at least as similar as the j-th (ties count as one step, so that their
      order does not matter, as in [`sklearn.metrics.average_precision_score`]); NaN where no candidate shares the
      class. Its mean over queries is mAP.
    - `homophily`: share of the k nearest that share the query's class (Pei et al., "Geom-GCN", ICLR 2020).
    - `recall`: 1 where any of the k nearest shares the class, else 0 (recall@k of metric learning, Jegou et al.,
      "Product Quantization for Nearest Neighbor Search", PAMI 2011).
    - `neighbors`: the k nearest, nearest first.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): features, of any length; computed in float32 or float64.
        classes (`torch.Tensor` of shape `(N,)`): known class of each image, 0 or above.
        queries (`torch.Tensor` of shape `(Q,)`): indices of the images to ask for.
        candidates (`torch.Tensor` of shape `(M,)`): indices of the images to rank, without repetition.
        num_neighbors (`int`, defaults to 10): k.

    Returns:
        `dict[str, torch.Tensor]`: `average_precision`, `homophily` and `recall` of shape `(Q,)` in the precision of the
        computation; `neighbors` of shape `(Q, k)`, indices into `features`.

    Raises:
        ValueError: if shapes do not fit, a class is unknown, a feature is not finite, or a query has no candidate.
    """
    queries, candidates = queries.to(features.device), candidates.to(features.device)
    classes = classes.to(features.device)
    K = _check(features, classes, queries, candidates, num_neighbors)
    unit = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
    keys, key_classes = unit[candidates].T, classes[candidates]

    parts = []
    for rows in queries.split(ROWS_AT_ONCE):
        scores = (unit[rows] @ keys).masked_fill_(rows[:, None] == candidates, -torch.inf)  # [q, M]
        scores, order = scores.sort(dim=-1, descending=True)
        same = (key_classes[order] == classes[rows, None]) & (scores > -torch.inf)  # [q, M]
        nearest = same[:, :K]
        parts.append(
            {
                "average_precision": average_precision(scores, same),
                "homophily": nearest.to(scores.dtype).mean(-1),
                "recall": nearest.any(-1).to(scores.dtype),
                "neighbors": candidates[order[:, :K]],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Of rows [q, M] sorted by falling score; NaN where none is relevant."""
    M = scores.shape[-1]
    position = torch.arange(M, device=scores.device)
    last_of_tie = torch.ones_like(relevant)
    last_of_tie[:, :-1] = scores[:, :-1] != scores[:, 1:]
    end = torch.where(last_of_tie, position, M).flip(-1).cummin(-1).values.flip(-1)  # [q, M]
    hits = relevant.cumsum(-1)
    precision = hits.gather(-1, end).to(scores.dtype) / (end + 1)
    return (precision * relevant).sum(-1) / hits[:, -1]


def _check(features: Tensor, classes: Tensor, queries: Tensor, candidates: Tensor, num_neighbors: int) -> int:
    """The number of neighbors that every query has, at most `num_neighbors`."""
    if features.ndim != 2 or classes.shape != features.shape[:1] or queries.ndim != 1 or candidates.ndim != 1:
        raise ValueError(
            f"features {tuple(features.shape)}, classes {tuple(classes.shape)}, queries {tuple(queries.shape)} and"
            f" candidates {tuple(candidates.shape)} must have the shapes (N, D), (N,), (Q,) and (M,)."
        )
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}: ask for at least one.")
    for name, rows in (("queries", queries), ("candidates", candidates)):
        if rows.dtype != torch.int64 or not len(rows) or rows.min() < 0 or rows.max() >= len(classes):
            raise ValueError(
                f"{name} must hold indices (int64) from 0 to {len(classes) - 1}, at least one; turn a mask into indices"
                " with mask.nonzero()[:, 0]."
            )
    if len(candidates.unique()) < len(candidates):
        raise ValueError("candidates names an image twice: pass each index once.")
    used = torch.cat([queries, candidates])
    if (classes[used] < 0).any():
        raise ValueError("classes holds unknown ones (below 0) among queries or candidates: leave those images out.")
    if not torch.isfinite(features[used]).all():
        raise ValueError("features holds NaN or infinity: the backbone has diverged, lower its learning rate.")
    available = len(candidates) - int(torch.isin(queries, candidates).any())
    if not available:
        raise ValueError("A query's only candidate is itself: pass more candidates.")
    return min(num_neighbors, available)


def hubness(indices: Tensor, num_nodes: int) -> float:
    r"""
    Skewness of the k-occurrence: $E[(N_k - \mu)^3] / \sigma^3$, where $N_k(j)$ counts the queries that have j among
    their k nearest. 0 where every image is chosen equally often; large where a few hubs are everybody's neighbors.

    Source: Radovanović, Nanopoulos, Ivanović, "Hubs in Space", JMLR 2010.

    Args:
        indices (`torch.Tensor` of shape `(Q, k)`): neighbors of each query, from 0 to `num_nodes` - 1.
        num_nodes (`int`): images that could have been chosen; renumber where that is not all of them.

    Raises:
        ValueError: if an index is outside of the nodes.
    """
    if not indices.numel() or indices.min() < 0 or indices.max() >= num_nodes:
        raise ValueError(
            f"indices must run from 0 to {num_nodes - 1} (num_nodes is {num_nodes}), at least one of them."
        )
    occurrence = indices.flatten().bincount(minlength=num_nodes).double()
    deviation = occurrence - occurrence.mean()
    sigma = deviation.square().mean().sqrt()
    return (deviation.pow(3).mean() / sigma**3).item() if sigma > 0 else 0.0


def edge_churn(before: Tensor, after: Tensor) -> float:
    """
    Share of edges that were replaced: of the neighbors `after`, those that the same node did not have `before`.

    Args:
        before, after (`torch.Tensor` of shape `(N, k)`): neighbors of each node, no neighbor twice in a row.

    Raises:
        ValueError: if the shapes differ.
    """
    if before.shape != after.shape or before.ndim != 2 or not before.numel():
        raise ValueError(
            f"before {tuple(before.shape)} and after {tuple(after.shape)} must be (N, k) alike, with at least one edge."
        )
    kept = (after[:, :, None] == before[:, None, :]).any(-1)  # [N, k]
    return 1 - kept.double().mean().item()


def effective_neighbors(weights: Tensor) -> Tensor:
    r"""
    Perplexity of each row of edge weights: $\exp(-\sum_j p_j \log p_j)$ with $p_j = w_j / \sum_l w_l$; k where all
    weights are equal, 1 where one neighbor has it all, 0 for a node without edges.

    Args:
        weights (`torch.Tensor` of shape `(N, k)`): edge weights, 0 or above.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Raises:
        ValueError: if a weight is negative or NaN.
    """
    if weights.ndim != 2 or not (weights >= 0).all():
        raise ValueError(f"weights {tuple(weights.shape)} must be (N, k), with no negative or NaN entry.")
    mass = weights.sum(-1, keepdim=True)
    share = weights / torch.where(mass > 0, mass, 1)
    return torch.where(mass[:, 0] > 0, torch.special.entr(share).sum(-1).exp(), 0)
