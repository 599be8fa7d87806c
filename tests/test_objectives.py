"""The objective: each loss equals a plain loop, and the ranking path carries the gradient it is built for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn import objectives
from modeling_bpgcn.graph import RankingGraph
from modeling_bpgcn.heads import LabelPropagation
from modeling_bpgcn.objectives import (
    average_precision_loss,
    consistency_loss,
    head_loss,
    known_classes,
    masked_propagation_loss,
    neighborhood_loss,
    objective,
)
from modeling_bpgcn.ranking import similarity
from tests.model_factory import (
    CLASSES,
    captured_warnings,
    only,
    random_ranking,
    tiny_config,
    tiny_images,
    tiny_model,
)

N = 10
LABELS = torch.tensor([0, 1, 2, 0, 1, -100, 0, -100, 1, -100])


def log_probabilities(rows: int = N) -> Tensor:
    return torch.log_softmax(2 * torch.randn(rows, CLASSES, dtype=torch.float64), -1).requires_grad_()


def features() -> Tensor:
    return torch.randn(N, 4, dtype=torch.float64, requires_grad=True)


def label_graph(weights: Tensor | None = None) -> RankingGraph:
    ranking = random_ranking(N, 3)
    return RankingGraph.from_ranking(ranking if weights is None else ranking._replace(weights=weights), self_weight=0.0)


# --- the head's NLL --------------------------------------------------------------------------------------------------


def test_head_loss_is_the_mean_nll_of_the_labelled_rows():
    logits = log_probabilities()
    expected = [-logits[i, c].item() for i, c in enumerate(LABELS.tolist()) if c >= 0]
    loss = head_loss(logits, LABELS)
    assert_close(loss.item(), sum(expected) / len(expected))
    loss.backward()
    assert (logits.grad[LABELS >= 0].abs().sum(-1) > 0).all()
    assert (logits.grad[LABELS < 0] == 0).all()


# --- masked propagation ----------------------------------------------------------------------------------------------


def plain_propagation(P: Tensor, labels: list[int], steps: int, alpha: float) -> list[list[float]]:
    """The log-probabilities of all nodes."""
    known = [[float(labels[i] == c) for c in range(CLASSES)] for i in range(N)]
    z = known
    for _ in range(steps):
        z = [
            [
                alpha * sum(P[i, j].item() * z[j][c] for j in range(N)) + (1 - alpha) * known[i][c]
                for c in range(CLASSES)
            ]
            for i in range(N)
        ]
    return [[math.log((value + 1e-4) / (sum(row) + CLASSES * 1e-4)) for value in row] for row in z]


def plain_masked_propagation(P: Tensor, hidden: set[int], steps: int, alpha: float) -> float:
    seen = [-100 if i in hidden else c for i, c in enumerate(LABELS.tolist())]
    rows = plain_propagation(P, seen, steps, alpha)
    return -sum(rows[i][LABELS[i]] for i in hidden) / len(hidden)


@pytest.mark.parametrize(("ratio", "revealed"), [(0.5, 4), (0.3, 2), (0.01, 1), (0.99, 6)])
def test_masked_propagation_is_a_plain_loop_over_the_revealed_classes(ratio, revealed):
    config = tiny_config(propagation_steps=3, propagation_alpha=0.8)
    graph = label_graph()
    torch.manual_seed(5)
    loss = masked_propagation_loss(LabelPropagation(config), graph, LABELS, CLASSES, ratio)
    torch.manual_seed(5)
    labelled = [i for i, c in enumerate(LABELS.tolist()) if c >= 0]
    hidden = {labelled[i] for i in torch.randperm(len(labelled)).tolist()[revealed:]}
    assert_close(loss.item(), plain_masked_propagation(graph.dense(), hidden, steps=3, alpha=0.8))


def test_masked_propagation_draws_other_nodes_each_time():
    module, graph = LabelPropagation(tiny_config()), label_graph()
    assert len({masked_propagation_loss(module, graph, LABELS, CLASSES, 0.5).item() for _ in range(8)}) > 1


@pytest.mark.parametrize("steps", [0, 4])
def test_the_edge_weights_carry_all_of_the_propagation_gradient(steps):
    module = LabelPropagation(tiny_config(propagation_steps=steps))
    weights = random_ranking(N, 3).weights
    attached = masked_propagation_loss(module, label_graph(weights.requires_grad_()), LABELS, CLASSES, 0.5)
    assert torch.autograd.grad(attached, weights)[0].abs().max() > 1e-3
    cut = masked_propagation_loss(module, label_graph(weights.detach()), LABELS, CLASSES, 0.5)
    assert cut.item() > 0
    assert not cut.requires_grad


def test_masked_propagation_falls_when_neighbours_share_the_class():
    labels = torch.arange(N) % 2
    same = (labels[:, None] == labels[None, :]).double().fill_diagonal_(0)
    module, losses = LabelPropagation(tiny_config()), []
    for A in (same, 1 - same):
        weights, indices = (A + 0.01 * torch.rand(N, N)).fill_diagonal_(0).topk(4)
        graph = RankingGraph.from_ranking(
            random_ranking(N, 4)._replace(indices=indices, weights=weights), self_weight=0.0
        )
        losses.append(masked_propagation_loss(module, graph, labels, 2, 0.5).item())
    assert losses[0] < 0.1 < losses[1]


# --- neighbourhood ---------------------------------------------------------------------------------------------------


def plain_neighborhood(x: Tensor, labels: Tensor, ids: Tensor, tau: float, metric: str) -> float | None:
    S, losses = similarity(x, x, metric) / tau, []
    for i in range(N):
        others = [j for j in range(N) if labels[i] >= 0 and labels[j] >= 0 and ids[i] != ids[j]]
        own = [j for j in others if labels[j] == labels[i]]
        if own:
            mass = [sum(math.exp(S[i, j].item()) for j in group) for group in (own, others)]
            losses.append(-math.log(mass[0] / mass[1]))
    return sum(losses) / len(losses) if losses else None


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighborhood_loss_is_a_plain_loop_over_labelled_pairs(metric):
    x, ids = features(), torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])  # rows 0 and 3 are one image
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = neighborhood_loss(x, LABELS, ids, tau, metric)
    assert_close(loss.item(), plain_neighborhood(x, LABELS, ids, 0.5, metric))
    loss.backward()
    alone = 2  # the only one of its class: left out as a query, still a candidate
    assert x.grad[LABELS >= 0].norm(dim=-1).min() > 1e-5
    assert x.grad[alone].abs().max() > 0
    assert (x.grad[LABELS < 0] == 0).all()
    assert tau.grad.isfinite()
    assert tau.grad.abs() > 1e-4


def test_neighborhood_loss_leaves_no_trace_when_no_class_occurs_twice():
    x = features()
    loss = neighborhood_loss(x, torch.tensor([0, 1, 2] + [-100] * 7), torch.arange(N), 0.5, "cosine")
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


def test_neighborhood_loss_of_half_precision_features_is_computed_in_float32():
    x = features().detach().bfloat16()
    half = neighborhood_loss(x, LABELS, torch.arange(N), 0.05, "cosine")
    assert half.dtype == torch.float32
    assert torch.equal(half, neighborhood_loss(x.float(), LABELS, torch.arange(N), 0.05, "cosine"))


# --- average precision -----------------------------------------------------------------------------------------------


def plain_average_precision(S: Tensor, labels: list[int], ids: list[int], above) -> list[float]:
    """Of every node that has another of its class: precision at the rank of each of these, with ranks counted by
    `above(score, other score)`."""
    found = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if labels[i] >= 0 and labels[j] >= 0 and ids[i] != ids[j]]
        own = [j for j in others if labels[j] == labels[i]]
        at = []
        for j in own:
            ranks = [1 + sum(above(S[i, j].item(), S[i, m].item()) for m in group if m != j) for group in (own, others)]
            at.append(ranks[0] / ranks[1])
        if own:
            found.append(sum(at) / len(at))
    return found


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_average_precision_loss_is_a_plain_loop_over_labelled_pairs(metric):
    x, ids = features(), [0, 1, 2, 0, 4, 5, 6, 7, 8, 9]  # rows 0 and 3 are one image
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = average_precision_loss(x, LABELS, torch.tensor(ids), tau, metric)
    smooth = plain_average_precision(
        similarity(x, x, metric), LABELS.tolist(), ids, lambda own, other: 1 / (1 + math.exp((own - other) / 0.5))
    )
    assert len(smooth) == 6
    assert_close(loss.item(), 1 - sum(smooth) / len(smooth))
    loss.backward()
    assert x.grad[LABELS >= 0].norm(dim=-1).min() > 1e-5
    assert (x.grad[LABELS < 0] == 0).all()
    assert tau.grad.abs() > 1e-4


def test_average_precision_loss_has_the_gradient_of_its_differences():
    labels, ids = torch.tensor([0, 0, 1, 1, 0, -100]), torch.arange(6)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    loss = lambda rows: average_precision_loss(rows, labels, ids, 0.2, "cosine")  # noqa: E731
    assert torch.autograd.grad(loss(x), x)[0].abs().max() > 1e-3
    assert torch.autograd.gradcheck(loss, x)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(-1, 2), min_size=3, max_size=12).filter(lambda c: c.count(0) > 1))
def test_cold_average_precision_is_that_of_counted_ranks(seed, classes):
    labels = torch.tensor([c if c >= 0 else -100 for c in classes])
    x = torch.randn(len(labels), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = average_precision_loss(x, labels, torch.arange(len(labels)), 1e-9, "cosine")
    S = similarity(x, x, "cosine")
    exact = plain_average_precision(S, labels.tolist(), list(range(len(labels))), lambda own, other: other > own)
    assert_close(loss.item(), 1 - sum(exact) / len(exact), rtol=1e-6, atol=1e-6)


def test_average_precision_asks_nothing_of_the_context_but_ranks_it():
    x, context = features(), 4
    loss = average_precision_loss(x, LABELS, torch.arange(N), 0.5, "cosine", context)
    S = similarity(x, x, "cosine")
    smooth = plain_average_precision(
        S, LABELS.tolist(), list(range(N)), lambda own, other: 1 / (1 + math.exp((own - other) / 0.5))
    )
    queries = [i for i, c in enumerate(LABELS.tolist()) if c >= 0 and i != 2]  # 2 is the only one of its class
    kept = [value for i, value in zip(queries, smooth, strict=True) if i < N - context]
    assert 0 < len(kept) < len(smooth)
    assert_close(loss.item(), 1 - sum(kept) / len(kept))


def test_average_precision_leaves_no_trace_when_no_class_occurs_twice():
    x = features()
    loss = average_precision_loss(x, torch.tensor([0, 1, 2] + [-100] * 7), torch.arange(N), 0.5, "cosine")
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


# --- consistency -----------------------------------------------------------------------------------------------------


def plain_consistency(rows: list[list[float]], labels: list[int]) -> float:
    """Rows of all nodes, of which those without a class count; the others say how the classes share out."""
    counts = [1 + sum(label == c for label in labels) for c in range(CLASSES)]
    rows = [row for row, label in zip(rows, labels, strict=True) if label < 0]
    entropies = [-sum(math.exp(x) * x for x in row) for row in rows]
    marginal = [sum(math.exp(row[c]) for row in rows) / len(rows) for c in range(CLASSES)]
    shares = [count / sum(counts) for count in counts]
    divergence = sum(p * math.log(p / q) for p, q in zip(marginal, shares, strict=True))
    return sum(entropies) / len(rows) + divergence


@pytest.mark.parametrize("labels", [LABELS, LABELS.clamp_max(-1) * 100, torch.tensor([2] * 7 + [-100] * 3)])
def test_consistency_is_a_plain_loop_over_unlabelled_rows(labels):
    logits = log_probabilities()
    loss = consistency_loss(logits, labels)
    assert_close(loss.item(), plain_consistency(logits.tolist(), labels.tolist()))
    loss.backward()
    assert (logits.grad[labels < 0].abs().max(-1).values > 1e-4).all()
    assert (logits.grad[labels >= 0] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 8),
    known=st.lists(st.integers(0, CLASSES - 1), max_size=8),
    scale=st.floats(0, 50),
)
def test_consistency_is_never_negative(seed, rows, known, scale):
    labels = torch.tensor([-100] * rows + known)
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(len(labels), CLASSES, dtype=torch.float64, generator=generator)
    loss = consistency_loss(torch.log_softmax(scores, -1), labels)
    # the least share that a class can have is that of its one image in the prior
    assert -1e-9 <= loss.item() <= math.log(CLASSES) + math.log(len(known) + CLASSES)


def sure_answers(classes: list[int]) -> Tensor:
    return torch.log_softmax(100 * torch.eye(CLASSES, dtype=torch.float64)[classes], -1)


@pytest.mark.parametrize(
    ("known", "answers", "others"),
    [([], [0, 1, 2], [0, 0, 1]), ([0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 2])],
    ids=["no class known", "unequal shares"],
)
def test_consistency_is_zero_for_sure_answers_that_share_out_as_the_known_classes_and_one_image_of_each(
    known, answers, others
):
    labels = torch.tensor(known + [-100] * len(answers))
    loss = consistency_loss(sure_answers(known + answers), labels)
    assert_close(loss.item(), 0.0, atol=1e-9, rtol=0)
    assert consistency_loss(sure_answers(known + others), labels) > 0.05


def test_consistency_is_zero_without_unlabelled_rows():
    logits = log_probabilities(2)
    loss = consistency_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


# --- consistency of the propagated labels ----------------------------------------------------------------------------


def propagation_consistency(graph: RankingGraph, labels: Tensor = LABELS, num_context: int = 0, **options) -> Tensor:
    config = tiny_config(**only("propagation_consistency_loss"), **options)
    arguments = (config, labels, log_probabilities(), LabelPropagation(config), graph, features(), None, 0.5)
    loss, parts = objective(*arguments, num_context)
    assert_close(parts, {"propagation_consistency_loss": loss.detach()})
    return loss


def test_propagation_consistency_is_that_of_the_labels_that_propagation_from_all_known_classes_gives():
    graph = label_graph()
    rows = plain_propagation(graph.dense(), LABELS.tolist(), steps=3, alpha=0.8)
    loss = propagation_consistency(graph, propagation_steps=3, propagation_alpha=0.8)
    assert loss > 0.1
    assert_close(loss.item(), plain_consistency(rows, LABELS.tolist()))
    assert len({propagation_consistency(graph).item() for _ in range(4)}) == 1  # nothing is drawn


@pytest.mark.parametrize("context", [torch.tensor([2, -100, 2, 1]), torch.full((4,), -100)])
def test_propagation_consistency_reveals_the_classes_of_the_context_and_asks_nothing_of_it(context):
    graph, asked = label_graph(), N - len(context)
    labels = torch.cat([LABELS[:asked], context])
    rows = plain_propagation(graph.dense(), labels.tolist(), steps=8, alpha=0.9)
    expected = plain_consistency(rows[:asked], labels[:asked].tolist())
    assert_close(propagation_consistency(graph, labels, num_context=len(context)).item(), expected)
    assert abs(expected - plain_consistency(rows, labels.tolist())) > 1e-3


@pytest.mark.parametrize("steps", [0, 4])
def test_the_edge_weights_carry_all_of_the_propagation_consistency_gradient(steps):
    weights = random_ranking(N, 3).weights
    attached = propagation_consistency(label_graph(weights.requires_grad_()), propagation_steps=steps)
    assert torch.autograd.grad(attached, weights)[0].abs().max() > 1e-3
    cut = propagation_consistency(label_graph(weights.detach()), propagation_steps=steps)
    assert cut.item() > 0
    assert not cut.requires_grad


@pytest.mark.parametrize("labels", [torch.full((N,), -100), LABELS.clamp_min(0)], ids=["no class", "every class"])
def test_propagation_consistency_asks_nothing_where_no_class_or_every_class_is_known(labels):
    weights = random_ranking(N, 3).weights.requires_grad_()
    loss = propagation_consistency(label_graph(weights), labels)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, weights)[0] == 0).all()


# --- their sum -------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "head_loss_weight": 0.7,
    "propagation_loss_weight": 1.3,
    "neighborhood_loss_weight": 0.4,
    "average_precision_loss_weight": 0.9,
    "consistency_loss_weight": 0.2,
    "propagation_consistency_loss_weight": 0.6,
}


def parts_of(config, logits, x, graph) -> tuple[Tensor, dict]:
    torch.manual_seed(5)
    return objective(config, LABELS, logits, LabelPropagation(config), graph, x, None, 0.5)


def test_the_objective_is_the_weighted_sum_of_its_parts():
    config, x, logits, graph = tiny_config(**WEIGHTS), features(), log_probabilities(), label_graph()
    loss, parts = parts_of(config, logits, x, graph)
    torch.manual_seed(5)
    expected = {
        "head_loss": head_loss(logits, LABELS),
        "propagation_loss": masked_propagation_loss(LabelPropagation(config), graph, LABELS, CLASSES, 0.5),
        "neighborhood_loss": neighborhood_loss(x, LABELS, torch.arange(N), 0.5, "cosine"),
        "average_precision_loss": average_precision_loss(x, LABELS, torch.arange(N), 0.5, "cosine"),
        "consistency_loss": consistency_loss(logits, LABELS),
        "propagation_consistency_loss": propagation_consistency(graph),
    }
    assert_close(parts, {name: value.detach() for name, value in expected.items()})
    assert all(value > 0 for value in parts.values())
    assert not any(value.requires_grad for value in parts.values())
    assert_close(loss, sum(WEIGHTS[f"{name}_weight"] * value for name, value in expected.items()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_loss_of_weight_zero_is_not_computed(name):
    _, parts = parts_of(tiny_config(**(WEIGHTS | {name: 0.0})), log_probabilities(), features(), label_graph())
    assert set(parts) == {other.removesuffix("_weight") for other in WEIGHTS if other != name}


def test_label_propagation_alone_has_no_head_to_teach():
    config = tiny_config(head="label_propagation", **WEIGHTS)
    _, parts = parts_of(config, None, features(), label_graph())
    without_head = ("propagation_loss", "neighborhood_loss", "average_precision_loss", "propagation_consistency_loss")
    assert set(parts) == set(without_head)


def test_unknown_classes_are_rows_of_zeros():
    rows = known_classes(torch.tensor([2, -100, 0]), CLASSES, torch.float64)
    assert_close(rows, torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.float64))


def test_the_objective_knows_repeated_images_by_their_ids():
    model, x = tiny_model(neighborhood_loss_weight=1.0).train(), torch.randn(N, 8)
    x[3], ids = x[0], torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 9])
    parts = {}
    for name, node_ids in (("by id", ids), ("by row", None)):
        parts[name] = model(features=x, labels=LABELS, node_ids=node_ids).loss_parts["neighborhood_loss"]
    assert_close(parts["by id"], neighborhood_loss(x, LABELS, ids, 0.1, "cosine"))
    assert (parts["by id"] - parts["by row"]).abs() > 1e-2


# --- the gradient's paths, through the model -------------------------------------------------------------------------


def double_model(**overrides):
    return tiny_model(head_num_layers=2, **overrides).double().train()


@pytest.mark.parametrize("loss", ["propagation_loss", "propagation_consistency_loss"])
def test_under_a_loss_of_propagated_labels_alone_every_gradient_comes_through_the_ranking(loss):
    model = double_model(**only(loss))
    output = model(tiny_images(N).double(), labels=LABELS, output_path_features=True)
    ranked, messages = output.path_features
    for path in (ranked, messages):
        path.retain_grad()
    output.loss.backward()
    assert ranked.grad.abs().max() > 1e-4
    assert messages.grad is None
    assert all(parameter.grad is None for parameter in model.head.parameters())
    reached = [p.grad.abs().max() > 0 for p in model.bpgcn.backbone.parameters() if p.requires_grad]
    assert all(reached)


def test_the_two_paths_add_up_to_the_gradient_of_the_features():
    model = double_model(neighborhood_loss_weight=0.3)
    x = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    output = model(features=x, labels=LABELS, output_path_features=True)
    ranking_path, feature_path = torch.autograd.grad(output.loss, output.path_features, retain_graph=True)
    assert ranking_path.abs().max() > 1e-3
    assert feature_path.abs().max() > 1e-3
    assert_close(torch.autograd.grad(output.loss, x)[0], ranking_path + feature_path)


def finite_difference(loss, parameters: list[Tensor], direction: list[Tensor], step: float = 1e-6) -> float:
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * change)
            values.append(loss().item())
        for parameter, change in zip(parameters, direction, strict=True):
            parameter.add_(step * change)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("head", ["gcn", "sgc", "appnp", "gat", "arma"])
def test_with_messages_detached_the_ranking_path_reaches_the_backbone_as_finite_differences_do(head):
    model, images = double_model(head=head), tiny_images(N).double()
    parameters = [p for p in model.bpgcn.backbone.parameters() if p.requires_grad]
    with torch.no_grad():
        messages = model.get_image_features(images)

    def loss() -> Tensor:
        graph = model._graph(model.bpgcn.rank(model.get_image_features(images)))
        return head_loss(torch.log_softmax(model.head(messages, graph)[0], -1), LABELS)

    gradients = torch.autograd.grad(loss(), parameters)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-4
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
        assert abs(slope) > 1e-4
        assert_close(finite_difference(loss, parameters, direction), slope, rtol=1e-5, atol=1e-8)
    # and the model's own ranking path is this one
    output = model(images, labels=LABELS, output_path_features=True)
    ranked = output.path_features[0]
    at_ranking = torch.autograd.grad(head_loss(output.logits, LABELS), ranked, retain_graph=True)[0]
    assert_close(list(torch.autograd.grad(ranked, parameters, at_ranking)), list(gradients))


@pytest.mark.parametrize("relaxation", ["softmax", "lapsum", "threshold", "entmax"])
@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_the_whole_objectives_gradient_is_its_finite_difference(relaxation, normalization):
    model = double_model(
        ranking_relaxation=relaxation, ranking_normalization=normalization, learn_temperature=True, **WEIGHTS
    )
    images = tiny_images(N).double()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return model(images, labels=LABELS).loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert gradients[names.index("bpgcn.ranking_temperature.log_temperature")].abs() > 1e-3
    for _ in range(2):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
        assert abs(slope) > 1e-3
        assert_close(finite_difference(loss, parameters, direction), slope, rtol=1e-4, atol=1e-7)


# --- batches that teach little, classes that do not exist ------------------------------------------------------------


def test_a_batch_without_labels_costs_nothing_but_the_heads_consistency_and_is_mentioned_once():
    model, images = tiny_model(consistency_loss_weight=0.0).train(), tiny_images(6)
    with captured_warnings(objectives.logger) as messages:
        for _ in range(2):
            loss = model(images, labels=torch.full((6,), -100)).loss
            loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)
    assert [message for message in messages if "no labelled image" in message] == [
        "A batch holds no labelled image, so no class teaches its step: set labeled_batch_fraction, or use larger"
        " batches."
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_with_one_labelled_image_still_trains_the_head(count):
    model = tiny_model().train()
    labels = torch.tensor([1, -100])[:count]
    output = model(tiny_images(count), labels=labels)
    output.loss.backward()
    assert output.loss.item() > 0
    assert output.loss_parts["propagation_loss"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.head.layers[-1].bias.grad.abs().max() > 0


@pytest.mark.parametrize("loss", ["propagation_loss", "propagation_consistency_loss"])
def test_a_single_image_under_a_loss_of_propagated_labels_alone_has_a_gradient_of_zero(loss):
    model = tiny_model(**only(loss)).train()
    value = model(tiny_images(1), labels=torch.tensor([1])).loss
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("wrong", [CLASSES, -1])
@pytest.mark.parametrize("name", ["labels", "support_classes"])
def test_a_class_that_the_model_does_not_know_is_named(name, wrong):
    with pytest.raises(ValueError, match=f"{name} holds class {wrong}, but num_labels=3: .* use -100 for unknown"):
        tiny_model().train()(tiny_images(4), **{name: torch.tensor([0, wrong, -100, 1])})


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_support_class_that_the_model_does_not_know_is_named(wrong):
    with pytest.raises(ValueError, match=f"support_classes holds class {wrong}, but num_labels=3"):
        tiny_model().set_support_bank(torch.randn(4, 8), torch.tensor([0, wrong, -100, 1]))
