"""The log-sum-exp of a row's scores as a function of queries, keys and temperature, whose value the search has found
already: differentiable backwards, twice, and forwards, without the N x M matrix of scores."""

from typing import NamedTuple

import torch
from torch import Tensor

from .tiled import Exclusion, gradient, row_blocks, search, symmetric_gradient
from .triton_kernels import gradient as triton_gradient


class Scores(NamedTuple):
    """What a matrix of scores is made of, beside its queries, keys and beta = 1 / tau.

    `ids`: of queries and keys, equal ids are no candidates for each other; `exclusion`: those pairs; `bound`: the
    largest absolute score, if known; `triton`: whether the kernels compute the gradient.
    """

    ids: tuple[Tensor, Tensor] | None
    exclusion: Exclusion | None
    bound: float | None
    triton: bool


class Search(torch.autograd.Function):
    """`tiled.search` as a constant: no derivative of any mode enters it."""

    @staticmethod
    def forward(query, key, k, exclusion, beta, bound):
        return search(query, key, k, exclusion, beta, bound)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(tensor for tensor in output if tensor is not None))

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * 6

    @staticmethod
    def jvp(ctx, *tangents):
        return None, None, None


class LogSumExp(torch.autograd.Function):
    """log sum_j exp(beta <q_i, k_j>) over the candidates, whose value `search` has found already."""

    @staticmethod
    def forward(query, key, beta, scores, value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, beta, ctx.scores, _ = inputs
        ctx.save_for_backward(query, key, beta, output)
        ctx.save_for_forward(query, key, beta, output)

    @staticmethod
    def backward(ctx, grad):
        query, key, beta, value = ctx.saved_tensors
        return (*_LogSumExpGradient.apply(grad, query, key, beta, ctx.scores, value.detach()), None, None)

    @staticmethod
    def jvp(ctx, query_t, key_t, beta_t, *_):
        query, key, beta, value = ctx.saved_tensors
        return _expected_tangent(query, key, beta, ctx.scores.exclusion, value, query_t, key_t, beta_t)


class _LogSumExpGradient(torch.autograd.Function):
    """With P the softmax: dq = beta diag(g) P k, dk = beta P^T diag(g) q, dbeta = sum_ij g_i P_ij s_ij."""

    @staticmethod
    def forward(grad, query, key, beta, scores, value):
        if scores.triton:
            other = query if key is None else key
            query_g, key_g, beta_g = triton_gradient(grad, query, other, beta, scores.ids, value)
            return (query_g + key_g, None, beta_g) if key is None else (query_g, key_g, beta_g)
        if key is None:
            return symmetric_gradient(grad, query, beta, scores.exclusion, scores.bound, value)
        return gradient(grad, query, key, beta, scores.exclusion, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scores, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, query_c, key_c, beta_c):
        grad, query, key, beta = ctx.saved_tensors
        return (*_second_order(grad, query, key, beta, ctx.scores.exclusion, query_c, key_c, beta_c), None, None)


def _expected_tangent(query, key, beta, exclusion, value, query_t, key_t, beta_t):
    other = query if key is None else key
    other_t = query_t if key is None else key_t
    parts = []
    for r, mask in row_blocks(query, key, exclusion):
        scores = query[r] @ other.T
        change = torch.zeros_like(scores)
        if query_t is not None:
            change = change + beta * (query_t[r] @ other.T)
        if other_t is not None:
            change = change + beta * (query[r] @ other_t.T)
        if beta_t is not None:
            change = change + beta_t * scores
        chances = torch.exp(beta * scores + mask - value[r, None])
        parts.append((chances * change).sum(1))
    return torch.cat(parts)


def _second_order(grad, query, key, beta, exclusion, query_c, key_c, beta_c):
    """The gradient of <query_c, dq> + <key_c, dk> + beta_c dbeta, each block by autograd on its dense form."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() if t is not None else None for t in (grad, query, key, beta)]
        grad, query, key, beta = inputs
        leaves = [t for t in inputs if t is not None]
        totals = [torch.zeros_like(t) for t in leaves]
        other = query if key is None else key
        other_c = query_c if key is None else key_c
        for r, mask in row_blocks(query, key, exclusion):
            scores = query[r] @ other.T
            chances = torch.softmax(beta * scores + mask, dim=1)
            change = torch.zeros_like(scores)
            if query_c is not None:
                change = change + beta * (query_c[r] @ other.T)
            if other_c is not None:
                change = change + beta * (query[r] @ other_c.T)
            if beta_c is not None:
                change = change + beta_c * scores
            total = (grad[r, None] * chances * change).sum()
            for sum_, part in zip(totals, torch.autograd.grad(total, leaves, allow_unused=True), strict=True):
                if part is not None:
                    sum_ += part
    results = iter(totals)
    return tuple(next(results) if t is not None else None for t in inputs)
