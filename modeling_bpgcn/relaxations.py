"""Relaxations of the top-k: logits S / tau [N, M] (-inf where not a candidate), k, normalization -> `Ranking`.

`all` scales a row's weights over all candidates to sum to 1 before the k are kept, `selected` those of the k. The tiled
back ends have those that need no more than the best scores and the log-sum-exp."""

from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_ops import OneByOne


class Ranking(NamedTuple):
    """The k best candidates of each row, best first.

    Shapes: `indices` [N, k] int64, rows of the keys; `weights` [N, k], differentiable, >= 0, 0 where a row has fewer
    than k candidates.
    """

    indices: Tensor
    weights: Tensor


def best_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are, best first, of equals the first (`topk` takes any of them)."""
    if torch.compiler.is_compiling():
        values, indices = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    indices = _BestFirst.apply(logits, k)
    return logits.gather(1, indices), indices


class _BestFirst(torch.autograd.Function):
    """Where the k largest of each row are: a function, as `vmap` cannot look whether there are ties."""

    @staticmethod
    def forward(logits, k):
        values, indices = logits.topk(k, dim=-1)
        equals_outside = (logits == values[:, -1:]).sum(-1) > (values == values[:, -1:]).sum(-1)
        tied = equals_outside | (values[:, 1:] == values[:, :-1]).any(-1)
        if tied.any():
            indices[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return indices

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, grad):
        return None, None

    @staticmethod
    def jvp(ctx, *tangents):
        return None

    @staticmethod
    def vmap(info, in_dims, logits, k):
        rows = logits.movedim(in_dims[0], 0)
        return _BestFirst.apply(rows.flatten(0, 1), k).unflatten(0, rows.shape[:2]), 0


def _softmax(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w_j = exp(S_j / tau) / sum_l exp(S_l / tau), equation 3 of the note.

    Cost: one pass over the scores. Gradient: `all` reaches every candidate, `selected` the k kept. The default: smooth,
    and the cheapest at any size.
    """
    best, indices = best_first(logits, k)  # [N, k]
    if normalization == "selected":
        return Ranking(indices, torch.softmax(best, dim=-1))
    return Ranking(indices, torch.exp(best - torch.logsumexp(logits, dim=-1, keepdim=True)))


def _straight_through(logits: Tensor, k: int, normalization: str) -> Ranking:
    """Forward 1/k for each neighbour, backward the gradient of `softmax` (Bengio et al. 2013).

    Cost and reach: those of `softmax`. When the graph is to be a plain k-NN graph, as at deployment, and still learn;
    the gradient is not that of the value.
    """
    indices, soft = _softmax(logits, k, normalization)
    kept = logits.gather(1, indices).isfinite().to(soft.dtype)
    return Ranking(indices, kept / kept.sum(-1, keepdim=True) + (soft - soft.detach()))


def _threshold(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w_j = sigmoid((S_j - theta) / tau), theta halfway between the k-th and the next score; scaled to sum to 1 (the
    relaxed top-k of one threshold, as in Cuturi et al. 2019 without transport).

    Cost: one pass. Gradient: the k kept and the next; with `all` every candidate near theta. When the question is who
    belongs to the k rather than in which order: those far above theta weigh the same.
    """
    best, indices = best_first(logits, min(k + 1, logits.shape[-1]))
    # rows with fewer than k candidates: the last one stands for the k-th
    last = best[:, :k].isfinite().sum(-1, keepdim=True) - 1
    kth = best.gather(1, last)
    following = torch.where(best[:, -1:].isfinite(), best[:, -1:], kth)
    theta = (kth + following) / 2
    weights = torch.sigmoid(best[:, :k] - theta)
    total = weights if normalization == "selected" else torch.sigmoid(logits - theta)
    return Ranking(indices[:, :k], weights / total.sum(-1, keepdim=True))


def _lapsum(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w_j = F((S_j - b) / tau) / k, F the Laplace distribution function and b such that a row of F sums to k (LapSum,
    Struski et al. 2025). b is found by bisection; two Newton steps carry its implicit derivatives.

    Cost: some 60 passes over the scores. Gradient: every candidate, through b. A soft top-k whose size is exactly k at
    any temperature.
    """
    valid = logits.isfinite()
    count = valid.sum(-1, keepdim=True)
    _, indices = best_first(logits, k)
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
    b = middle
    for _ in range(2):  # at the solution, two steps carry the derivatives of first and second order
        density = torch.where(valid, 0.5 * torch.exp(-(logits - b).abs()), 0.0).sum(-1, keepdim=True)
        b = b + (soft_count(b).sum(-1, keepdim=True) - k) / density.clamp_min(1e-30)
    chances = torch.where(count > k, soft_count(b), valid.to(logits.dtype))
    kept = chances.gather(1, indices)
    total = kept if normalization == "selected" else chances
    return Ranking(indices, kept / total.sum(-1, keepdim=True))


def _laplace_cdf(x: Tensor) -> Tensor:
    # not of -|x|, whose derivative at 0, where b meets tied scores, is 0
    tail = 0.5 * torch.exp(torch.where(x > 0, -x, x))
    return torch.where(x > 0, 1 - tail, tail)


def _entmax(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w_j = max(S_j / (2 tau) - theta, 0)^2, theta such that a row sums to 1: 1.5-entmax (Peters et al. 2019, alg. 2).

    Cost: a sort of each row. Gradient: the candidates whose weight is not 0. When the number of neighbours should
    follow from the scores: far candidates weigh exactly 0, also among the k.
    """
    best, order = logits.sort(dim=-1, descending=True, stable=True)
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


def _sparsemax(logits: Tensor, k: int, normalization: str) -> Ranking:
    """w_j = max(S_j / tau - theta, 0), theta such that a row sums to 1: the projection onto the simplex (Martins and
    Astudillo 2016, algorithm 1).

    Cost and reach: those of `entmax`, with fewer weights above 0 and a gradient that jumps where one leaves.
    """
    best, order = logits.sort(dim=-1, descending=True, stable=True)
    # more than 1 below the best is outside the support whatever the others are
    x = (best - best[:, :1]).clamp_min(-2.0)
    rank = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
    total = x.cumsum(-1)
    support = (1 + rank * x > total).sum(-1, keepdim=True)
    theta = (total.gather(1, support - 1) - 1) / support
    kept = (x[:, :k] - theta).clamp_min(0)
    return Ranking(order[:, :k], kept / kept.sum(-1, keepdim=True) if normalization == "selected" else kept)


def _gumbel(logits: Tensor, k: int, normalization: str) -> Ranking:
    """`softmax` of S / tau + Gumbel noise: k neighbours drawn without replacement (Kool et al. 2019), from torch's
    global generator, so that a seed repeats them.

    Cost: one pass and a random number for each score. Gradient: that of `softmax` at the noisy scores. Exploration in
    training; answers come from `gumbel_mean`.
    """
    return _softmax(logits + _gumbel_noise(torch.rand_like(logits)), k, normalization)


def _gumbel_mean(logits: Tensor, k: int, normalization: str, draws: int = 32) -> Ranking:
    """The mean of `gumbel`'s weights over draws that are fixed and the same for every row, so that an answer depends on
    the query and the candidates alone; the k heaviest are kept.

    Cost: `draws` times that of `gumbel`. Gradient: the candidates that any draw has kept. `gumbel` in evaluation.
    """
    noise = _gumbel_noise(_FixedUniform.apply(draws, logits.shape[1], logits.dtype).to(logits.device))
    mean = torch.zeros_like(logits)
    for draw in noise:
        indices, weights = _softmax(logits + draw, k, normalization)
        mean = mean.scatter_add(1, indices, weights / draws)
    # what no draw has kept comes last, by its score
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    weights, heaviest = best_first(mean.gather(1, order), k)
    indices = order.gather(1, heaviest)
    return Ranking(indices, weights / weights.sum(-1, keepdim=True) if normalization == "selected" else weights)


class _FixedUniform(OneByOne):
    """Random numbers [draws, M] that are always the same: a function, as `vmap` asks of others how they may differ."""

    @staticmethod
    def forward(draws, columns, dtype):
        generator = torch.Generator().manual_seed(0)
        return torch.cat([torch.rand(1, columns, generator=generator, dtype=dtype) for _ in range(draws)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)


def _gumbel_noise(uniform: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


RELAXATIONS = {
    "softmax": _softmax,
    "straight_through": _straight_through,
    "lapsum": _lapsum,
    "threshold": _threshold,
    "entmax": _entmax,
    "sparsemax": _sparsemax,
    "gumbel": _gumbel,
    "gumbel_mean": _gumbel_mean,
}
