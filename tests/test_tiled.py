"""The tiled soft top-k is the dense one: value, first and second derivative, forward mode, ties, masks, memory."""

import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from modeling_bpgcn import tiled
from modeling_bpgcn.ranking import LOCAL, RELAXATIONS, WITH_TOTAL, similarity, soft_topk

PATHS = [(name, "selected") for name in LOCAL] + [(name, "all") for name in WITH_TOTAL]
METRICS = ("cosine", "euclidean")


@pytest.fixture(params=[(8, 4), (8, 3), (64, 4)], ids=["tiles of 8", "uneven blocks", "one tile"])
def small_tiles(request, monkeypatch):
    """Tiles that the sizes of the tests do not divide by."""
    monkeypatch.setattr(tiled, "TILE", request.param[0])
    monkeypatch.setattr(tiled, "BLOCK", request.param[1])


def both(query, key, **options):
    return [soft_topk(query, key, backend=backend, **options) for backend in ("dense", "tiled")]


def leaves(N: int, M: int | None, D: int, tau: float, dtype=torch.float64):
    """query, key (None: among themselves) and temperature that need a gradient."""
    query = torch.randn(N, D, dtype=dtype, requires_grad=True)
    key = None if M is None else torch.randn(M, D, dtype=dtype, requires_grad=True)
    return query, key, torch.tensor(tau, dtype=dtype, requires_grad=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("relaxation", "normalization"), PATHS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("M", [None, 13])
@pytest.mark.parametrize("ids", ["none", "unique", "repeated"])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_values_and_gradients_are_those_of_the_dense_form(relaxation, normalization, metric, M, ids, tau):
    query, key, temperature = leaves(21, M, 3, tau)
    options = {"relaxation": relaxation, "normalization": normalization, "metric": metric, "num_neighbors": 4}
    options |= {"temperature": temperature, "exclude_self": ids != "none"}
    if ids == "repeated":
        options |= {"query_ids": torch.arange(21) % 15, "key_ids": None if M is None else torch.arange(M) % 11}
    dense, tile = both(query, key, **options)
    assert torch.equal(dense.indices[dense.weights > 0], tile.indices[tile.weights > 0])
    assert_close(tile.weights, dense.weights, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(dense.weights)
    inputs = [leaf for leaf in (query, key, temperature) if leaf is not None]
    expected = torch.autograd.grad(dense.weights, inputs, upstream)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for got, gradient in zip(torch.autograd.grad(tile.weights, inputs, upstream), expected, strict=True):
        assert_close(got, gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_keys_without_gradient_leave_the_querys_as_it_is(normalization):
    query, key, _ = leaves(10, 12, 3, 1.0)
    options = {"num_neighbors": 3, "temperature": 0.3, "normalization": normalization}
    upstream = torch.randn(10, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(soft_topk(query, key, backend="tiled", **options).weights, query, upstream)
    (got,) = torch.autograd.grad(soft_topk(query, key.detach(), backend="tiled", **options).weights, query, upstream)
    assert got.abs().sum() > 0
    assert_close(got, expected)


SMOOTH = itertools.product(["dense"], ["softmax", "threshold", "lapsum", "entmax", "sparsemax"], ["all", "selected"])
SMOOTH = [*SMOOTH, *(("tiled", *path) for path in PATHS if path[0] != "straight_through")]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("backend", "relaxation", "normalization"), SMOOTH)
@settings(max_examples=5, deadline=None)
@given(
    among=st.booleans(),
    exclude=st.booleans(),
    N=st.integers(2, 6),
    D=st.integers(1, 3),
    k=st.sampled_from(["one", "some", "all"]),
    tau=st.integers(0, 100).map(lambda n: 0.01 * 1000 ** (n / 100)),  # 0.01 to 10
    near=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_derivative_is_right(
    backend, relaxation, normalization, metric, among, exclude, N, D, k, tau, near, seed
):
    torch.manual_seed(seed)
    M = N if among else 5
    # features so near each other that their scores differ by about tau, or at any distance, where few weights are soft
    spread = min(1.0, tau**0.5) if near else 1.0
    # what is differentiated: the features in steps that change the scores by tau, and tau as a multiple of itself, so
    # that the derivatives of every order are about 1 whatever tau is and finite differences of one step are exact
    unit = min(1.0, tau / spread)
    points = (metric == "cosine") + spread * torch.randn(N if among else N + M, D, dtype=torch.float64)
    inputs = ((points / unit).requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True))
    options = {"relaxation": relaxation, "normalization": normalization, "metric": metric, "exclude_self": exclude}
    options |= {"num_neighbors": {"one": 1, "some": (M + 1) // 2, "all": M}[k], "backend": backend}
    if exclude and not among:
        options |= {"query_ids": torch.arange(N), "key_ids": torch.arange(M) + 2}

    def weights(points, multiple):
        query, key = (points * unit, None) if among else (points * unit).split((N, M))
        return soft_topk(query, key, temperature=multiple * tau, **options).weights

    # cosines of numbers are signs: all tied, and constant
    assume((metric == "cosine" and D == 1) or far_from_a_change_of_neighbors(points, None if among else N, metric, tau))
    with mock.patch.multiple(tiled, TILE=4, BLOCK=3):
        # along random directions where a value takes 60 passes, else every entry
        fast = relaxation == "lapsum"
        assert gradcheck(weights, inputs, check_forward_ad=True, fast_mode=fast)
        assert gradgradcheck(weights, inputs, check_fwd_over_rev=True, fast_mode=fast)


def far_from_a_change_of_neighbors(points, queries, metric, tau) -> bool:
    """Whether no two scores of a row are closer than what the steps of finite differences can bridge."""
    scores = similarity(points[:queries], points[queries:] if queries else points, metric)
    return bool((scores.sort().values.diff() > 1e-4 * tau).all())


@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_a_hessian_vector_product_equals_finite_differences(normalization):
    query = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(query)

    def gradient(x):
        weights = soft_topk(x, num_neighbors=3, temperature=0.4, normalization=normalization, backend="tiled").weights
        return torch.autograd.grad((weights * torch.arange(3)).square().sum(), x, create_graph=True)[0]

    (product,) = torch.autograd.grad((gradient(query) * direction).sum(), query)
    assert product.abs().max() > 1e-3
    step = 1e-5
    ahead, behind = ((query + sign * step * direction).detach().requires_grad_() for sign in (1, -1))
    assert_close(product, (gradient(ahead) - gradient(behind)) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_the_third_derivative_is_that_of_the_dense_form(normalization):
    x, direction, upstream = (torch.randn(10, n, dtype=torch.float64) for n in (3, 3, 4))

    def along(step, backend):
        options = {"num_neighbors": 4, "temperature": 0.5 + step, "normalization": normalization, "backend": backend}
        return (soft_topk(x + step * direction, **options).weights * upstream).sum()

    third = torch.func.grad(torch.func.grad(torch.func.grad(along)))
    zero = torch.zeros((), dtype=torch.float64)
    assert third(zero, "dense").abs() > 1e-3
    assert_close(third(zero, "tiled"), third(zero, "dense"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_equal_scores_are_broken_the_same_way_everywhere(metric, normalization):
    # whole numbers about a mean that binary fractions hold: ties are exact on every path, in any order of summation
    query = torch.randint(-1, 2, (32, 2), generator=torch.Generator().manual_seed(1)).double()
    query[5:9] = query[0]
    query[11] = 0
    query = query.requires_grad_()
    options = {"num_neighbors": 6, "temperature": 0.2, "metric": metric, "normalization": normalization}
    dense, tile = both(query, None, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: soft_topk(x, backend="dense", **options), backend="aot_eager")(query)
    equal = dense.weights[:, 1:] == dense.weights[:, :-1]
    assert equal.any(), "no ties"
    assert (dense.indices[:, 1:] > dense.indices[:, :-1])[equal].all()
    for ranking in (dense, tile, compiled):
        assert torch.equal(ranking.indices, dense.indices)
        assert_close(ranking.weights, dense.weights)
        (gradient,) = torch.autograd.grad(ranking.weights.square().sum(), query, create_graph=ranking is not compiled)
        assert gradient.isfinite().all()
        if ranking is not compiled:
            assert torch.autograd.grad(gradient.square().sum(), query)[0].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_all_rows_alike():
    query = torch.ones(20, 3, requires_grad=True)
    dense, tile = both(query, None, num_neighbors=3, temperature=0.1)
    assert torch.equal(dense.indices, tile.indices)
    assert dense.indices[0].tolist() == [1, 2, 3]
    tile.weights.square().sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("relaxation", "normalization"), PATHS)
def test_rows_without_candidates_weigh_nothing(relaxation, normalization):
    query = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(9, dtype=torch.long)
    ids[7:] = 1
    options = {"num_neighbors": 4, "temperature": 0.2, "relaxation": relaxation, "normalization": normalization}
    dense, tile = both(query, None, query_ids=ids, **options)
    assert_close(tile.weights, dense.weights)
    assert (tile.weights[:7] > 0).sum(1).eq(2).all()
    _, alone = both(query, None, query_ids=torch.zeros_like(ids), **options)
    assert alone.weights.eq(0).all()
    upstream = torch.randn_like(tile.weights)
    curvatures = []
    for weights in (dense.weights, tile.weights + alone.weights):
        (gradient,) = torch.autograd.grad((weights * upstream).sum(), query, create_graph=True)
        assert gradient.isfinite().all()
        curvatures.append(torch.autograd.grad(gradient.square().sum(), query)[0])
    assert curvatures[0].abs().max() > 1e-3
    assert_close(curvatures[1], curvatures[0])


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
@pytest.mark.parametrize(("relaxation", "normalization"), PATHS)
def test_in_float32_it_is_as_exact_as_the_dense_form(tau, relaxation, normalization):
    exact = torch.randn(500, 48, dtype=torch.float64)
    options = {"num_neighbors": 10, "temperature": tau, "relaxation": relaxation, "normalization": normalization}
    upstream = torch.randn(500, 10, dtype=torch.float64)

    def run(x, backend):
        x = x.clone().requires_grad_()
        weights = soft_topk(x, backend=backend, **options).weights
        return weights.detach().double(), torch.autograd.grad(weights, x, upstream.to(x.dtype))[0].double()

    reference = run(exact, "dense")
    errors = {
        b: [float((a - r).norm()) for a, r in zip(run(exact.float(), b), reference, strict=True)]
        for b in ("dense", "tiled")
    }
    assert reference[1].norm() > 0
    for ours, theirs, truth in zip(errors["tiled"], errors["dense"], reference, strict=True):
        assert ours <= 2 * theirs + 1e-7 * float(truth.norm())


def test_sharp_temperatures_do_not_underflow():
    query = torch.randn(40, 8, dtype=torch.float64)
    for tau in (1e-3, 1e-2, 10.0):
        dense, tile = both(query, None, num_neighbors=3, temperature=tau, normalization="all")
        assert tile.weights.isfinite().all()
        assert_close(tile.weights, dense.weights, rtol=1e-9, atol=1e-12)


def test_half_precision_is_ranked_in_float32():
    x = torch.randn(64, 16)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        for normalization in ("all", "selected"):
            options = {"num_neighbors": 5, "temperature": 0.1, "normalization": normalization, "backend": "tiled"}
            assert torch.equal(soft_topk(half, **options).indices, soft_topk(half.float(), **options).indices)
            assert soft_topk(half, **options).weights.dtype == torch.float32


def test_what_has_no_tiled_path_says_so():
    with pytest.raises(ValueError, match=r"backend='tiled' has no relaxation='entmax'.*backend='dense'"):
        soft_topk(torch.randn(4, 2), num_neighbors=2, temperature=1.0, relaxation="entmax", backend="tiled")
    with pytest.raises(ValueError, match="backend='sparse' is unknown: choose one of auto, dense, tiled"):
        soft_topk(torch.randn(4, 2), num_neighbors=2, temperature=1.0, backend="sparse")


def test_auto_takes_tiles_when_the_matrix_is_large(monkeypatch):
    from modeling_bpgcn import ranking

    x = torch.randn(64, 4)
    chosen = []
    for limit in (64 * 64, 64 * 64 - 1):
        monkeypatch.setattr(ranking, "DENSE_SCORES", limit)
        chosen.append(ranking._choose("auto", 64, 64, "softmax", "all"))
        soft_topk(x, num_neighbors=3, temperature=0.1)
    assert chosen == ["dense", "tiled"]


MEMORY = """
import resource, torch
from modeling_bpgcn.ranking import soft_topk
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = torch.randn(64, 16, requires_grad=True)
options = {{"temperature": 0.1, "normalization": "{normalization}", "backend": "tiled"}}
soft_topk(small, num_neighbors=3, **options).weights.sum().backward()
x = torch.randn({N}, 16, requires_grad=True)
before = peak()
soft_topk(x, num_neighbors=10, **options).weights.sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_the_scores_are_never_held_at_once(normalization):
    N = 10_000  # 400 MB of scores
    script = MEMORY.format(N=N, normalization=normalization)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 128


def test_exclusions_are_the_pairs_with_one_id(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 4)
    query_ids, key_ids = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([1, 5, 9, 2, 6, 5, 3, 5, 1, 1])
    found = tiled.find_exclusions(query_ids, key_ids)
    pairs = sorted(zip(found.rows.tolist(), found.columns.tolist(), strict=True))
    assert pairs == [(i, j) for i, j in itertools.product(range(6), range(10)) if query_ids[i] == key_ids[j]]


@pytest.mark.parametrize(("relaxation", "normalization"), PATHS)
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("M", [None, 30])
def test_it_compiles_without_a_graph_break(relaxation, normalization, backend, M):
    query, key, temperature = leaves(40, M, 8, 0.2, torch.float32)
    options = {"num_neighbors": 4, "relaxation": relaxation, "normalization": normalization, "backend": backend}

    def weights(query, temperature):
        return soft_topk(query, key, temperature=temperature, **options).weights

    torch._dynamo.reset()
    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")(query, temperature)
    plain, upstream = weights(query, temperature), torch.randn(40, 4)
    assert_close(compiled, plain)
    inputs = [leaf for leaf in (query, key, temperature) if leaf is not None]
    expected = torch.autograd.grad(plain, inputs, upstream)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for got, gradient in zip(torch.autograd.grad(compiled, inputs, upstream), expected, strict=True):
        assert_close(got, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_forward_mode_of_torch_func_agrees_with_backward_mode(normalization, backend):
    x, direction = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)

    def weights(x):
        return soft_topk(x, num_neighbors=3, temperature=0.3, normalization=normalization, backend=backend).weights

    value, tangent = torch.func.jvp(weights, (x,), (direction,))
    upstream = torch.randn_like(value)
    (gradient,) = torch.func.vjp(weights, x)[1](upstream)
    assert tangent.abs().max() > 0
    assert_close((upstream * tangent).sum(), (gradient * direction).sum())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("M", [None, 5])
@pytest.mark.parametrize(("backend", "relaxation", "normalization"), SMOOTH)
def test_torch_funcs_derivatives_are_those_of_autograd(backend, relaxation, normalization, metric, M, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 4)
    query, key, tau = leaves(6, M, 2, 0.4 if metric == "cosine" else 4.0)
    options = {"relaxation": relaxation, "normalization": normalization, "metric": metric, "num_neighbors": 3}
    upstream = torch.randn(6, 3, dtype=torch.float64)

    def weights(x):
        return soft_topk(x, key, temperature=tau, backend=backend, **options).weights

    def loss(x):
        return (weights(x) * upstream).sum()

    jacobian = torch.autograd.functional.jacobian(weights, query)
    assert jacobian.abs().max() > 1e-3
    assert_close(torch.func.jacrev(weights)(query), jacobian)
    assert_close(torch.func.jacfwd(weights)(query), jacobian)
    hessian = torch.autograd.functional.hessian(loss, query)
    if (relaxation, metric, M) != ("sparsemax", "euclidean", 5):  # piecewise linear in the query
        assert hessian.abs().max() > 1e-3
    assert_close(torch.func.hessian(loss)(query), hessian)
    assert_close(torch.func.jacrev(torch.func.grad(loss))(query), hessian)


LOOPED = list(itertools.product(["dense"], RELAXATIONS, ["all", "selected"])) + [("tiled", *path) for path in PATHS]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("given", ["query", "keys", "ids"])
@pytest.mark.parametrize(("backend", "relaxation", "normalization"), LOOPED)
def test_vmap_is_a_loop(backend, relaxation, normalization, given, metric, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 4)
    batch = {"query": torch.randn(4, 7, 2, dtype=torch.float64)}
    batch |= {"temperature": torch.tensor([0.2, 0.5, 1.0, 2.0], dtype=torch.float64)}
    if given != "query":
        batch |= {"key": torch.randn(4, 9, 2, dtype=torch.float64)}
    if given == "ids":
        batch |= {"query_ids": torch.randint(0, 5, (4, 7)), "key_ids": torch.randint(0, 5, (4, 9))}
    options = {"relaxation": relaxation, "normalization": normalization, "metric": metric, "backend": backend}
    upstream = torch.randn(7, 3, dtype=torch.float64)

    def rank(inputs):
        return soft_topk(**inputs, num_neighbors=3, **options)

    def gradients(inputs):
        features = {name: x for name, x in inputs.items() if x.is_floating_point()}
        return torch.func.grad(lambda x: (rank(inputs | x).weights * upstream).sum())(features)

    def seeded(function, inputs):
        torch.manual_seed(0)  # gumbel: one draw for all
        return function(inputs)

    elements = [{name: x[b] for name, x in batch.items()} for b in range(4)]
    ranking = seeded(torch.func.vmap(rank, randomness="same"), batch)
    expected = [seeded(rank, element) for element in elements]
    assert torch.equal(ranking.indices, torch.stack([e.indices for e in expected]))
    assert_close(ranking.weights, torch.stack([e.weights for e in expected]))
    found = seeded(torch.func.vmap(gradients, randomness="same"), batch)
    expected = [seeded(gradients, element) for element in elements]
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        assert_close(gradient, torch.stack([e[name] for e in expected]))


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_vmap_breaks_ties_as_a_loop_does(backend):
    # whole numbers: products are exact, and most are tied
    points = torch.randint(0, 2, (5, 16, 2)).double()

    def indices(x):
        return soft_topk(x, num_neighbors=4, temperature=0.5, metric="euclidean", backend=backend).indices

    assert torch.equal(torch.func.vmap(indices)(points), torch.stack([indices(x) for x in points]))


@pytest.mark.parametrize(("relaxation", "alike"), [("gumbel", False), ("gumbel_mean", True)])
def test_only_gumbel_differs_between_the_elements_of_vmap(relaxation, alike):
    query = torch.randn(6, 3)

    def weights(temperature):
        return soft_topk(query, num_neighbors=3, temperature=temperature, relaxation=relaxation).weights

    first, second = torch.func.vmap(weights, randomness="different")(torch.full((2,), 0.5))
    assert torch.equal(first, second) == alike
