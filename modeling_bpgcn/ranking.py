"""The differentiable neighbour ranking: similarities -> the k nearest candidates of each row, with weights that carry a
gradient back to the features (equations 2 to 5 of the note)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """The k best candidates of each row, best first.

    Shapes: `indices` [N, k] int64, rows of the keys; `weights` [N, k], differentiable, >= 0, 0 where a row has fewer
    than k candidates.
    """

    indices: Tensor
    weights: Tensor


def similarity(query: Tensor, key: Tensor, metric: str = "cosine") -> Tensor:
    """S [N, M] of query [N, D] and key [M, D]: `cosine` (equation 2, in [-1, 1]; a zero vector is at 0 from everything
    and gets no gradient) or `euclidean` (negative squared distance). Computed in the inputs' dtype."""
    if metric == "cosine":
        return _unit(query) @ _unit(key).T
    if metric == "euclidean":
        square = query.square().sum(-1, keepdim=True) + key.square().sum(-1) - 2 * (query @ key.T)
        return -square.clamp_min(0)
    raise ValueError(f"metric={metric!r} is unknown: choose cosine or euclidean.")


def _unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    # select before dividing: 1 / |x| at a zero row would give a gradient of 1 / eps
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > eps, x, 0.0) / norm.clamp_min(eps)


def soft_topk(
    query: Tensor,
    key: Tensor | None = None,
    *,
    num_neighbors: int,
    temperature: float | Tensor,
    metric: str = "cosine",
    relaxation: str = "softmax",
    normalization: str = "selected",
    exclude_self: bool = True,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Ranking:
    r"""Rank the rows of `key` for each row of `query`, differentiably.

        S_ij = similarity(query_i, key_j)     w_ij = relaxation(S_i / tau)_j     N_k(i) = topk_j S_ij

    Args:
        query: [N, D] features; float32 inside whatever comes in (float64 stays), as bf16 reorders the top 10.
        key: [M, D] candidates; `None` ranks the queries among themselves.
        num_neighbors: k >= 1; at most the number of candidates comes back.
        temperature: tau > 0 in units of the similarity, a number or a tensor (which then gets a gradient).
        metric: `cosine` or `euclidean`.
        relaxation: a key of `RELAXATIONS`.
        normalization: `all` normalises over all candidates, `selected` over the k kept (each row sums to 1).
        exclude_self: candidates with the query's own id are none. Without ids and with `key=None`, the id is the row.
        query_ids, key_ids: [N] and [M] int64; ids that occur twice (padding, repeats) exclude each other.

    Raises:
        ValueError: for an unknown option, a temperature or k out of range, or shapes that do not fit.
    """
    _check_arguments(query, key, num_neighbors, temperature, relaxation, normalization)
    if key is not None and (query_ids is None) != (key_ids is None):
        raise ValueError("query_ids and key_ids exclude each other by id: give both or neither.")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    among_themselves = key is None
    key = query if among_themselves else key
    key_ids = query_ids if among_themselves else key_ids
    with torch.autocast(query.device.type, enabled=False):
        # divide before masking: the temperature's gradient at a score of -inf would be 0 * inf
        logits = similarity(query.to(dtype), key.to(dtype), metric) / temperature  # [N, M]
        allowed = None
        candidates = key.shape[0]
        if exclude_self and among_themselves:
            candidates -= 1
        if exclude_self and (query_ids is not None or among_themselves):
            if query_ids is None:
                query_ids = key_ids = torch.arange(query.shape[0], device=query.device)
            allowed = query_ids[:, None] != key_ids[None, :]
            logits = logits.masked_fill(~allowed, -math.inf)
        k = min(num_neighbors, candidates)
        if k == 0:
            return Ranking(logits.new_empty(query.shape[0], 0, dtype=torch.long), logits[:, :0])
        if allowed is None:
            return RELAXATIONS[relaxation](logits, k, normalization)
        # a row whose candidates are all itself gets weights of 0, not NaN
        empty = ~allowed.any(-1, keepdim=True)
        indices, weights = RELAXATIONS[relaxation](logits.masked_fill(empty, 0.0), k, normalization)
        return Ranking(indices, weights.masked_fill(empty | ~allowed.gather(1, indices), 0.0))


def _check_arguments(query, key, num_neighbors, temperature, relaxation, normalization) -> None:
    if query.ndim != 2 or (key is not None and (key.ndim != 2 or key.shape[1] != query.shape[1])):
        shapes = f"{tuple(query.shape)}" if key is None else f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"query [N, D] and key [M, D] must be two-dimensional with one width; got {shapes}.")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors={num_neighbors} must be at least 1.")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: on cosines 0.02 to 0.1 is the useful range.")
    if relaxation not in RELAXATIONS:
        raise ValueError(f"relaxation={relaxation!r} is unknown: choose one of {', '.join(RELAXATIONS)}.")
    if normalization not in ("all", "selected"):
        raise ValueError(f"normalization={normalization!r} is unknown: choose all or selected.")


# Relaxations: logits S / tau [N, M] (-inf where not a candidate), k, normalization -> Ranking


def _softmax(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w = softmax(S / tau), equation 3. `all` reaches every candidate, `selected` the k kept."""
    best, indices = logits.topk(k, dim=-1)  # [N, k]
    if normalization == "selected":
        return Ranking(indices, torch.softmax(best, dim=-1))
    return Ranking(indices, torch.exp(best - torch.logsumexp(logits, dim=-1, keepdim=True)))


def _straight_through(logits: Tensor, k: int, normalization: str) -> Ranking:
    """Forward 1/k for each neighbour, backward the softmax's gradient (Bengio et al. 2013)."""
    indices, soft = _softmax(logits, k, normalization)
    kept = logits.gather(1, indices).isfinite().to(soft.dtype)
    return Ranking(indices, kept / kept.sum(-1, keepdim=True) + (soft - soft.detach()))


def _threshold(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w = sigmoid((S - theta) / tau), theta halfway between the k-th and the next score; scaled to sum to 1."""
    best, indices = logits.topk(min(k + 1, logits.shape[-1]), dim=-1)
    # rows with fewer than k candidates: the last one stands for the k-th
    last = best[:, :k].isfinite().sum(-1, keepdim=True) - 1
    kth = best.gather(1, last)
    following = torch.where(best[:, -1:].isfinite(), best[:, -1:], kth)
    theta = (kth + following) / 2
    weights = torch.sigmoid(best[:, :k] - theta)
    total = weights if normalization == "selected" else torch.sigmoid(logits - theta)
    return Ranking(indices[:, :k], weights / total.sum(-1, keepdim=True))


def _lapsum(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w = F((S - b) / tau) / k, F the Laplace distribution function and b such that the row of F sums to k (LapSum,
    Struski et al. 2025). b is found by bisection; one Newton step carries its implicit gradient."""
    valid = logits.isfinite()
    count = valid.sum(-1, keepdim=True)
    indices = logits.topk(k, dim=-1).indices
    logits = torch.where(valid, logits, 0.0)

    def soft_count(b):
        return torch.where(valid, _laplace_cdf(logits - b), 0.0)

    with torch.no_grad():
        low = logits.min(-1, keepdim=True).values - 40.0
        high = logits.max(-1, keepdim=True).values + 40.0
        for _ in range(60):
            middle = (low + high) / 2
            above = soft_count(middle).sum(-1, keepdim=True) > k
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        density = torch.where(valid, 0.5 * torch.exp(-(logits - middle).abs()), 0.0).sum(-1, keepdim=True)
    b = middle + (soft_count(middle).sum(-1, keepdim=True) - k) / density.clamp_min(1e-30)
    chances = torch.where(count > k, soft_count(b), valid.to(logits.dtype))
    kept = chances.gather(1, indices)
    total = kept if normalization == "selected" else chances
    return Ranking(indices, kept / total.sum(-1, keepdim=True))


def _laplace_cdf(x: Tensor) -> Tensor:
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x > 0, 1 - tail, tail)


def _entmax(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w = 1.5-entmax(S / tau): like softmax, but exactly 0 away from the best (Peters et al. 2019, algorithm 2)."""
    best, order = logits.sort(dim=-1, descending=True)
    # 1 below the best (in these units) is outside the support whatever the others are
    x = ((best - best[:, :1]) / 2).clamp_min(-2.0)
    rank = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    mean, mean_square = x.cumsum(-1) / rank, x.square().cumsum(-1) / rank
    delta = (1 - rank * (mean_square - mean.square())) / rank
    # 1e-30 keeps the root's gradient finite where delta is 0
    thresholds = mean - delta.clamp_min(1e-30).sqrt()
    support = (thresholds <= x).sum(-1, keepdim=True)
    weights = (x - thresholds.gather(1, support - 1)).clamp_min(0).square()
    kept = weights[:, :k]
    total = kept.sum(-1, keepdim=True) if normalization == "selected" else 1.0
    return Ranking(order[:, :k], kept / total)


def _gumbel(logits: Tensor, k: int, normalization: str) -> Ranking:
    """Softmax of S / tau + Gumbel noise: k neighbours drawn without replacement (Kool et al. 2019), from torch's global
    generator, so a seed repeats them."""
    uniform = torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)
    return _softmax(logits - torch.log(-torch.log(uniform)), k, normalization)


RELAXATIONS = {
    "softmax": _softmax,
    "straight_through": _straight_through,
    "lapsum": _lapsum,
    "threshold": _threshold,
    "entmax": _entmax,
    "gumbel": _gumbel,
}
