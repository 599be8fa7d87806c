"""The log-sum-exp of a row's scores as a function of queries, keys and temperature, whose value the search has found
already: differentiable backwards and forwards to any order, without the N x M matrix of scores to the second."""

import math

import torch

from .sparse_ops import OneByOne
from .tiled import find_exclusions, gradient, search, slices, symmetric_gradient
from .triton_kernels import gradient as triton_gradient
from .triton_kernels import search as triton_search


class Search(OneByOne):
    """`tiled.search`, or that of the kernels where `fused`, as a constant: no derivative of any mode enters it."""

    @staticmethod
    def forward(query, key, k, beta, query_ids, key_ids, bound, fused):
        if fused:
            ids = None if query_ids is None else (query_ids, key_ids)
            return triton_search(query, query if key is None else key, k, ids, beta)
        return search(query, key, k, find_exclusions(query_ids, key_ids), beta, bound)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(tensor for tensor in output if tensor is not None))

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        return None, None, None


class LogSumExp(OneByOne):
    """log sum_j exp(beta <q_i, k_j>) over the candidates, whose value `search` has found already; pairs with one id are
    no candidates. `bound` is the largest absolute score, if known; `fused` has the kernels compute the gradient."""

    @staticmethod
    def forward(query, key, beta, query_ids, key_ids, bound, fused, value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.bound, ctx.fused, _ = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        *tensors, value = ctx.saved_tensors
        parts = _LogSumExpGradient.apply(grad, *tensors, ctx.bound, ctx.fused, value.detach())
        return (*parts, None, None, None, None, None)

    @staticmethod
    def jvp(ctx, query_t, key_t, beta_t, *_):
        blocks = _row_blocks(*ctx.saved_tensors, query_t, key_t, beta_t)
        return torch.cat([(chances * change).sum(1) for _, _, chances, change in blocks])


class _LogSumExpGradient(OneByOne):
    """With P the softmax: dq = beta diag(g) P k, dk = beta P^T diag(g) q, dbeta = sum_ij g_i P_ij s_ij."""

    @staticmethod
    def forward(grad, query, key, beta, query_ids, key_ids, bound, fused, value):
        if fused:
            ids, other = None if query_ids is None else (query_ids, key_ids), query if key is None else key
            query_g, key_g, beta_g = triton_gradient(grad, query, other, beta, ids, value)
            return (query_g + key_g, None, beta_g) if key is None else (query_g, key_g, beta_g)
        exclusion = find_exclusions(query_ids, key_ids)
        if key is None:
            return symmetric_gradient(grad, query, beta, exclusion, bound, value)
        return gradient(grad, query, key, beta, exclusion, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.bound, ctx.fused, value = inputs
        ctx.save_for_backward(*tensors, value)
        ctx.save_for_forward(*tensors, value)

    @staticmethod
    def backward(ctx, query_c, key_c, beta_c):
        *tensors, _ = ctx.saved_tensors
        return (*_second_order(*tensors, query_c, key_c, beta_c), None, None, None, None, None)

    @staticmethod
    def jvp(ctx, grad_t, query_t, key_t, beta_t, *_):
        grad, *tensors, value = ctx.saved_tensors
        # the second derivative is symmetric: its product with the tangents is that with cotangents
        _, *parts = _second_order(grad, *tensors, query_t, key_t, beta_t)
        if grad_t is None:
            return tuple(parts)
        along = _LogSumExpGradient.apply(grad_t, *tensors, ctx.bound, ctx.fused, value)
        return tuple(None if a is None else a + b for a, b in zip(along, parts, strict=True))


def _row_blocks(query, key, beta, query_ids, key_ids, query_t, key_t, beta_t):
    """Blocks of rows, for the derivatives that are not worth tiling both ways: rows, scores s, their softmax P, and the
    derivative of beta s along the tangents, each but the first [r, M]."""
    other, other_t = (query, query_t) if key is None else (key, key_t)
    for r in slices(len(query)):
        scores = query[r] @ other.T
        scaled, change = beta * scores, torch.zeros_like(scores)
        if query_t is not None:
            change = change + beta * (query_t[r] @ other.T)
        if other_t is not None:
            change = change + beta * (query[r] @ other_t.T)
        if beta_t is not None:
            change = change + beta_t * scores
        if query_ids is not None:
            excluded = query_ids[r, None] == key_ids
            # a row without candidates would become NaN; whatever it is, its weights are 0
            scaled = scaled.masked_fill(excluded & ~excluded.all(1, keepdim=True), -math.inf)
        yield r, scores, torch.softmax(scaled, 1), change


def _second_order(grad, query, key, beta, query_ids, key_ids, query_c, key_c, beta_c):
    """The gradient of <query_c, dq> + <key_c, dk> + beta_c dbeta = sum_ij g_i P_ij C_ij, where C is the derivative of
    beta s along query_c, key_c and beta_c."""
    other, other_c = (query, query_c) if key is None else (key, key_c)
    grad_g, query_g = [], []
    other_g, beta_g = torch.zeros_like(other), torch.zeros_like(beta)
    for r, scores, chances, change in _row_blocks(query, key, beta, query_ids, key_ids, query_c, key_c, beta_c):
        mean = (chances * change).sum(1, keepdim=True)
        weighted = grad[r, None] * chances
        bend = weighted * (change - mean)  # what beta s gets through P
        by_score, by_tangents = beta * bend, change
        if beta_c is not None:
            by_score, by_tangents = by_score + beta_c * weighted, change - beta_c * scores
        rows_g = by_score @ other
        other_g = other_g + by_score.T @ query[r]
        beta_g = beta_g + (bend * scores + weighted * by_tangents / beta).sum()
        if query_c is not None:
            other_g = other_g + beta * (weighted.T @ query_c[r])
        if other_c is not None:
            rows_g = rows_g + beta * (weighted @ other_c)
        grad_g.append(mean[:, 0])
        query_g.append(rows_g)
    grad_g, query_g = torch.cat(grad_g), torch.cat(query_g)
    return (grad_g, query_g + other_g, None, beta_g) if key is None else (grad_g, query_g, other_g, beta_g)
