"""The differentiable neighbour ranking: similarities -> the k nearest candidates of each row, with weights that carry a
gradient back to the features (equations 2 to 5 of the note)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from .compiler_ops import compiled_log_sum_exp, compiled_search
from .log_sum_exp import LogSumExp, Search
from .relaxations import RELAXATIONS, Ranking
from .sparse_ops import edge_dot
from .triton_kernels import search as triton_search
from .triton_kernels import triton

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "dense", "tiled", "triton")
# below this many scores the matrix is the cheaper way
DENSE_SCORES = 2**21
# relaxations whose weights need the best scores only, and how many beyond the k
LOCAL = {"softmax": 0, "straight_through": 0, "threshold": 1}
# relaxations that also need the log-sum-exp of all scores, where the normalisation is over all
WITH_TOTAL = ("softmax", "straight_through")


def similarity(query: Tensor, key: "Tensor | PreparedKeys", metric: str = "cosine") -> Tensor:
    """S [N, M] of query [N, D] and key [M, D]: `cosine` (equation 2, in [-1, 1]; a zero vector is at 0 from everything
    and gets no gradient) or `euclidean` (negative squared distance). Computed in the inputs' dtype."""
    query, key, _ = inner_product_form(query, key, metric)
    return query @ key.T


@dataclass(frozen=True)
class PreparedKeys:
    """Candidates as `inner_product_form` wants them, made once for many rankings without gradient: `vectors` [M, D] or
    wider, and for `euclidean` the `center` [1, D] of the keys, whose width D is `width`."""

    vectors: Tensor
    center: Tensor | None
    width: int

    @classmethod
    def prepare(cls, key: Tensor, metric: str) -> "PreparedKeys":
        """Of key [M, D], in its dtype."""
        if metric == "cosine":
            return cls(_unit(key), None, key.shape[1])
        if metric == "euclidean":
            # about the keys' mean: the squares would drown the differences far from the origin
            center = key.mean(0, keepdim=True).detach()
            key = key - center
            vectors = torch.cat([key, key.new_ones(key.shape[0], 1), -key.square().sum(-1, keepdim=True)], dim=-1)
            return cls(vectors, center, key.shape[1])
        raise ValueError(f"metric={metric!r} is unknown: choose cosine or euclidean.")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def shape(self) -> tuple[int, int]:
        """M and D."""
        return len(self.vectors), self.width


def inner_product_form(
    query: Tensor, key: Tensor | PreparedKeys | None, metric: str
) -> tuple[Tensor, Tensor | None, float | None]:
    """Vectors whose inner products are the similarities, and the largest absolute similarity if there is one."""
    if key is None and metric == "cosine":
        return _unit(query), None, 1.0
    keys = key if isinstance(key, PreparedKeys) else PreparedKeys.prepare(query if key is None else key, metric)
    if metric == "cosine":
        return _unit(query), keys.vectors, 1.0
    query = query - keys.center
    ones = query.new_ones(query.shape[0], 1)
    return torch.cat([2 * query, -query.square().sum(-1, keepdim=True), ones], dim=-1), keys.vectors, None


def _unit(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return x * _inverse_norm(x)
    return _Unit.apply(x)


def _inverse_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    # 0 for a zero row, where 1 / |x| would give a gradient of 1 / eps
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > eps, 1 / norm.clamp_min(eps), 0.0)


class _Unit(torch.autograd.Function):
    """x / |x|, which keeps no copy of x for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * _inverse_norm(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _project(x, grad)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return _project(x, tangent)


def _project(x: Tensor, direction: Tensor) -> Tensor:
    # (I - u u^T) / |x|, a symmetric matrix: it serves the gradient and the tangent
    inverse = _inverse_norm(x)
    along = torch.linalg.vecdot(x, direction)[..., None] * inverse**3
    if torch.is_grad_enabled():
        return direction * inverse - x * along
    return (direction * inverse).addcmul_(x, along, value=-1)


def soft_topk(
    query: Tensor,
    key: Tensor | PreparedKeys | None = None,
    *,
    num_neighbors: int,
    temperature: float | Tensor,
    metric: str = "cosine",
    relaxation: str = "softmax",
    normalization: str = "selected",
    exclude_self: bool = True,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    backend: str = "auto",
) -> Ranking:
    r"""Rank the rows of `key` for each row of `query`, differentiably.

        S_ij = similarity(query_i, key_j)     w_ij = relaxation(S_i / tau)_j     N_k(i) = topk_j S_ij

    Args:
        query: [N, D] features; float32 inside whatever comes in (float64 stays), as bf16 reorders the top 10.
        key: [M, D] candidates, or `PreparedKeys` of this metric in float32 (float64 for such queries), which get no
            gradient; `None` ranks the queries among themselves.
        num_neighbors: k >= 1; at most the number of candidates comes back.
        temperature: tau > 0 in units of the similarity, a number or a tensor (which then gets a gradient).
        metric: `cosine` or `euclidean`.
        relaxation: a key of `RELAXATIONS`.
        normalization: `all` normalises over all candidates, `selected` over the k kept (each row sums to 1).
        exclude_self: candidates with the query's own id are none. Without ids and with `key=None`, the id is the row.
        query_ids, key_ids: [N] and [M] int64; ids that occur twice (padding, repeats) exclude each other.
        backend: `dense` holds the N x M scores; `tiled` never does, in memory O(N (D + k)), and computes them again in
            the backward pass (`softmax` and `straight_through`; `threshold` where `selected`); `triton` is the same as
            fused kernels, in float32; `auto` chooses dense or tiled by size. All are differentiable to second order
            and forwards. Of equal scores the first keys are taken.

    `torch.func.vmap` takes batches of features, keys, ids and temperatures: `dense` at once, the others one by one.

    Raises:
        ValueError: for an unknown option, a temperature or k out of range, or shapes that do not fit.
    """
    _check_arguments(query, key, num_neighbors, temperature, relaxation, normalization, backend)
    if (key is None and key_ids is not None) or (key is not None and (query_ids is None) != (key_ids is None)):
        raise ValueError("query_ids and key_ids exclude each other by id: give both or neither, and key_ids with key.")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    among_themselves = key is None
    if not exclude_self:
        query_ids = key_ids = None
    elif among_themselves:
        query_ids = torch.arange(len(query), device=query.device) if query_ids is None else query_ids
        key_ids = query_ids
    candidates = max(len(query) - bool(exclude_self), 0) if among_themselves else len(key)
    k = min(num_neighbors, candidates)
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype), key.to(dtype) if isinstance(key, Tensor) else key
        if k == 0:
            return Ranking(query.new_empty(len(query), 0, dtype=torch.long), query[:, :0])
        backend = _choose(backend, len(query), len(query) if key is None else len(key), relaxation, normalization)
        ids = None if query_ids is None else (query_ids, key_ids)
        if backend == "dense":
            return _rank_dense(query, key, k, temperature, metric, relaxation, normalization, ids)
        fused = backend == "triton"
        if fused and dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32; use backend='tiled' for float64.")
        return _rank_tiled(query, key, k, temperature, metric, relaxation, normalization, ids, fused)


def _choose(backend: str, N: int, M: int, relaxation: str, normalization: str) -> str:
    tiled = relaxation in (LOCAL if normalization == "selected" else WITH_TOTAL)
    if backend == "triton" and triton is None:
        raise ImportError("backend='triton' needs Triton: pip install triton, or use backend='tiled'.")
    if backend in ("tiled", "triton") and not tiled:
        raise ValueError(
            f"backend={backend!r} has no relaxation={relaxation!r} with normalization={normalization!r}: use"
            " backend='dense'."
        )
    if backend == "auto":
        backend = "tiled" if tiled and N * M > DENSE_SCORES and not torch.compiler.is_compiling() else "dense"
        if not torch.compiler.is_compiling():
            logger.debug(f"soft_topk of {N} x {M} scores: backend {backend}")
    return backend


def _rank_dense(query, key, k, temperature, metric, relaxation, normalization, ids) -> Ranking:
    # divide before masking: the temperature's gradient at a score of -inf would be 0 * inf
    return rank_logits(
        similarity(query, query if key is None else key, metric) / temperature, k, relaxation, normalization, ids
    )


def rank_logits(logits: Tensor, k: int, relaxation: str, normalization: str, ids=None) -> Ranking:
    """What `soft_topk` makes of S / tau [N, M]; `ids` are [N] and [M], and pairs of equal ids no candidates."""
    if ids is None:
        return RELAXATIONS[relaxation](logits, k, normalization)
    allowed = ids[0][:, None] != ids[1][None, :]
    logits = logits.masked_fill(~allowed, -math.inf)
    # a row whose candidates are all itself gets weights of 0, not NaN
    empty = ~allowed.any(-1, keepdim=True)
    indices, weights = RELAXATIONS[relaxation](logits.masked_fill(empty, 0.0), k, normalization)
    return Ranking(indices, weights.masked_fill(empty | ~allowed.gather(1, indices), 0.0))


def _rank_tiled(query, key, k, temperature, metric, relaxation, normalization, ids, fused: bool) -> Ranking:
    query, key, bound = inner_product_form(query, key, metric)
    beta = 1 / torch.as_tensor(temperature, dtype=query.dtype, device=query.device)
    other = query if key is None else key
    total = normalization == "all"
    kept = min(k + (0 if total else LOCAL[relaxation]), len(other))
    compiling = torch.compiler.is_compiling()
    query_ids, key_ids = ids or (None, None)
    with torch.no_grad():
        if not compiling:
            scale = beta if total or fused else None
            indices, valid, mass = Search.apply(query, key, kept, scale, query_ids, key_ids, bound, fused)
        elif fused:
            indices, valid, mass = triton_search(query, other, kept, ids, beta)
        else:
            flat = query.detach(), None if key is None else key.detach()
            indices, valid, mass = compiled_search(*flat, kept, beta if total else None, query_ids, key_ids, bound)
    if not total:
        mass = None
    elif compiling:
        mass = compiled_log_sum_exp(query, key, beta, query_ids, key_ids, bound, mass)
    else:
        mass = LogSumExp.apply(query, key, beta, query_ids, key_ids, bound, fused, mass)
    return weigh(indices, valid, edge_dot(indices, query, other) * beta, mass, k, relaxation)


def weigh(indices: Tensor, valid: Tensor, logits: Tensor, mass: Tensor | None, k: int, relaxation: str) -> Ranking:
    """The relaxation of the best scores of each row.

    Args:
        indices, valid, logits: [N, kept] of the best candidates, whether they are any, and their scores / tau.
        mass: [N] log-sum-exp of all scores / tau, to normalise over all; `None` normalises over the k.
    """
    # rows with fewer than k candidates: the weights of the others are 0, and all of a row without any
    empty = ~valid.any(-1, keepdim=True)
    logits = logits.masked_fill(~valid & ~empty, -math.inf)
    if mass is None:
        local, weights = RELAXATIONS[relaxation](logits, k, "selected")
        indices, valid = indices.gather(1, local), valid.gather(1, local)
    else:
        weights = torch.exp(logits - mass[:, None])
        if relaxation == "straight_through":
            share = valid.to(weights.dtype) / valid.sum(-1, keepdim=True).clamp_min(1)
            weights = share + (weights - weights.detach())
    return Ranking(indices, weights.masked_fill(~valid, 0.0))


def _check_arguments(query, key, num_neighbors, temperature, relaxation, normalization, backend) -> None:
    if query.ndim != 2 or (key is not None and (len(key.shape) != 2 or key.shape[1] != query.shape[1])):
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
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
