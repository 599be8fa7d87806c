"""The tiled ranking as operators that `torch.compile` takes whole: to first order, without a graph break."""

import re

import torch
from torch import Tensor

from .tiled import find_exclusions, gradient, search, symmetric_gradient

# a copy of this file that came with a checkpoint registers operators of its own
NAMESPACE = "bpgcn_" + re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{NAMESPACE}::search", mutates_args=())
def compiled_search(
    query: Tensor,
    key: Tensor | None,
    k: int,
    beta: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    bound: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tiled.search`; the log-sum-exp is empty where no `beta` asks for it."""
    indices, valid, mass = search(query, key, k, find_exclusions(query_ids, key_ids), beta, bound)
    return indices.clone(), valid, query.new_empty(0) if mass is None else mass


@compiled_search.register_fake
def _(query, key, k, beta, query_ids, key_ids, bound):
    N = query.shape[0]
    shape = query.new_empty(N, k)
    return shape.long(), shape.bool(), query.new_empty(0 if beta is None else N)


@torch.library.custom_op(f"{NAMESPACE}::log_sum_exp", mutates_args=())
def compiled_log_sum_exp(
    query: Tensor,
    key: Tensor | None,
    beta: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    bound: float | None,
    value: Tensor,
) -> Tensor:
    """`LogSumExp`, whose `value` the search has found."""
    return value.clone()


@compiled_log_sum_exp.register_fake
def _(query, key, beta, query_ids, key_ids, bound, value):
    return torch.empty_like(value)


@torch.library.custom_op(f"{NAMESPACE}::log_sum_exp_gradient", mutates_args=())
def _log_sum_exp_gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    beta: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    bound: float | None,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    exclusion = find_exclusions(query_ids, key_ids)
    if key is not None:
        return gradient(grad, query, key, beta, exclusion, value)
    query_g, _, beta_g = symmetric_gradient(grad, query, beta, exclusion, bound, value)
    return query_g, query.new_empty(0), beta_g


@_log_sum_exp_gradient.register_fake
def _(grad, query, key, beta, query_ids, key_ids, bound, value):
    return torch.empty_like(query), query.new_empty(0) if key is None else torch.empty_like(key), torch.empty_like(beta)


def _save(ctx, inputs, output):
    *tensors, ctx.bound, _ = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad):
    query, key, beta, query_ids, key_ids, value = ctx.saved_tensors
    query_g, key_g, beta_g = _log_sum_exp_gradient(grad, query, key, beta, query_ids, key_ids, ctx.bound, value)
    return query_g, None if key is None else key_g, beta_g, None, None, None, None


compiled_log_sum_exp.register_autograd(_backward, setup_context=_save)
