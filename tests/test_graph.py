"""The ranking graph: every option equals its dense formula, in value and gradient, and propagation is a product."""

import dataclasses
import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from modeling_bpgcn import graph as graph_module
from modeling_bpgcn.graph import RankingGraph, drop_edges, neighbor_sum, segment_sum
from modeling_bpgcn.ranking import Ranking, soft_topk
from tests.model_factory import dense_ranking, random_ranking, tiny_images, tiny_model

SYMMETRIZATIONS = ("none", "mean", "mutual")
NORMALIZATIONS = ("row", "symmetric", "none")
OPTIONS = [
    {"symmetrization": s, "normalization": n, "self_loop": loop, "self_weight": weight}
    for s, n, (loop, weight) in itertools.product(
        SYMMETRIZATIONS, NORMALIZATIONS, [("share", 0.0), ("share", 0.3), ("share", 1.0), ("unit", 0.5)]
    )
]


def name(options: dict) -> str:
    return "-".join(str(value) for value in options.values())


def symmetrized(A: Tensor, symmetrization: str) -> Tensor:
    if symmetrization == "mean":
        return (A + A.T) / 2
    if symmetrization == "mutual":
        return torch.where((A > 0) & (A.T > 0), (A + A.T) / 2, 0.0)
    return A


def normalized(A: Tensor, degree: Tensor, source_degree: Tensor, normalization: str) -> Tensor:
    """As PyG's gcn_norm: the inverse of a degree of 0 is 0."""
    if normalization == "none":
        return A
    rows, sources = (torch.where(d > 0, 1 / torch.where(d > 0, d, 1.0), 0.0) for d in (degree, source_degree))
    if normalization == "row":
        return rows[:, None] * A
    return rows.sqrt()[:, None] * A * sources.sqrt()


def dense_graph(A: Tensor, *, symmetrization: str, normalization: str, self_loop: str, self_weight: float) -> Tensor:
    """The propagation matrix of an adjacency matrix, as the docstring of `from_ranking` says it."""
    eye = torch.eye(len(A), dtype=A.dtype)
    A = symmetrized(A, symmetrization)
    if self_loop == "unit":
        A = A + eye
        return normalized(A, A.sum(-1), A.sum(-1), normalization)
    own = torch.where(A.sum(-1) > 0, self_weight, 1.0)
    return torch.diag(own) + (1 - self_weight) * normalized(A, A.sum(-1), A.sum(-1), normalization)


@pytest.fixture
def ranking() -> Ranking:
    ranking = random_ranking(9, 3)
    return ranking._replace(weights=ranking.weights.requires_grad_())


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_every_graph_equals_its_dense_formula_in_value_and_gradient(options, ranking):
    actual = RankingGraph.from_ranking(ranking, **options).dense()
    expected = dense_graph(dense_ranking(ranking), **options)
    assert_close(actual, expected)
    direction = torch.randn(9, 9, dtype=torch.float64)
    gradients = [torch.autograd.grad(matrix, ranking.weights, direction)[0] for matrix in (actual, expected)]
    # all edges of weight 0 at self_weight 1: then no gradient is right
    assert (gradients[1].abs().max() > 1e-3) == (options["self_loop"] == "unit" or options["self_weight"] < 1)
    assert_close(*gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_propagation_is_the_product_with_the_dense_matrix(options, ranking):
    graph = RankingGraph.from_ranking(ranking, **options)
    state = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(9, 4, dtype=torch.float64)
    outputs = graph.propagate(state), graph.dense() @ state
    assert_close(*outputs)
    gradients = [torch.autograd.grad(y, (state, ranking.weights), direction, retain_graph=True) for y in outputs]
    assert gradients[1][0].abs().max() > 1e-3
    assert_close(gradients[0], gradients[1])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 12),
    k=st.integers(1, 11),
    options=st.sampled_from(OPTIONS),
    zeros=st.floats(0, 1),
)
def test_graphs_of_any_size_and_with_zero_weights_equal_the_formula(seed, size, k, options, zeros):
    torch.manual_seed(seed)
    ranking = random_ranking(size, min(k, size - 1))
    weights = torch.where(torch.rand(ranking.weights.shape) < zeros, 0.0, ranking.weights)
    # an edge of weight 0 is still listed, so `mutual` takes it for one: compare it on positive weights
    weights = ranking.weights if options["symmetrization"] == "mutual" else weights
    graph = RankingGraph.from_ranking(ranking._replace(weights=weights), **options)
    assert_close(graph.dense(), dense_graph(dense_ranking(ranking._replace(weights=weights)), **options))


def test_mean_and_mutual_by_hand():
    # 0 <-> 1 and 2 -> 0
    ranking = Ranking(torch.tensor([[1], [0], [0]]), torch.tensor([[0.4], [0.2], [1.0]]))
    plain = {"normalization": "none", "self_weight": 0.0}
    mean = RankingGraph.from_ranking(ranking, symmetrization="mean", **plain)
    assert_close(mean.dense(), torch.tensor([[0.0, 0.3, 0.5], [0.3, 0.0, 0.0], [0.5, 0.0, 0.0]]))
    assert_close(mean.degree, torch.tensor([0.8, 0.3, 0.5]))
    mutual = RankingGraph.from_ranking(ranking, symmetrization="mutual", **plain)
    assert_close(mutual.dense(), torch.tensor([[0.0, 0.3, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert_close(mutual.degree, torch.tensor([0.3, 0.3, 0.0]))


@pytest.mark.parametrize("symmetrization", SYMMETRIZATIONS)
def test_row_normalised_propagation_keeps_constants(symmetrization, ranking):
    graph = RankingGraph.from_ranking(ranking, symmetrization=symmetrization, self_weight=0.3)
    assert_close(graph.propagate(torch.ones(9, 2, dtype=torch.float64)), torch.ones(9, 2, dtype=torch.float64))


# --- nodes without edges, edges without weight -----------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_a_node_without_edges_keeps_itself_and_all_gradients_are_finite(options):
    indices = torch.tensor([[1, 2], [0, 2], [0, 1], [0, 1]])  # nobody names 3
    weights = torch.rand(4, 2, dtype=torch.float64) + 0.1
    weights[3] = 0.0
    weights.requires_grad_()
    graph = RankingGraph.from_ranking(Ranking(indices, weights), **options)
    state = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    output = graph.propagate(state)
    assert_close(output[3], state[3])
    (output * torch.randn_like(output)).sum().backward()
    assert weights.grad.isfinite().all()
    assert state.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_a_graph_of_zero_weights_gives_finite_gradients(options, dtype):
    weights = torch.zeros(5, 2, dtype=dtype, requires_grad=True)
    graph = RankingGraph.from_ranking(random_ranking(5, 2)._replace(weights=weights), **options)
    state = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    output = graph.propagate(state)
    assert_close(output, state)
    output.square().sum().backward()
    assert weights.grad.abs().max() < 1e3  # and finite
    assert state.grad.isfinite().all()


@pytest.mark.parametrize("symmetrization", SYMMETRIZATIONS)
def test_a_single_node_without_neighbours_keeps_itself(symmetrization):
    ranking = Ranking(torch.empty(1, 0, dtype=torch.long), torch.empty(1, 0))
    state = torch.randn(1, 3)
    graph = RankingGraph.from_ranking(ranking, symmetrization=symmetrization, self_weight=0.3)
    assert_close(graph.propagate(state), state)


# --- queries that read a fixed support -------------------------------------------------------------------------------


@pytest.mark.parametrize("self_loop", ["share", "unit"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("symmetrization", SYMMETRIZATIONS)
def test_queries_read_the_support_by_its_own_degrees(symmetrization, normalization, self_loop):
    ranking = random_ranking(4, 3, M=7)
    support_degree = torch.rand(7, dtype=torch.float64) + 0.5
    graph = RankingGraph.from_ranking(
        ranking,
        symmetrization=symmetrization,  # has no meaning here: the rows of the support do not change
        normalization=normalization,
        self_weight=0.3,
        self_loop=self_loop,
        support_degree=support_degree,
    )
    A, loop = dense_ranking(ranking, 7), float(self_loop == "unit")
    P = normalized(A, A.sum(-1) + loop, support_degree + loop, normalization)
    own = 1 / (A.sum(-1) + 1) if normalization != "none" else torch.ones(4, dtype=torch.float64)
    own, P = (own, P) if self_loop == "unit" else (torch.full_like(own, 0.3), 0.7 * P)
    state, messages = torch.randn(4, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    assert_close(graph.propagate(state, messages), own[:, None] * state + P @ messages)
    assert_close(graph.degree, A.sum(-1))


@pytest.mark.parametrize("self_loop", ["share", "unit"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_node_of_a_directed_graph_attached_to_it_as_a_query_sees_what_it_saw(normalization, self_loop, ranking):
    options = {"normalization": normalization, "self_loop": self_loop}
    whole = RankingGraph.from_ranking(ranking, **options)
    rows = torch.tensor([5, 2])
    query = RankingGraph.from_ranking(
        Ranking(ranking.indices[rows], ranking.weights[rows]), support_degree=whole.degree, **options
    )
    state = torch.randn(9, 4, dtype=torch.float64)
    assert torch.equal(query.propagate(state[rows], state), whole.propagate(state)[rows])


# --- sums over neighbours --------------------------------------------------------------------------------------------


def sum_inputs():
    indices = torch.tensor([[0, 2, 2], [3, 1, 0]])  # row 0 names source 2 twice
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    return indices, weights, torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def test_neighbor_sum_is_a_plain_loop():
    indices, weights, messages = sum_inputs()
    expected = torch.stack([sum(weights[i, j] * messages[indices[i, j]] for j in range(3)) for i in range(2)])
    assert_close(neighbor_sum(indices, weights, messages), expected)
    direction = torch.randn(2, 4, dtype=torch.float64)
    for leaf in (weights, messages):
        gradients = [
            torch.autograd.grad(y, leaf, direction, retain_graph=True)[0]
            for y in (neighbor_sum(indices, weights, messages), expected)
        ]
        assert gradients[1].abs().max() > 1e-3
        assert_close(*gradients)


def test_neighbor_sum_has_first_and_second_derivatives():
    indices, weights, messages = sum_inputs()
    assert gradcheck(lambda w, m: neighbor_sum(indices, w, m), (weights, messages))
    assert gradgradcheck(lambda w, m: neighbor_sum(indices, w, m), (weights, messages))


def test_neighbor_sum_differentiates_what_needs_it():
    indices, weights, messages = sum_inputs()
    for w, m in ((weights, messages.detach()), (weights.detach(), messages)):
        (leaf,) = (x for x in (w, m) if x.requires_grad)
        assert gradcheck(lambda x: neighbor_sum(indices, *((x, m) if leaf is w else (w, x))), (leaf,))  # noqa: B023
    assert not neighbor_sum(indices, weights.detach(), messages.detach()).requires_grad


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5], OPTIONS[19], OPTIONS[27]], ids=name)
def test_gradcheck_of_a_propagation_step(options):
    indices, weights = random_ranking(5, 2)

    def step(weights, state):
        return RankingGraph.from_ranking(Ranking(indices, weights), **options).propagate(state)

    inputs = weights.requires_grad_(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(step, inputs)
    assert gradgradcheck(step, inputs)


def test_half_precision_states_are_summed_in_the_weights_precision():
    ranking = random_ranking(30, 5, dtype=torch.float32)
    graph = RankingGraph.from_ranking(ranking)
    state = torch.randn(30, 4).bfloat16()
    assert graph.propagate(state).dtype == torch.bfloat16
    assert torch.equal(graph.propagate(state), graph.propagate(state.float()).bfloat16())


# --- attention weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetrization", SYMMETRIZATIONS)
@pytest.mark.parametrize("self_weight", [0.0, 0.4])
def test_attention_is_a_softmax_with_the_edges_as_prior(symmetrization, self_weight, ranking):
    graph = RankingGraph.from_ranking(ranking, symmetrization=symmetrization, self_weight=self_weight)
    target, source = torch.randn(2, 9, dtype=torch.float64).unbind()
    source.requires_grad_()
    attention = graph.attention(target, source, source, slope=0.2).dense()
    scores = torch.nn.functional.leaky_relu(target[:, None] + source[None, :], 0.2)
    expected = graph.dense() * scores.exp()
    expected = expected / expected.sum(-1, keepdim=True)
    assert_close(attention, expected)
    assert_close(attention.sum(-1), torch.ones(9, dtype=torch.float64))
    leaves, direction = (source, ranking.weights), torch.randn(9, 9, dtype=torch.float64)
    gradients = [torch.autograd.grad(matrix, leaves, direction, retain_graph=True) for matrix in (attention, expected)]
    assert all(g.abs().max() > 1e-3 for g in gradients[1])
    assert_close(gradients[0], gradients[1])


def test_attention_to_large_scores_and_to_no_edge_is_finite():
    weights = torch.zeros(4, 2, dtype=torch.float64)
    weights[0] = 0.5
    weights.requires_grad_()
    graph = RankingGraph.from_ranking(random_ranking(4, 2)._replace(weights=weights), self_weight=0.0)
    score = 1e4 * torch.randn(4, dtype=torch.float64)
    attention = graph.attention(score, score, score, slope=0.2)
    assert_close(attention.dense().sum(-1), torch.ones(4, dtype=torch.float64))
    attention.dense().square().sum().backward()
    assert weights.grad.isfinite().all()


# --- irregular sums: native and torch-scatter ------------------------------------------------------------------------


def test_segment_sum_is_a_plain_loop():
    values, index = torch.randn(5, 2, dtype=torch.float64), torch.tensor([2, 0, 2, 2, 0])
    expected = torch.stack([values[index == i].sum(0) for i in range(4)])
    assert_close(segment_sum(values, index, 4), expected)


def compare_backends() -> None:
    results = []
    for backend in ("native", "scatter"):
        torch.manual_seed(1)
        ranking = random_ranking(9, 3)
        weights = ranking.weights.requires_grad_()
        state = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
        graph = RankingGraph.from_ranking(ranking, symmetrization="mean", normalization="symmetric", backend=backend)
        attention = graph.attention(state[:, 0], state[:, 1], state[:, 1], slope=0.2)
        output = attention.propagate(graph.propagate(state))
        results.append([output, *torch.autograd.grad(output.square().sum(), (weights, state))])
    assert all(gradient.abs().max() > 1e-3 for gradient in results[0][1:])
    assert_close(results[0], results[1])


@pytest.mark.skipif(graph_module.torch_scatter is None, reason="torch-scatter is not installed")
def test_torch_scatter_gives_the_native_result():
    compare_backends()


def test_a_back_end_of_torch_scatters_signature_gives_the_native_result(monkeypatch):
    def scatter_add(src, index, dim=-1, out=None, dim_size=None):
        shape = [dim_size if d == dim else size for d, size in enumerate(src.shape)]
        index = index.view([-1] + [1] * (src.ndim - 1)).expand_as(src)
        return src.new_zeros(shape).scatter_add(dim, index, src)

    monkeypatch.setattr(graph_module, "torch_scatter", types.SimpleNamespace(scatter_add=scatter_add))
    compare_backends()


def test_without_torch_scatter_its_back_end_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(graph_module, "torch_scatter", None)
    with pytest.raises(ImportError, match="needs torch-scatter: pip install torch-scatter --no-build-isolation"):
        RankingGraph.from_ranking(random_ranking(5, 2), symmetrization="mean", backend="scatter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetrization": "max"}, "symmetrization='max' is unknown: choose none, mean or mutual"),
        ({"normalization": "column"}, "normalization='column' is unknown: choose row, symmetric or none"),
        ({"self_loop": "none"}, "self_loop='none' is unknown: choose share or unit"),
        ({"symmetrization": "mean", "backend": "cuda"}, "backend='cuda' is unknown: choose native or scatter"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RankingGraph.from_ranking(random_ranking(5, 2), **options)


@pytest.mark.parametrize("normalization", ["row", "symmetric", "none"])
def test_a_symmetrised_graph_adds_up_the_same_by_rows_as_edge_by_edge(normalization):
    features = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ranking = soft_topk(features, num_neighbors=3, temperature=0.5)
    graph = RankingGraph.from_ranking(ranking, symmetrization="mean", normalization=normalization)
    results = []
    for form in (graph, dataclasses.replace(graph, ranked=None)):
        out = form.propagate(features, features.square())
        (first,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), features, retain_graph=True)
        results.append((out, first, second))
    for fast, slow in zip(*results, strict=True):
        assert slow.abs().sum() > 0
        assert_close(fast, slow)


# --- dropped edges ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.0, 0.95))
def test_dropped_edges_leave_the_others_their_proportions_and_the_row_its_sum(seed, k, rate):
    torch.manual_seed(seed)
    ranking = random_ranking(8, k)
    dropped = drop_edges(ranking, rate)
    assert torch.equal(dropped.indices, ranking.indices)
    for before, after in zip(ranking.weights, dropped.weights, strict=True):
        kept = after > 0
        if kept.any():
            assert_close(after[kept], before[kept] * before.sum() / before[kept].sum())
        if rate == 0:
            assert kept.all()


def test_so_many_edges_are_dropped_as_the_rate_says_and_others_each_time():
    ranking = random_ranking(400, 20)
    dropped = [(drop_edges(ranking, 0.3).weights == 0) for _ in range(2)]
    assert dropped[0].double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(*dropped)


def test_the_gradient_of_dropped_edges_is_that_of_the_renormalised_rest():
    ranking = random_ranking(9, 4)
    weights = ranking.weights.requires_grad_()
    readout = torch.randn(9, 4, dtype=torch.float64)
    torch.manual_seed(3)
    dropped = drop_edges(ranking, 0.4).weights
    [gradient] = torch.autograd.grad((dropped * readout).sum(), weights)
    kept = dropped.detach() > 0
    assert gradient[kept].abs().max() > 1e-3

    def rest(w):
        torch.manual_seed(3)
        return (drop_edges(ranking._replace(weights=w), 0.4).weights * readout).sum()

    assert gradcheck(rest, weights)
    plain = weights * kept * (weights.sum(-1) / (weights * kept).sum(-1).clamp_min(1e-12))[:, None]
    assert_close(gradient, torch.autograd.grad((plain * readout).sum(), weights)[0])


def test_edges_are_dropped_in_training_alone():
    torch.manual_seed(0)
    images, model = tiny_images(10), tiny_model(edge_dropout=0.5)
    trained = [model.train()(pixel_values=images, support="batch").logits for _ in range(2)]
    assert (trained[0] - trained[1]).abs().max() > 1e-3
    answers = [model.eval()(pixel_values=images, support="batch").logits for _ in range(2)]
    assert torch.equal(*answers)
    model.config.edge_dropout = 0.0
    assert torch.equal(model(pixel_values=images, support="batch").logits, answers[0])
    assert torch.equal(model.train()(pixel_values=images, support="batch").logits, answers[0])


# --- queries that nobody reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_symmetrisation_adds_no_edge_back_from_a_query(normalization):
    Q, N = 3, 9
    ranking = random_ranking(N, 2, N - Q)
    ranking = ranking._replace(indices=ranking.indices + Q)  # among the others alone
    options = {"symmetrization": "mean", "normalization": normalization, "self_weight": 0.3, "num_queries": Q}
    matrix = RankingGraph.from_ranking(ranking, **options).dense()
    A = dense_ranking(ranking) / 2
    A = A + torch.cat([torch.zeros(Q, N), A[Q:]]).T
    own = torch.where(A.sum(-1) > 0, 0.3, 1.0)
    expected = torch.diag(own) + 0.7 * normalized(A, A.sum(-1), A.sum(-1), normalization)
    assert_close(matrix, expected.double())
    assert (matrix[Q:, :Q] == 0).all()
    assert (matrix[:Q, Q:] > 0).any(-1).all()
