"""The tiled ranking as fused Triton kernels: a score lives in registers only. Optional: without Triton the tiled back
end stays. TRITON_INTERPRET=1 before the import runs them on a CPU, slowly, for tests."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS, COLUMNS, DEPTH = 32, 64, 64


if triton is not None:

    @triton.jit
    def _scores(
        query, key, query_ids, key_ids, rows, columns, N, M, D: tl.constexpr, DEPTH: tl.constexpr, MASK: tl.constexpr
    ):
        # the tile [rows, columns] of query key^T in full float32, -inf where not a candidate
        total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
        for start in range(0, D, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            a = tl.load(query + rows[:, None] * D + depth[None, :], (rows[:, None] < N) & (depth[None, :] < D), 0.0)
            b = tl.load(key + columns[None, :] * D + depth[:, None], (columns[None, :] < M) & (depth[:, None] < D), 0.0)
            total += tl.dot(a, b, input_precision="ieee")
        allowed = (rows[:, None] < N) & (columns[None, :] < M)
        if MASK:
            mine = tl.load(query_ids + rows, rows < N, 0)
            theirs = tl.load(key_ids + columns, columns < M, 0)
            allowed = allowed & (mine[:, None] != theirs[None, :])
        return tl.where(allowed, total, float("-inf"))

    @triton.jit
    def _search_kernel(
        query, key, query_ids, key_ids, beta, values_out, indices_out, mass_out, N, M,
        D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        # one block of rows against all columns: running k best, running maximum and sum of exponentials
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        slots = tl.arange(0, WIDTH)
        # slots beyond K are full from the start, so that nothing is ever put there
        values = tl.where(slots[None, :] < K, float("-inf"), float("inf")) + tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        indices = tl.zeros((ROWS, WIDTH), dtype=tl.int64)
        scale = tl.load(beta)
        highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        mass = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, M, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            scores = _scores(query, key, query_ids, key_ids, rows, columns, N, M, D, DEPTH, MASK)
            new = tl.maximum(highest, tl.max(scores, 1) * scale)
            safe = tl.where(new == float("-inf"), 0.0, new)
            mass = mass * tl.exp(highest - safe) + tl.sum(tl.exp(scores * scale - safe[:, None]), 1)
            highest = new
            for _ in range(K):
                best = tl.max(scores, 1)
                place = tl.min(tl.where(scores == best[:, None], columns[None, :], M), 1)
                worst = tl.min(values, 1)
                # of equals the first stay: the last of the worst makes room, and only for what is better
                oldest = tl.max(tl.where(values == worst[:, None], indices, -1), 1)
                spot = (values == worst[:, None]) & (indices == oldest[:, None])
                slot = tl.min(tl.where(spot, slots[None, :], WIDTH), 1)
                put = (slots[None, :] == slot[:, None]) & (best > worst)[:, None]
                values = tl.where(put, best[:, None], values)
                indices = tl.where(put, place[:, None].to(tl.int64), indices)
                scores = tl.where(columns[None, :] == place[:, None], float("-inf"), scores)
        kept = (rows[:, None] < N) & (slots[None, :] < K)
        tl.store(values_out + rows[:, None] * K + slots[None, :], values, kept)
        tl.store(indices_out + rows[:, None] * K + slots[None, :], indices, kept)
        tl.store(mass_out + rows, tl.where(mass > 0, tl.log(tl.where(mass > 0, mass, 1.0)) + highest, 0.0), rows < N)

    @triton.jit
    def _gradient_kernel(
        query, key, query_ids, key_ids, beta, grad, mass, out, N, M,
        D: tl.constexpr, MASK: tl.constexpr, OF_KEYS: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        # out = diag(g) P key, or with OF_KEYS (where query and key come exchanged) the sum over queries of g P query
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
        scale = tl.load(beta)
        total = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
        if not OF_KEYS:
            row_mass = tl.load(mass + rows, rows < N, 0.0)
            row_grad = tl.load(grad + rows, rows < N, 0.0)
        for first in range(0, M, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            scores = _scores(query, key, query_ids, key_ids, rows, columns, N, M, D, DEPTH, MASK)
            if OF_KEYS:
                column_mass = tl.load(mass + columns, columns < M, 0.0)
                column_grad = tl.load(grad + columns, columns < M, 0.0)
                weighted = tl.exp(scores * scale - column_mass[None, :]) * column_grad[None, :]
            else:
                weighted = tl.exp(scores * scale - row_mass[:, None]) * row_grad[:, None]
            inside = (columns[:, None] < M) & (depth[None, :] < D)
            values = tl.load(key + columns[:, None] * D + depth[None, :], inside, 0.0)
            total += tl.dot(weighted, values, input_precision="ieee")
        tl.store(out + rows[:, None] * D + depth[None, :], total, (rows[:, None] < N) & (depth[None, :] < D))


def _pointers(query: Tensor, key: Tensor, ids: tuple[Tensor, Tensor] | None):
    query_ids, key_ids = (query, key) if ids is None else (ids[0].contiguous(), ids[1].contiguous())
    return query.contiguous(), key.contiguous(), query_ids, key_ids


def search(query: Tensor, key: Tensor, k: int, ids, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled.search`: indices [N, k] best first, which of them are candidates, and the log-sum-exp [N]."""
    N, M, D = len(query), len(key), query.shape[1]
    values = query.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.long, device=query.device)
    mass = query.new_empty(N)
    width = triton.next_power_of_2(max(k, 2))
    _search_kernel[(triton.cdiv(N, ROWS),)](
        *_pointers(query, key, ids), beta.reshape(1), values, indices, mass, N, M,
        D, k, width, ids is not None, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    indices, order = indices.sort(dim=1, stable=True)
    values, best = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return indices.gather(1, best), values > -torch.inf, mass


def gradient(grad, query, key, beta, ids, mass) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled`'s gradient of the log-sum-exp: for query, key and beta."""
    N, M, D = len(query), len(key), query.shape[1]
    query_g, key_g = torch.empty_like(query), torch.empty_like(key)
    shape, depths = (ROWS, COLUMNS, DEPTH), triton.cdiv(D, DEPTH)
    tensors, masked = _pointers(query, key, ids), ids is not None
    beta, grad, mass = beta.reshape(1), grad.contiguous(), mass.contiguous()
    _gradient_kernel[(triton.cdiv(N, ROWS), depths)](
        *tensors, beta, grad, mass, query_g, N, M, D, masked, False, *shape
    )
    tensors = (tensors[1], tensors[0], tensors[3], tensors[2])
    _gradient_kernel[(triton.cdiv(M, ROWS), depths)](*tensors, beta, grad, mass, key_g, M, N, D, masked, True, *shape)
    beta_g = (query * query_g).sum()
    return query_g * beta, key_g * beta, beta_g
