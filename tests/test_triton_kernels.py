"""The Triton kernels are the dense form, also where nothing divides by a block. Without a GPU they run in Triton's own
interpreter (tests/conftest.py asks for it)."""

import pytest
import torch
from torch.testing import assert_close

from modeling_bpgcn import ranking, triton_kernels
from modeling_bpgcn.ranking import LOCAL, WITH_TOTAL, soft_topk

PATHS = [(name, "selected") for name in LOCAL] + [(name, "all") for name in WITH_TOTAL]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton_kernels.triton is None, reason="Triton is not installed: pip install triton")


@needs_triton
@pytest.mark.parametrize(("relaxation", "normalization"), PATHS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("M", [None, 45])
@pytest.mark.parametrize("ids", ["none", "repeated"])
def test_values_and_gradients_are_those_of_the_dense_form(relaxation, normalization, metric, M, ids):
    N, D = 70, 33
    query = torch.randn(N, D, device=DEVICE, requires_grad=True)
    key = None if M is None else torch.randn(M, D, device=DEVICE, requires_grad=True)
    temperature = torch.tensor(0.3 if metric == "cosine" else 5.0, device=DEVICE, requires_grad=True)
    options = {"relaxation": relaxation, "normalization": normalization, "metric": metric, "num_neighbors": 5}
    options |= {"temperature": temperature, "exclude_self": ids != "none"}
    if ids == "repeated":
        key_ids = None if M is None else torch.arange(M, device=DEVICE) % 40
        options |= {"query_ids": torch.arange(N, device=DEVICE) % 60, "key_ids": key_ids}
    dense, fused = (soft_topk(query, key, backend=backend, **options) for backend in ("dense", "triton"))
    assert torch.equal(dense.indices, fused.indices)
    assert_close(fused.weights, dense.weights, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(dense.weights)
    inputs = [leaf for leaf in (query, key, temperature) if leaf is not None]
    expected = torch.autograd.grad(dense.weights, inputs, upstream)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for got, gradient in zip(torch.autograd.grad(fused.weights, inputs, upstream), expected, strict=True):
        assert_close(got, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@needs_triton
def test_of_equal_scores_the_first_are_taken():
    query = torch.ones(80, 3, device=DEVICE)
    for backend in ("dense", "tiled", "triton"):
        found = soft_topk(query, num_neighbors=4, temperature=0.1, backend=backend)
        assert found.indices[0].tolist() == [1, 2, 3, 4]
        assert found.indices[79].tolist() == [0, 1, 2, 3]


@needs_triton
def test_rows_without_candidates_weigh_nothing():
    query = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    ids = torch.zeros(9, dtype=torch.long, device=DEVICE)
    options = {"num_neighbors": 3, "temperature": 0.1, "query_ids": ids, "backend": "triton"}
    weights = soft_topk(query, normalization="all", **options).weights
    assert weights.eq(0).all()
    weights.sum().backward()
    assert query.grad.isfinite().all()


@needs_triton
def test_float64_is_refused_rather_than_rounded():
    with pytest.raises(ValueError, match="computes in float32; use backend='tiled' for float64"):
        soft_topk(torch.randn(4, 2).double(), num_neighbors=2, temperature=1.0, backend="triton")


def test_without_triton_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(ranking, "triton", None)
    with pytest.raises(ImportError, match=r"pip install triton, or use backend='tiled'"):
        soft_topk(torch.randn(4, 2), num_neighbors=2, temperature=1.0, backend="triton")
