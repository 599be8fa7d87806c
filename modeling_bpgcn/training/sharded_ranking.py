"""The ranking of rows that are spread over processes: what `soft_topk` of all of them gives, to rounding, with each
process ranking its own rows. Of scores computed as equal the first of all keys wins, wherever it is."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranking import LOCAL, WITH_TOTAL, inner_product_form, soft_topk, weigh
from ..relaxations import Ranking
from ..sparse_ops import edge_dot, neighbor_sum, scatter_sum
from ..tiled import Exclusion, find_exclusions, gradient, search, slices
from .gather import gather_rows, gather_sizes


def rank_rows(
    features: Tensor,
    ids: Tensor | None = None,
    *,
    num_neighbors: int,
    temperature: float | Tensor,
    metric: str = "cosine",
    relaxation: str = "softmax",
    normalization: str = "selected",
    exclude_self: bool = True,
    backend: str = "auto",
) -> Ranking:
    """`soft_topk` of the rows [n, D] of all processes among themselves: each gathers all features and ranks its rows.

    Args:
        features: [n, D], this process's rows, also none; they may be uneven.
        ids: [n] int64; rows with one id are no neighbours of each other. `None`: every row has its own.
        others: as in `soft_topk`, the same on every process. `gumbel` draws what a single process would draw on a CPU
            if all generators are in one state.

    Returns:
        The ranking [N, k] of all rows in the order of the ranks, the same on every process; indices are rows of all.
        The gradient is that of `gather_rows`, and so is the rule for the loss.

    Raises:
        ValueError: as `soft_topk` and `gather_rows`, on every process; also for ids that do not fit the features.
    """
    options = {"temperature": temperature, "metric": metric, "relaxation": relaxation, "normalization": normalization}
    options |= {"exclude_self": exclude_self, "backend": backend}
    sizes = gather_sizes(features)
    own_ids, all_ids = _gather_ids(ids, sizes, features.device)
    keys, candidates = gather_rows(features), sum(sizes) - exclude_self
    if len(sizes) == 1 or candidates < 1:
        return soft_topk(keys, query_ids=all_ids, num_neighbors=num_neighbors, **options)
    before = sum(sizes[: dist.get_rank()])
    if relaxation == "gumbel":
        _skip_noise(before, keys)
    options |= {"query_ids": own_ids, "key_ids": all_ids}
    ranking = soft_topk(features, keys, num_neighbors=min(num_neighbors, candidates), **options)
    if relaxation == "gumbel":
        _skip_noise(len(keys) - before - len(features), keys)
    return Ranking(*map(gather_rows, ranking))


def rank_ring(
    features: Tensor,
    ids: Tensor | None = None,
    *,
    num_neighbors: int,
    temperature: float | Tensor,
    metric: str = "cosine",
    relaxation: str = "softmax",
    normalization: str = "selected",
    exclude_self: bool = True,
) -> Ranking:
    """`rank_rows` for features of which one process cannot hold all: they travel round the ring of processes.

    Besides its own rows a process holds at most two shards of others', the one it ranks and the one that arrives; the
    backward pass sends them round again together with their gradients. Memory O(n (D + k)) for the largest n, and that
    of the ranking of all [N, k]. Gradients are of first order.

    Args:
        others: as in `rank_rows`; the relaxations are those of the tiled back end.

    Returns:
        As `rank_rows`.

    Raises:
        ValueError: as `rank_rows`, and for a relaxation that needs all scores of a row at once.
        RuntimeError: for a gradient of the gradient.
    """
    if relaxation not in {"selected": LOCAL, "all": WITH_TOTAL}.get(normalization, ()):
        raise ValueError(
            f"rank_ring has no relaxation={relaxation!r} with normalization={normalization!r}: use rank_rows."
        )
    if num_neighbors < 1 or not (isinstance(temperature, Tensor) or temperature > 0):
        raise ValueError(f"num_neighbors={num_neighbors} must be at least 1 and temperature={temperature} above 0.")
    sizes = gather_sizes(features)
    if features.ndim != 2:
        raise ValueError(f"features [n, D] must be two-dimensional; got {tuple(features.shape)}.")
    own_ids, all_ids = _gather_ids(ids, sizes, features.device)
    N = sum(sizes)
    if len(sizes) == 1 or exclude_self >= N:
        options = {"metric": metric, "relaxation": relaxation, "normalization": normalization, "backend": "tiled"}
        options |= {"num_neighbors": num_neighbors, "temperature": temperature, "exclude_self": exclude_self}
        return soft_topk(gather_rows(features), query_ids=all_ids, **options)
    k = min(num_neighbors, N - exclude_self)
    kept = k if normalization == "all" else min(k + LOCAL[relaxation], N)
    exclusions = [find_exclusions(own_ids, part) if exclude_self else None for part in all_ids.split(sizes)]
    with torch.autocast(features.device.type, enabled=False):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        query, key, bound = _inner_product_form(rows, N, metric)
        beta = 1 / torch.as_tensor(temperature, dtype=rows.dtype, device=rows.device)
        ring = _Ring(sizes, exclusions, kept, normalization == "all", bound)
        indices, valid, scores, mass = _RingScores.apply(query, key, beta, ring)
        ranking = weigh(indices, valid, scores * beta, mass, k, relaxation)
    return Ranking(*map(gather_rows, ranking))


def _gather_ids(ids: Tensor | None, sizes: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    if ids is None:
        before = sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
        own = sizes[dist.get_rank()] if len(sizes) > 1 else sizes[0]
        ids = torch.arange(before, before + own, device=device)
    if (found := gather_sizes(ids)) != sizes:
        raise ValueError(f"Each row needs one id: the processes have {sizes} rows and {found} ids.")
    return ids, gather_rows(ids)


def _skip_noise(rows: int, keys: Tensor) -> None:
    """Draw what other processes use for their rows, so that the draws of all are those of one process."""
    for part in slices(rows):
        dtype = torch.promote_types(keys.dtype, torch.float32)
        torch.rand(part.stop - part.start, len(keys), dtype=dtype, device=keys.device)


def _inner_product_form(rows: Tensor, N: int, metric: str) -> tuple[Tensor, Tensor, float | None]:
    """`inner_product_form` of this process's rows as queries and as keys, about the mean of all processes' rows."""
    if metric != "euclidean":
        query, _, bound = inner_product_form(rows, None, metric)
        return query, query, bound
    mean = gather_rows(rows.detach().sum(0, keepdim=True)).sum(0, keepdim=True) / N
    # a single key at the mean makes it the center
    query, _, bound = inner_product_form(rows, mean, metric)
    # (2 x, -|x|^2, 1) as a query is (x, 1, -|x|^2) as a key
    return query, torch.cat([query[:, :-2] / 2, query[:, -1:], query[:, -2:-1]], dim=1), bound


class _Ring(NamedTuple):
    """What a pass round the ring needs to know, beside its vectors.

    `sizes`: rows of each process; `exclusions`: for each, the pairs of own rows and its keys that are no candidates;
    `kept`: how many scores of a row; `total`: whether their log-sum-exp is wanted; `bound`: see `tiled.search`.
    """

    sizes: list[int]
    exclusions: list[Exclusion | None]
    kept: int
    total: bool
    bound: float | None

    def shards(self, key: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The keys of each process: its rank, how many keys come before and the keys; one's own first. While one is
        in use the next one arrives."""
        first, world = dist.get_rank(), len(self.sizes)
        for rank in (*range(first, world), *range(first)):
            following = (rank + 1) % world
            arriving = _Exchange(key, self.sizes[following]) if following != first else None
            yield rank, sum(self.sizes[:rank]), key
            if arriving is not None:
                key = arriving.wait()


class _Exchange:
    """Rows on their way: some to the process before this one, others here from the one after it."""

    def __init__(self, leaving: Tensor, arriving: int):
        rank, world = dist.get_rank(), dist.get_world_size()
        self._received = leaving.new_empty(arriving, leaving.shape[1])
        operations = [
            dist.P2POp(dist.isend, leaving.contiguous(), (rank - 1) % world),
            dist.P2POp(dist.irecv, self._received, (rank + 1) % world),
        ]
        # what is on its way must not be freed
        self._operations = [operation for operation in operations if operation.tensor.numel()]
        self._works = dist.batch_isend_irecv(self._operations) if self._operations else []

    def wait(self) -> Tensor:
        """The rows that arrive, once; nothing of the exchange is kept."""
        for work in self._works:
            work.wait()
        received = self._received
        del self._works, self._operations, self._received
        return received


class _RingScores(torch.autograd.Function):
    """The best scores <q_i, k_j> of each own row among the keys of all processes, where and which they are, and the
    log-sum-exp of all of its scores times beta."""

    @staticmethod
    def forward(query, key, beta, ring):
        values = query.new_full((len(query), ring.kept), -math.inf)
        indices = torch.zeros_like(values, dtype=torch.long)
        mass = query.new_full((len(query),), -math.inf) if ring.total else None
        for rank, before, shard in ring.shards(key):
            if len(shard) == 0:
                continue
            scale = beta if ring.total else None
            found, valid, part = search(
                query, shard, min(ring.kept, len(shard)), ring.exclusions[rank], scale, ring.bound
            )
            scores = edge_dot(found, query, shard).masked_fill(~valid, -math.inf)
            values, indices = _best_of_both(values, indices, scores, found + before)
            if ring.total:
                mass = torch.logaddexp(mass, part.masked_fill(~valid.any(-1), -math.inf))
            del shard  # two others are on their way now
        valid = values > -math.inf
        if ring.total:
            mass = mass.masked_fill(~valid.any(-1), 0.0)
        return indices.masked_fill(~valid, 0), valid, values.masked_fill(~valid, 0.0), mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, beta, ctx.ring = inputs
        indices, valid, _, mass = output
        ctx.mark_non_differentiable(indices, valid)
        ctx.save_for_backward(query, key, beta, indices, mass)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, __, scores_g, mass_g):
        query, key, beta, indices, mass = ctx.saved_tensors
        ring = ctx.ring
        query_g, beta_g = torch.zeros_like(query), torch.zeros_like(beta)
        arriving = None
        for rank, before, shard in ring.shards(key):
            key_g = torch.zeros_like(shard)
            if len(shard):
                inside = (indices >= before) & (indices < before + len(shard))
                local, weights = (indices - before).where(inside, 0), scores_g.where(inside, 0.0)
                query_g += neighbor_sum(local, weights, shard)
                key_g += scatter_sum(local, weights, query, len(shard))
            if len(shard) and ring.total:
                parts = gradient(mass_g, query, shard, beta, ring.exclusions[rank], mass)
                for total, part in zip((query_g, key_g, beta_g), parts, strict=True):
                    total += part
            if arriving is not None:
                key_g += arriving.wait()
            # the gradient follows its keys to the next process, and after the last one comes home
            arriving = _Exchange(key_g, ring.sizes[(rank + 1) % len(ring.sizes)])
            del shard  # two others are on their way now
        return query_g, arriving.wait(), beta_g, None


def _best_of_both(values: Tensor, indices: Tensor, others: Tensor, other_indices: Tensor) -> tuple[Tensor, Tensor]:
    """The best of both, as many as `values` has, best first, of equals the one of the lowest index."""
    kept = values.shape[1]
    values, indices = torch.cat([values, others], dim=1), torch.cat([indices, other_indices], dim=1)
    indices, order = indices.sort(dim=1)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :kept], indices.gather(1, best)[:, :kept]
