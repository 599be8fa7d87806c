"""Heads: each equals its formula written out with a dense matrix, and PyG's layer with the same weights and graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch_geometric.nn import APPNP, ARMAConv, GATConv, GCNConv, SGConv

from modeling_bpgcn.graph import RankingGraph
from modeling_bpgcn.heads import HEADS, GATLayer, LabelPropagation
from modeling_bpgcn.ranking import Ranking
from tests.model_factory import CLASSES, dense_ranking, random_ranking, tiny_config

N = 9
GRAPHS = {
    "directed, rows": {"self_weight": 0.3},
    "directed, symmetric": {"normalization": "symmetric", "self_weight": 0.3},
    "directed, unit": {"normalization": "symmetric", "self_loop": "unit"},
    "mean, symmetric": {"symmetrization": "mean", "normalization": "symmetric", "self_weight": 0.0},
    "mean, unit": {"symmetrization": "mean", "normalization": "symmetric", "self_loop": "unit"},
    "mutual, raw": {"symmetrization": "mutual", "normalization": "none", "self_weight": 0.3},
}


def make_head(name: str, **overrides) -> nn.Module:
    """In float64, every parameter drawn: a head alone has no `_init_weights`."""
    head = HEADS[name](tiny_config(**overrides)).double().eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


@pytest.fixture
def ranking() -> Ranking:
    ranking = random_ranking(N, 3)
    return ranking._replace(weights=ranking.weights.requires_grad_())


@pytest.fixture
def features() -> Tensor:
    return torch.randn(N, 8, dtype=torch.float64, requires_grad=True)


# --- dense oracles ---------------------------------------------------------------------------------------------------


def dense_gcn(head, x: Tensor, P: Tensor) -> Tensor:
    first, second = head.layers
    hidden = F.relu(P @ x @ first.weight.T + first.bias)
    return P @ hidden @ second.weight.T + second.bias


def dense_sgc(head, x: Tensor, P: Tensor) -> Tensor:
    return P @ (P @ x) @ head.linear.weight.T + head.linear.bias


def dense_appnp(head, x: Tensor, P: Tensor) -> Tensor:
    first, second = head.layers
    h = F.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
    z = h
    for _ in range(3):
        z = 0.9 * P @ z + 0.1 * h
    return z


def dense_gat_layer(layer: GATLayer, x: Tensor, P: Tensor) -> Tensor:
    outputs = []
    for z, source, target in zip(
        layer._split(x @ layer.linear.weight.T), layer.source_attention, layer.target_attention, strict=True
    ):
        alpha = P * F.leaky_relu((z @ target)[:, None] + (z @ source)[None, :], 0.2).exp()
        outputs.append(alpha / alpha.sum(-1, keepdim=True) @ z)
    return (torch.cat(outputs, -1) if layer.concatenate else sum(outputs) / len(outputs)) + layer.bias


def dense_gat(head, x: Tensor, P: Tensor) -> Tensor:
    first, second = head.layers
    return dense_gat_layer(second, F.elu(dense_gat_layer(first, x, P)), P)


def dense_arma(head, x: Tensor, P: Tensor) -> Tensor:
    stacks = []
    for k in range(2):
        state = x
        for layer in head.layers:
            state = F.relu(P @ state @ layer.weight[k] + x @ layer.root_weight[k] + layer.bias[k])
        stacks.append(state)
    return (stacks[0] + stacks[1]) / 2 @ head.linear.weight.T + head.linear.bias


def dense_linear(head, x: Tensor, P: Tensor) -> Tensor:
    return x @ head.linear.weight.T + head.linear.bias


DENSE = {
    "gcn": dense_gcn,
    "sgc": dense_sgc,
    "appnp": dense_appnp,
    "gat": dense_gat,
    "arma": dense_arma,
    "linear": dense_linear,
}


def test_every_head_has_a_dense_oracle():
    assert set(DENSE) == set(HEADS)


@pytest.mark.parametrize("graph_name", GRAPHS)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_equals_its_dense_formula_in_value_and_every_gradient(name, graph_name, ranking, features):
    head = make_head(name)
    graph = RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    actual, _ = head(features, graph)
    expected = DENSE[name](head, features, graph.dense())
    assert actual.shape == (N, CLASSES)
    assert_close(actual, expected)
    leaves = {"features": features} | dict(head.named_parameters())
    if name != "linear":
        leaves["edge weights"] = ranking.weights
    direction = torch.randn_like(expected)
    gradients = [
        dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), direction, retain_graph=True), strict=True))
        for y in (actual, expected)
    ]
    for leaf, gradient in gradients[1].items():
        assert gradient.abs().max() > 1e-5, leaf
    assert_close(gradients[0], gradients[1])


def test_the_linear_head_reads_no_neighbour(ranking, features):
    scores, _ = make_head("linear")(features, RankingGraph.from_ranking(ranking))
    assert torch.autograd.grad(scores.sum(), ranking.weights, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ["gcn", "appnp", "gat", "arma"])
@pytest.mark.parametrize("depth", [1, 3])
def test_depth_and_width_follow_the_config(name, depth, ranking, features):
    head = make_head(name, head_num_layers=depth, head_hidden_size=10)
    assert len(head.layers) == depth
    scores, _ = head(features, RankingGraph.from_ranking(ranking))
    assert scores.shape == (N, CLASSES)
    assert (10 in {size for p in head.parameters() for size in p.shape}) == (depth > 1 or name == "arma")


@pytest.mark.parametrize("name", HEADS)
def test_dropout_is_drawn_in_training_only(name, ranking, features):
    head, graph = make_head(name, head_dropout=0.5), RankingGraph.from_ranking(ranking)
    assert torch.equal(head(features, graph)[0], head(features, graph)[0])
    head.train()
    assert not torch.equal(head(features, graph)[0], head(features, graph)[0])


# --- PyG's layers ----------------------------------------------------------------------------------------------------


def pyg_edges(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix[i, j] weighs the edge j -> i."""
    target, source = matrix.nonzero().T
    return torch.stack([source, target]), matrix[target, source]


def copied(convolution: nn.Module, **weights: Tensor) -> nn.Module:
    """The PyG layer with our weights; every parameter must be given."""
    parameters = dict(convolution.named_parameters())
    assert set(parameters) == set(weights)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value.view_as(parameters[name]))
    return convolution


@pytest.mark.parametrize("graph_name", GRAPHS)
def test_gcn_equals_pyg(graph_name, ranking, features):
    head, graph = make_head("gcn"), RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    first, second = (
        copied(
            GCNConv(layer.in_features, layer.out_features, normalize=False, add_self_loops=False).double(),
            **{"lin.weight": layer.weight, "bias": layer.bias},
        )
        for layer in head.layers
    )
    edges = pyg_edges(graph.dense())
    assert_close(head(features, graph)[0], second(F.relu(first(features, *edges)), *edges))


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_the_unit_loop_with_symmetric_normalisation_is_pygs_own(symmetrization, ranking, features):
    head = make_head("gcn", head_num_layers=1)
    options = {"symmetrization": symmetrization, "normalization": "symmetric", "self_loop": "unit"}
    layer = head.layers[0]
    convolution = copied(GCNConv(8, CLASSES).double(), **{"lin.weight": layer.weight, "bias": layer.bias})
    A = dense_ranking(ranking)
    edges = pyg_edges((A + A.T) / 2 if symmetrization == "mean" else A)
    assert_close(head(features, RankingGraph.from_ranking(ranking, **options))[0], convolution(features, *edges))


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_sgc_equals_pyg(symmetrization, ranking, features):
    # SGConv normalises by itself: hand it the raw graph
    head = make_head("sgc", head_num_layers=3)
    options = {"symmetrization": symmetrization, "normalization": "symmetric", "self_loop": "unit"}
    weights = {"lin.weight": head.linear.weight, "lin.bias": head.linear.bias}
    convolution = copied(SGConv(8, CLASSES, K=3).double(), **weights)
    A = dense_ranking(ranking)
    edges = pyg_edges((A + A.T) / 2 if symmetrization == "mean" else A)
    assert_close(head(features, RankingGraph.from_ranking(ranking, **options))[0], convolution(features, *edges))


@pytest.mark.parametrize("graph_name", GRAPHS)
def test_appnp_equals_pyg(graph_name, ranking, features):
    head = make_head("appnp", head_propagation_steps=4, head_teleport=0.2)
    graph = RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    convolution = APPNP(K=4, alpha=0.2, normalize=False, add_self_loops=False)
    hidden = head.layers[1](F.relu(head.layers[0](features)))
    assert_close(head(features, graph)[0], convolution(hidden, *pyg_edges(graph.dense())))


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_arma_equals_pyg(symmetrization, ranking, features):
    # ARMAConv normalises symmetrically, without self-loops
    head = make_head("arma", head_num_layers=3, head_num_stacks=2)
    options = {"symmetrization": symmetrization, "normalization": "symmetric", "self_weight": 0.0}
    convolution = copied(
        ARMAConv(8, 8, num_stacks=2, num_layers=3).double(),
        init_weight=head.layers[0].weight,
        weight=torch.stack([layer.weight for layer in head.layers[1:]]),
        root_weight=torch.stack([layer.root_weight for layer in head.layers]),
        bias=torch.stack([layer.bias for layer in head.layers]),
    )
    A = dense_ranking(ranking)
    edges = pyg_edges((A + A.T) / 2 if symmetrization == "mean" else A)
    filtered, _ = head.filter(features, RankingGraph.from_ranking(ranking, **options))
    assert filtered.abs().max() > 1e-2
    assert_close(filtered, convolution(features, *edges))


def test_gat_equals_pyg_on_uniform_edges(features):
    indices, weights = random_ranking(N, 3)
    graph = RankingGraph.from_ranking(Ranking(indices, torch.ones_like(weights)), self_weight=1 / 4)
    assert_close(graph.dense()[graph.dense() > 0], torch.full((4 * N,), 1 / 4, dtype=torch.float64))
    head = make_head("gat")
    first, second = (
        copied(
            GATConv(
                layer.linear.in_features, outputs, heads=2, concat=layer.concatenate, add_self_loops=False
            ).double(),
            **{"lin.weight": layer.linear.weight, "bias": layer.bias},
            att_src=layer.source_attention,
            att_dst=layer.target_attention,
        )
        for layer, outputs in zip(head.layers, (4, CLASSES), strict=True)
    )
    edge_index, _ = pyg_edges(graph.dense())
    assert_close(head(features, graph)[0], second(F.elu(first(features, edge_index)), edge_index))


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("graph_name", GRAPHS)
def test_gat_equals_pyg_with_edge_weights_as_edge_features(graph_name, concatenate, ranking, features):
    # PyG adds the edge's term inside the LeakyReLU: with a slope of 1 that is no difference
    layer = GATLayer(8, 4, num_heads=2, concatenate=concatenate, negative_slope=1.0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    convolution = copied(
        GATConv(8, 4, heads=2, concat=concatenate, negative_slope=1.0, add_self_loops=False, edge_dim=1).double(),
        **{"lin.weight": layer.linear.weight, "bias": layer.bias},
        **{"lin_edge.weight": torch.ones(8, 1), "att_edge": torch.full((2, 4), 1 / 4)},
        att_src=layer.source_attention,
        att_dst=layer.target_attention,
    )
    graph = RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    edge_index, weight = pyg_edges(graph.dense())
    output, _ = layer(features, graph)
    assert_close(output, convolution(features, edge_index, edge_attr=weight.log()))


def test_gat_reads_the_edge_weights(ranking, features):
    head = make_head("gat")
    graph = RankingGraph.from_ranking(ranking)
    uniform = RankingGraph.from_ranking(ranking._replace(weights=torch.ones_like(ranking.weights)))
    assert (head(features, graph)[0] - head(features, uniform)[0]).abs().max() > 1e-3


# --- states that a support bank stores -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_states_have_the_announced_sizes(name, depth, ranking, features):
    config = tiny_config(head_num_layers=depth)
    head = make_head(name, head_num_layers=depth)
    _, states = head(features, RankingGraph.from_ranking(ranking))
    assert [state.shape for state in states] == [(N, size) for size in head.state_sizes(config)]
    shared = states[0].shape == features.shape and torch.equal(states[0], features)
    assert shared == head.first_state_is_features


@pytest.mark.parametrize("self_loop", ["share", "unit"])
@pytest.mark.parametrize("normalization", ["row", "symmetric", "none"])
@pytest.mark.parametrize("name", HEADS)
def test_a_query_that_reads_the_states_answers_as_the_node_it_copies(name, normalization, self_loop, ranking, features):
    options = {"normalization": normalization, "self_loop": self_loop}
    head, graph = make_head(name), RankingGraph.from_ranking(ranking, **options)
    scores, states = head(features, graph)
    rows = torch.tensor([4, 0, 7])
    attached = RankingGraph.from_ranking(
        Ranking(ranking.indices[rows], ranking.weights[rows]), support_degree=graph.degree, **options
    )
    answer, _ = head(features[rows], attached, support=states)
    assert_close(answer, scores[rows], atol=1e-12, rtol=1e-12)
    if name != "linear":  # the states matter
        strangers, _ = head(features[rows], attached, support=[torch.randn_like(state) for state in states])
        assert (strangers - answer).abs().max() > 1e-2


# --- label propagation -----------------------------------------------------------------------------------------------

KNOWN = torch.eye(CLASSES, dtype=torch.float64)[torch.arange(N) % CLASSES] * (torch.arange(N) < 5)[:, None]


def propagation(**overrides) -> LabelPropagation:
    return LabelPropagation(tiny_config(head="label_propagation", **overrides))


@pytest.mark.parametrize("graph_name", GRAPHS)
def test_label_propagation_equals_its_dense_formula(graph_name, ranking):
    graph = RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    P = graph.dense()
    z, read = propagation(propagation_steps=4, propagation_alpha=0.8)(graph, KNOWN)
    expected = KNOWN
    for _ in range(4):
        before, expected = expected, 0.8 * P @ expected + 0.2 * KNOWN
    assert_close(z, expected)
    assert_close(read, before)
    direction = torch.randn_like(z)
    gradients = [torch.autograd.grad(y, ranking.weights, direction, retain_graph=True)[0] for y in (z, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert_close(*gradients)


# the raw graph has no fixed point: its powers grow
@pytest.mark.parametrize("graph_name", [name for name in GRAPHS if "raw" not in name])
def test_the_closed_form_is_the_limit_of_the_iteration_and_the_dense_formula(graph_name, ranking):
    graph = RankingGraph.from_ranking(ranking, **GRAPHS[graph_name])
    solved, _ = propagation(propagation_steps=0, propagation_alpha=0.8)(graph, KNOWN)
    iterated, _ = propagation(propagation_steps=400, propagation_alpha=0.8)(graph, KNOWN)
    formula = 0.2 * torch.linalg.inv(torch.eye(N, dtype=torch.float64) - 0.8 * graph.dense()) @ KNOWN
    direction = torch.randn_like(formula)
    gradients = []
    for z in (solved, iterated, formula):
        assert_close(z, formula)
        gradients.append(torch.autograd.grad(z, ranking.weights, direction, retain_graph=True)[0])
    assert gradients[2].abs().max() > 1e-3
    assert_close(gradients[0], gradients[2])
    assert_close(gradients[1], gradients[2])


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_query_of_unknown_class_reads_what_an_unknown_node_gets(steps, ranking):
    module = propagation(propagation_steps=steps)
    graph = RankingGraph.from_ranking(ranking, self_weight=0.0)
    z, read = module(graph, KNOWN)
    rows = torch.tensor([6, 8])
    assert not KNOWN[rows].any()
    attached = RankingGraph.from_ranking(
        Ranking(ranking.indices[rows], ranking.weights[rows]), self_weight=0.0, support_degree=graph.degree
    )
    assert z[rows].abs().max() > 1e-3
    assert_close(module.read(attached, read), z[rows])


def test_label_propagation_has_no_parameters():
    assert not list(propagation().parameters())


def test_propagated_labels_become_log_probabilities_finite_without_any_label():
    z = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    answer = LabelPropagation.log_probabilities(z)
    assert_close(answer.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    assert_close(answer[0].exp(), torch.tensor([0.3001, 0.1001, 0.0001], dtype=torch.float64) / 0.4003)
    assert_close(answer[1].exp(), torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))
    answer.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_answer_mixes_probabilities(share):
    module = propagation(propagation_mix=share)
    head = torch.log_softmax(torch.randn(4, CLASSES, dtype=torch.float64), -1)
    z = torch.rand(4, CLASSES, dtype=torch.float64)
    z[2] = 0.0
    mixed = module.mix(head, z)
    expected = (1 - share) * head.exp() + share * module.log_probabilities(z).exp()
    expected[2] = head[2].exp()  # no label arrives: the head alone
    assert_close(mixed.exp(), expected)


def test_either_answers_alone_where_the_other_is_missing():
    module = propagation(propagation_mix=0.3)
    head, z = torch.log_softmax(torch.randn(4, CLASSES), -1), torch.rand(4, CLASSES)
    assert module.mix(head, None) is head
    assert_close(module.mix(None, z), module.log_probabilities(z))
    assert_close(propagation(propagation_mix=0.0).mix(None, z), module.log_probabilities(z))
    assert module.mix(None, None) is None
