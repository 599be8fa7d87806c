"""Three bilinear operators over the regular edges i -> indices[i, j], each the derivative of the others, so that every
order of derivative is made of these same three fast passes. None builds an N x k x D intermediate.

    neighbor_sum(indices, w, x)_i   = sum_j w_ij x[indices_ij]        [N, k], [M, D] -> [N, D]
    edge_dot(indices, y, x)_ij      = <y_i, x[indices_ij]>            [N, D], [M, D] -> [N, k]
    scatter_sum(indices, w, y, M)_m = sum_{ij: indices_ij = m} w_ij y_i   [N, k], [N, D] -> [M, D]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**20  # elements of a gathered chunk: small enough to stay in the cache


class OneByOne(torch.autograd.Function):
    """A function that `torch.func.vmap` takes element by element, as it does with data-dependent sizes inside."""

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        def element(b):
            return (x if dim is None else x.select(dim, b) for x, dim in zip(inputs, in_dims, strict=True))

        results = [cls.apply(*element(b)) for b in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, tuple(None if x is None else 0 for x in stacked)


def _neighbor_sum(indices: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    if indices.shape[1] == 0:
        return x.new_zeros(indices.shape[0], x.shape[1])
    return F.embedding_bag(indices, x, per_sample_weights=weights, mode="sum")


def _edge_dot(indices: Tensor, y: Tensor, x: Tensor) -> Tensor:
    (N, k), D = indices.shape, x.shape[1]
    if N == 0 or k == 0:
        return x.new_zeros(N, k)
    rows = max(1, CHUNK // (k * D))
    chunks = zip(indices.split(rows), y.split(rows), strict=True)
    return torch.cat([torch.bmm(x[i], part[:, :, None])[..., 0] for i, part in chunks])


def _scatter_sum(indices: Tensor, weights: Tensor, y: Tensor, size: int) -> Tensor:
    k = indices.shape[1]
    if indices.numel() == 0:
        return y.new_zeros(size, y.shape[1])
    # the transposed graph, as bags of edges that end in the same node
    target, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(target, torch.arange(size, device=target.device))
    return F.embedding_bag(order // k, y, offsets, per_sample_weights=weights.flatten()[order], mode="sum")


class _NeighborSum(OneByOne):
    @staticmethod
    def forward(indices, weights, x):
        return _neighbor_sum(indices, weights, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        indices, weights, x = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_weights = _EdgeDot.apply(indices, grad, x) if needs[1] else None
        return None, grad_weights, _ScatterSum.apply(indices, weights, grad, x.shape[0]) if needs[2] else None

    @staticmethod
    def jvp(ctx, _, weights_t, x_t):
        indices, weights, x = ctx.saved_tensors
        return _both(neighbor_sum, indices, (weights, x), (weights_t, x_t))


class _EdgeDot(OneByOne):
    @staticmethod
    def forward(indices, y, x):
        return _edge_dot(indices, y, x)

    setup_context = staticmethod(_NeighborSum.setup_context)

    @staticmethod
    def backward(ctx, grad):
        indices, y, x = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_y = _NeighborSum.apply(indices, grad, x) if needs[1] else None
        return None, grad_y, _ScatterSum.apply(indices, grad, y, x.shape[0]) if needs[2] else None

    @staticmethod
    def jvp(ctx, _, y_t, x_t):
        indices, y, x = ctx.saved_tensors
        return _both(edge_dot, indices, (y, x), (y_t, x_t))


class _ScatterSum(OneByOne):
    @staticmethod
    def forward(indices, weights, y, size):
        return _scatter_sum(indices, weights, y, size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.size = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        indices, weights, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_weights = _EdgeDot.apply(indices, y, grad) if needs[1] else None
        return None, grad_weights, _NeighborSum.apply(indices, weights, grad) if needs[2] else None, None

    @staticmethod
    def jvp(ctx, _, weights_t, y_t, __):
        indices, weights, y = ctx.saved_tensors
        return _both(lambda i, w, z: scatter_sum(i, w, z, ctx.size), indices, (weights, y), (weights_t, y_t))


def _both(operator, indices, primals, tangents):
    """The tangent of a bilinear operator."""
    (a, b), (a_t, b_t) = primals, tangents
    parts = [operator(indices, a_t, b)] if a_t is not None else []
    parts += [operator(indices, a, b_t)] if b_t is not None else []
    return sum(parts[1:], parts[0])


def neighbor_sum(indices: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """sum_j weights_ij x[indices_ij]: [N, k], [N, k], [M, D] -> [N, D]."""
    if torch.compiler.is_compiling():  # the compiler knows its derivative, and not that of a function with a jvp
        return _neighbor_sum(indices, weights, x)
    return _NeighborSum.apply(indices, weights, x)


def edge_dot(indices: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """<y_i, x[indices_ij]>: [N, k], [N, D], [M, D] -> [N, k]."""
    if torch.compiler.is_compiling():
        return (y[:, None, :] * x[indices]).sum(-1)
    return _EdgeDot.apply(indices, y, x)


def scatter_sum(indices: Tensor, weights: Tensor, y: Tensor, size: int) -> Tensor:
    """The sum over the edges ij that end in m of weights_ij y_i: [N, k], [N, k], [N, D] -> [size, D]."""
    if torch.compiler.is_compiling():
        messages = weights[:, :, None] * y[:, None, :]
        return y.new_zeros(size, y.shape[1]).index_add(0, indices.flatten(), messages.flatten(0, 1))
    return _ScatterSum.apply(indices, weights, y, size)
