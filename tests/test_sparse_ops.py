"""The three bilinear operators on edges: values, derivatives of every kind, and sizes at the edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from modeling_bpgcn.sparse_ops import CHUNK, edge_dot, neighbor_sum, scatter_sum

sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


def edges(N: int, M: int, k: int, D: int):
    """indices [N, k] (with repeats), w [N, k], x [M, D], y [N, D], float64."""
    options = {"dtype": torch.float64, "requires_grad": True}
    return (
        torch.randint(0, M, (N, k)),
        torch.randn(N, k, **options),
        torch.randn(M, D, **options),
        torch.randn(N, D, **options),
    )


@settings(max_examples=20, deadline=None)
@given(sizes)
def test_each_is_its_formula(size):
    N, M, k, D = size
    indices, w, x, y = edges(N, M, k, D)
    gathered = x[indices]
    assert_close(neighbor_sum(indices, w, x), (w[..., None] * gathered).sum(1))
    assert_close(edge_dot(indices, y, x), (y[:, None] * gathered).sum(-1))
    expected = torch.zeros(M, D, dtype=torch.float64).index_add(
        0, indices.flatten(), (w[..., None] * y[:, None]).flatten(0, 1)
    )
    assert_close(scatter_sum(indices, w, y, M), expected)


@settings(max_examples=8, deadline=None)
@given(sizes)
def test_each_has_derivatives_backward_forward_and_twice(size):
    indices, w, x, y = edges(*size)
    M = x.shape[0]
    for operator, inputs in (
        (lambda w, x: neighbor_sum(indices, w, x), (w, x)),
        (lambda y, x: edge_dot(indices, y, x), (y, x)),
        (lambda w, y: scatter_sum(indices, w, y, M), (w, y)),
    ):
        assert gradcheck(operator, inputs, check_forward_ad=True)
        assert gradgradcheck(operator, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, 0), (0, None, 0), (0, 0, None), (None, None, 1)])
@pytest.mark.parametrize("operator", [neighbor_sum, edge_dot, lambda i, w, y: scatter_sum(i, w, y, 5)])
def test_vmap_is_a_loop(operator, in_dims):
    batches = [edges(4, 5, 3, 2) for _ in range(3)]
    indices, w, x, y = (torch.stack(parts).detach() for parts in zip(*batches, strict=True))
    first, second = (y, x) if operator is edge_dot else (w, x) if operator is neighbor_sum else (w, y)
    inputs = [
        v[0] if dim is None else v.movedim(0, dim) for v, dim in zip((indices, first, second), in_dims, strict=True)
    ]
    elements = [
        [v if dim is None else v.select(dim, b) for v, dim in zip(inputs, in_dims, strict=True)] for b in range(3)
    ]
    gradients = torch.func.grad(lambda *args: operator(*args).square().sum(), argnums=(1, 2))
    for function in (operator, lambda *args: torch.cat([g.flatten() for g in gradients(*args)])):
        found = torch.func.vmap(function, in_dims)(*inputs)
        assert_close(found, torch.stack([function(*element) for element in elements]))


def test_only_what_needs_a_gradient_gets_one():
    indices, w, x, _ = edges(4, 5, 3, 2)
    (gradient,) = torch.autograd.grad(neighbor_sum(indices, w, x.detach()).sum(), w)
    assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(neighbor_sum(indices, w.detach(), x).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("N", "k"), [(0, 3), (3, 0)])
def test_no_edges_give_zeros(N, k):
    indices = torch.zeros(N, k, dtype=torch.long)
    w, x, y = torch.zeros(N, k), torch.ones(4, 2), torch.ones(N, 2)
    assert neighbor_sum(indices, w, x).shape == (N, 2)
    assert edge_dot(indices, y, x).shape == (N, k)
    assert_close(scatter_sum(indices, w, y, 4), torch.zeros(4, 2))


def test_edge_dot_is_the_same_in_one_chunk_and_in_many():
    D = 512
    N, k = CHUNK // D, 3
    indices = torch.randint(0, 50, (N, k))
    y, x = torch.randn(N, D), torch.randn(50, D)
    assert_close(edge_dot(indices, y, x), (y @ x.T).gather(1, indices), rtol=1e-4, atol=1e-4)
