"""Inner-product rankings tile by tile: the k best scores of each row and the log-sum-exp of all of them, in memory
O(N (D + k)) and without the N x M matrix of scores, which the backward pass computes again."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 2048
BLOCK = 32  # columns that share one maximum in the search
SAFE_EXPONENT = 80.0  # exp of its negative is still normal in float32


class Exclusion(NamedTuple):
    """Pairs (row, column) that are no candidates, sorted by tile. Shapes: [P] each; `starts` [tiles + 1]."""

    rows: Tensor
    columns: Tensor
    starts: list[int]
    across: int

    def mask(self, scores: Tensor, i: int, j: int) -> None:
        """Set the excluded scores of tile (i, j) to -inf, in place."""
        tile = i * self.across + j
        part = slice(self.starts[tile], self.starts[tile + 1])
        scores[self.rows[part] - i * TILE, self.columns[part] - j * TILE] = -math.inf


def find_exclusions(query_ids: Tensor | None, key_ids: Tensor | None) -> Exclusion | None:
    """The pairs with one id."""
    if query_ids is None:
        return None
    order = key_ids.argsort(stable=True)
    ordered = key_ids[order]
    first = torch.searchsorted(ordered, query_ids)
    counts = torch.searchsorted(ordered, query_ids, right=True) - first
    rows = torch.arange(len(query_ids), device=query_ids.device).repeat_interleave(counts)
    within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    columns = order[first.repeat_interleave(counts) + within]
    across = -(-len(key_ids) // TILE)
    tile = rows // TILE * across + columns // TILE
    tile, by_tile = tile.sort(stable=True)
    total = -(-len(query_ids) // TILE) * across
    starts = torch.searchsorted(tile, torch.arange(total + 1, device=tile.device)).tolist()
    return Exclusion(rows[by_tile], columns[by_tile], starts, across)


def slices(size: int) -> list[slice]:
    """Rows or columns of the tiles."""
    return [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]


def _tiles(query: Tensor, key: Tensor | None, exclusion: Exclusion | None):
    """Tiles (rows, columns, scores) of query key^T; with key None of query query^T on and above the diagonal. All share
    one buffer: a tile is gone when the next one comes."""
    buffer = query.new_empty(TILE * TILE)
    rows, columns = slices(len(query)), slices(len(query) if key is None else len(key))
    other = query if key is None else key
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            if key is not None or j >= i:
                scores = _view(buffer, r, c)
                torch.mm(query[r], other[c].T, out=scores)
                if exclusion is not None:
                    exclusion.mask(scores, i, j)
                yield r, c, scores


def _view(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    shape = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: shape[0] * shape[1]].view(shape)


class _Search:
    """The k best of each row so far, best first, of equals the first; columns must come in ascending order."""

    def __init__(self, size: int, k: int, like: Tensor):
        self.values = like.new_full((size, k), -math.inf)
        self.indices = torch.zeros(size, k, dtype=torch.long, device=like.device)

    def update(self, rows: slice, first_column: int, scores: Tensor) -> None:
        """Take a tile [r, c] of scores into account."""
        even = scores.shape[1] // BLOCK * BLOCK
        if even:
            self._update(rows, first_column, scores[:, :even].unflatten(1, (BLOCK, even // BLOCK)))
        if even < scores.shape[1]:
            self._update(rows, first_column + even, scores[:, even:, None].transpose(1, 2))

    def _update(self, rows: slice, first_column: int, scores: Tensor) -> None:
        # scores [r, b, n]: n strided blocks of b columns. A score can only be among the best if its block's maximum is.
        r, b, n = scores.shape
        values, indices, k = self.values[rows], self.indices[rows], self.values.shape[1]
        maxima = scores.amax(1)  # [r, n]
        threshold = values[:, -1]
        if n >= k:
            threshold = torch.maximum(threshold, maxima.topk(k, dim=1).values[:, -1])
        row, block = (maxima >= threshold[:, None]).nonzero(as_tuple=True)
        found = scores[row, :, block]  # [hits, b]
        hit, place = ((found >= threshold[row][:, None]) & (found > -math.inf)).nonzero(as_tuple=True)
        if not len(hit):
            return
        row, column, value = row[hit], place * n + block[hit], found[hit, place]
        order = (row * (b * n) + column).argsort()
        row, column, value = row[order], column[order], value[order]
        counts = torch.bincount(row, minlength=r)
        rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = k + int(counts.max())
        pool = values.new_full((r, width), -math.inf)
        pool_indices = indices.new_zeros(r, width)
        pool[:, :k], pool_indices[:, :k] = values, indices
        pool[row, k + rank], pool_indices[row, k + rank] = value, column + first_column
        values, order = pool.sort(dim=1, descending=True, stable=True)
        self.values[rows], self.indices[rows] = values[:, :k], pool_indices.gather(1, order)[:, :k]


@torch.no_grad()
def search(
    query: Tensor,
    key: Tensor | None,
    k: int,
    exclusion: Exclusion | None,
    beta: Tensor | None,
    bound: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices [N, k] of the best scores, which of them are candidates, and with `beta` the log-sum-exp [N] of beta
    times the scores (0 where there is no candidate).

    Args:
        query, key: [N, D] and [M, D]; key None ranks the queries among themselves, with half of the products.
        bound: the largest absolute score there can be, if known.
    """
    N = len(query)
    found = _Search(N, k, query)
    shift = _shared_shift(beta, bound)
    sums = query.new_zeros(N)
    highest = query.new_full((N,), -math.inf) if shift is None else None
    for r, c, scores in _tiles(query, key, exclusion):
        mirrored = key is None and r != c
        found.update(r, c.start, scores)
        if mirrored:
            found.update(c, r.start, scores.T)
        if beta is None:
            continue
        if shift is not None:
            scores.sub_(shift).mul_(beta).exp_()
            sums[r] += scores.sum(1)
            if mirrored:
                sums[c] += scores.sum(0)
        else:
            _add_exponentials(highest, sums, r, scores, beta)
            if mirrored:
                _add_exponentials(highest, sums, c, scores.T, beta)
    valid = found.values > -math.inf
    if beta is None:
        return found.indices, valid, None
    mass = sums.log() + (shift * beta if shift is not None else highest)
    return found.indices, valid, torch.where(sums > 0, mass, 0.0)


def _shared_shift(beta: Tensor | None, bound: float | None) -> float | None:
    """One shift for the exponentials of all rows, where none can underflow: then a tile's serve its mirror, too."""
    return bound if beta is not None and bound is not None and 2 * bound * float(beta) <= SAFE_EXPONENT else None


def _add_exponentials(highest, sums, rows, scores, beta) -> None:
    new = torch.maximum(highest[rows], scores.amax(1) * beta)
    safe = torch.where(new.isfinite(), new, 0.0)
    old = torch.where(highest[rows].isfinite(), torch.exp(highest[rows] - safe), 0.0)
    sums[rows] = sums[rows] * old + torch.exp(scores * beta - safe[:, None]).sum(1)
    highest[rows] = new


def gradient(grad, query, key, beta, exclusion, value) -> tuple[Tensor, Tensor, Tensor]:
    """Of the log-sum-exp `value` [N] under `grad` [N]: beta diag(g) P key, beta P^T diag(g) query and sum g P s, for
    query [N, D], key [M, D] and beta [], P the softmax of the scores."""
    query_g, key_g = torch.zeros_like(query), torch.zeros_like(key)
    for r, c, scores in _tiles(query, key, exclusion):
        weighted = scores.mul_(beta).sub_(value[r, None]).exp_().mul_(grad[r, None])
        query_g[r].addmm_(weighted, key[c])
        key_g[c].addmm_(weighted.T, query[r])
    beta_g = (query * query_g).sum()
    return query_g.mul_(beta), key_g.mul_(beta), beta_g


def symmetric_gradient(grad, query, beta, exclusion, bound, value) -> tuple[Tensor, None, Tensor]:
    """`gradient` of queries ranked among themselves, where a tile serves both of its rows."""
    # both rows that a pair stands in: A_ij = g_i P_ij + g_j P_ji is symmetric, dq = beta A q
    query_g = torch.zeros_like(query)
    shift = _shared_shift(beta, bound)
    factor = grad * torch.exp(shift * beta - value) if shift is not None else None
    buffer = query.new_empty(TILE * TILE)
    for r, c, scores in _tiles(query, None, exclusion):
        if shift is not None:
            both = torch.add(factor[r, None], factor[None, c], out=_view(buffer, r, c))
            weighted = scores.sub_(shift).mul_(beta).exp_().mul_(both)
        else:
            scores.mul_(beta)
            weighted = torch.exp(scores - value[r, None]).mul_(grad[r, None])
            weighted += torch.exp(scores - value[None, c]).mul_(grad[None, c])
        query_g[r].addmm_(weighted, query[c])
        if r != c:
            query_g[c].addmm_(weighted.T, query[r])
    beta_g = (query * query_g).sum() / 2
    return query_g.mul_(beta), None, beta_g
