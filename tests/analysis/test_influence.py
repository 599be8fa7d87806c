"""Influence: derivatives against finite differences, coefficients that add up to the answer, and predicted removals
against banks that are rebuilt without the image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import modeling_bpgcn.bank_editing as bank_editing
from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.analysis.influence import influence, label_influence, removal_influence
from modeling_bpgcn.objectives import known_classes
from modeling_bpgcn.ranking import Ranking
from tests.model_factory import CLASSES, HEAD_NAMES, tiny_images, tiny_model

M, Q, K = 24, 4, 3
STEP = 1e-6
# two images in three have a class, and not all of them that of their centre
CLASSES_OF = torch.where(torch.arange(M) % 5 < 2, -100, torch.arange(M) * 5 % 7 % CLASSES)
IDS = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:M]


def spread_features(count: int) -> Tensor:
    """Features around three centres that are near enough for every neighborhood to be mixed."""
    return (0.5 * torch.randn(CLASSES, 8)[torch.arange(count) % CLASSES] + torch.randn(count, 8)).double()


def model_and_queries(classes: Tensor = CLASSES_OF, **overrides) -> tuple[BPGCNForImageClassification, Tensor]:
    """A model in float64 with a bank of M images, and Q queries."""
    model = tiny_model(**{"ranking_temperature": 0.3} | overrides).double()
    model.support_bank.dtype = torch.float64
    # the centres are drawn with all of them
    features = spread_features(len(classes) + Q)
    model.set_support_bank(features[Q:], classes, IDS[: len(classes)] if len(classes) <= M else None)
    return model, features[:Q]


def answers(model, queries: Tensor, classes: Tensor, **options) -> Tensor:
    """log p_c [Q], from the model itself."""
    with torch.no_grad():
        return model(features=queries, **options).logits.gather(1, classes[:, None])[:, 0]


def without(model, queries: Tensor, classes: Tensor, gone) -> Tensor:
    """log p_c [Q] from a bank that is rebuilt without some images."""
    bank = model.support_bank
    rows = bank.features, bank.classes, bank.ids
    kept = torch.ones(len(bank.classes), dtype=torch.bool)
    kept[gone] = False
    model.set_support_bank(*(part[kept] for part in rows))
    try:
        return answers(model, queries, classes)
    finally:
        model.set_support_bank(*rows)


# --- one neighbor, all that is stored held ----------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_weight_influence_is_the_derivative_along_taking_a_neighbor_away(head, normalization, monkeypatch):
    model, queries = model_and_queries(head=head, ranking_normalization=normalization, graph_normalization="none")
    found = influence(model, features=queries)
    base = model.bpgcn.rank_in_bank(queries)
    assert torch.equal(found.neighbor_indices, base.indices)
    assert_close(found.neighbor_weights, base.weights / base.weights.sum(-1, keepdim=True))
    assert_close(found.log_probability, answers(model, queries, found.class_index))
    assert (found.weight_influence.abs() > 1e-4).any(-1).all()
    assert_close(found.weight_influence.sum(-1), torch.zeros(Q, dtype=torch.float64), atol=1e-9, rtol=0)
    for j in range(K):
        ends = []
        for step in (STEP, -STEP):
            weights = base.weights.clone()
            weights[:, j] *= 1 - step
            weights *= base.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
            monkeypatch.setattr(model.bpgcn, "rank_in_bank", lambda *_, w=weights: Ranking(base.indices, w))
            ends.append(answers(model, queries, found.class_index))
            monkeypatch.undo()
        assert_close(found.weight_influence[:, j], (ends[1] - ends[0]) / (2 * STEP), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_feature_gradient_is_the_finite_difference_of_a_stored_feature(head, normalization):
    model, queries = model_and_queries(head=head, ranking_normalization=normalization)
    found = influence(model, features=queries, class_index=1)
    assert (found.feature_norm > 1e-5).all()
    features = model.support_bank.features
    for i in range(Q):
        for j, row in enumerate(found.neighbor_indices[i].tolist()):
            direction, kept, ends = torch.randn(8, dtype=torch.float64), features[row].clone(), []
            for step in (STEP, -STEP):
                features[row] = kept + step * direction
                ends.append(answers(model, queries[i : i + 1], torch.tensor([1]))[0])
            features[row] = kept
            expected = (ends[0] - ends[1]) / (2 * STEP)
            assert_close(found.feature_gradient[i, j] @ direction, expected, atol=1e-7, rtol=1e-4)
            assert_close(found.feature_influence[i, j], found.feature_gradient[i, j] @ kept)


def test_along_the_feature_only_the_message_moves_an_answer_by_cosines():
    for head, reads_features in (("appnp", False), ("gat", False), ("gcn", True)):
        model, queries = model_and_queries(head=head)
        found = influence(model, features=queries)
        assert (found.feature_norm > 1e-5).all()
        assert (found.feature_influence.abs() > 1e-7).any() == reads_features


@pytest.mark.parametrize("relaxation", ["softmax", "straight_through"])
@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_exact_removal_is_the_answer_of_a_bank_without_that_row(head, normalization, relaxation):
    model, queries = model_and_queries(
        head=head, ranking_normalization=normalization, ranking_relaxation=relaxation, graph_normalization="none"
    )
    found = influence(model, features=queries)
    assert (found.removal.abs() > 1e-4).any(-1).all()
    bank = model.support_bank
    stored = dict(bank.named_buffers())
    for i in range(Q):
        query, asked = queries[i : i + 1], found.class_index[i : i + 1]
        for j, row in enumerate(found.neighbor_indices[i].tolist()):
            for name, rows in stored.items():
                setattr(bank, name, torch.cat([rows[:row], rows[row + 1 :]]))
            change = answers(model, query, asked)[0] - found.log_probability[i]
            assert_close(found.removal[i, j], change, atol=1e-9, rtol=1e-6)
            for name, rows in stored.items():
                setattr(bank, name, rows)


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_first_order_removal_is_the_start_of_the_way_to_the_exact_one(head, monkeypatch):
    model, queries = model_and_queries(head=head)
    found = influence(model, features=queries, method="first_order")
    assert (found.removal.abs() > 1e-4).any(-1).all()
    base, bank = model.bpgcn.rank_in_bank(queries), model.support_bank
    dense = torch.zeros(Q, M, dtype=torch.float64).scatter(1, base.indices, base.weights)
    for j in range(K):
        target = torch.zeros_like(dense)
        for i in range(Q):
            left = torch.arange(M)[torch.arange(M) != base.indices[i, j]]
            new = model.bpgcn.rank(queries[i : i + 1], key=bank.features[left])
            target[i, left[new.indices[0]]] = new.weights[0].detach()
        moved = Ranking(torch.arange(M).expand(Q, M), dense + STEP * (target - dense))
        monkeypatch.setattr(model.bpgcn, "rank_in_bank", lambda *_, r=moved: r)
        change = answers(model, queries, found.class_index) - found.log_probability
        monkeypatch.undo()
        assert_close(found.removal[:, j], change / STEP, atol=1e-3, rtol=1e-3)


def test_without_a_further_candidate_the_others_share_the_weight():
    model, queries = model_and_queries(CLASSES_OF[:K])
    found = influence(model, features=queries)
    assert found.removal.shape == (Q, K)
    bank = model.support_bank
    stored = dict(bank.named_buffers())
    for name, rows in stored.items():
        setattr(bank, name, rows[1:])
    left = answers(model, queries, found.class_index)
    assert_close(found.removal[found.neighbor_indices == 0], left - found.log_probability)
    model.set_support_bank(stored["features"], stored["classes"])
    assert removal_influence(model, features=queries).shape == (Q, K)


# --- the labels behind an answer --------------------------------------------------------------------------------------


def propagated_labels(model, queries: Tensor) -> Tensor:
    """z [Q, C] as the model reads it."""
    bank = model.support_bank
    graph = model._label_graph(model.bpgcn.rank_in_bank(queries), bank.degree)
    return model.label_propagation.read(graph, bank.propagated)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(0, 8),
    alpha=st.floats(0.05, 0.95),
    symmetrization=st.sampled_from(["none", "mean", "mutual"]),
    normalization=st.sampled_from(["row", "symmetric", "none"]),
    chunk_size=st.integers(1, 5),
)
def test_the_labels_times_their_coefficients_are_the_propagated_labels(
    steps, alpha, symmetrization, normalization, chunk_size
):
    torch.manual_seed(0)
    model, queries = model_and_queries(
        head="label_propagation",
        propagation_steps=steps,
        propagation_alpha=alpha,
        graph_symmetrization=symmetrization,
        graph_normalization=normalization,
    )
    coefficients = label_influence(model, features=queries, chunk_size=chunk_size)
    z = propagated_labels(model, queries)
    assert (z > 1e-3).any()
    assert_close(coefficients @ known_classes(CLASSES_OF, CLASSES, torch.float64), z, atol=1e-12, rtol=1e-9)
    assert (coefficients >= 0).all()
    assert (coefficients[:, CLASSES_OF < 0] == 0).all()


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_a_coefficient_is_what_goes_when_a_class_is_forgotten(steps):
    model, queries = model_and_queries(propagation_steps=steps)
    coefficients, before = label_influence(model, features=queries), propagated_labels(model, queries)
    assert (coefficients > 1e-3).any(-1).all()
    for s in (CLASSES_OF >= 0).nonzero()[:, 0].tolist():
        classes = CLASSES_OF.index_fill(0, torch.tensor([s]), -100)
        model.set_support_bank(model.support_bank.features, classes, IDS)
        lost = before - propagated_labels(model, queries)
        assert_close(lost[:, CLASSES_OF[s]], coefficients[:, s], atol=1e-12, rtol=1e-9)


# --- removal from the bank --------------------------------------------------------------------------------------------


def ranked_without(model, query: Tensor | None, image: int) -> Tensor:
    """The edge weights of queries, or of the bank's own images, in their columns [N, M] without one candidate."""
    support = model.support_bank.features
    left = torch.arange(M)[torch.arange(M) != image]
    kept = model.bpgcn.rank(support[left]) if query is None else model.bpgcn.rank(query, key=support[left])
    weights = torch.zeros(len(kept.indices), M, dtype=torch.float64).scatter(
        1, left[kept.indices], kept.weights.detach()
    )
    return weights if query is not None else torch.zeros(M, M, dtype=torch.float64).index_copy(0, left, weights)


@pytest.mark.parametrize(
    "options",
    [{"head": head} for head in HEAD_NAMES]
    + [
        {"propagation_steps": 0},
        {"propagation_mix": 0.0},
        {"graph_normalization": "symmetric", "graph_self_loop": "unit"},
        {"graph_normalization": "none", "ranking_relaxation": "straight_through"},
        {"ranking_normalization": "all"},
        {"graph_symmetrization": "mean"},
    ],
    ids=str,
)
def test_removal_influence_is_the_start_of_the_way_to_the_bank_without_the_image(options, monkeypatch):
    model, queries = model_and_queries(**options)
    scores = removal_influence(model, features=queries, class_index=1)
    assert scores.shape == (Q, M)
    assert ((scores.abs() > 1e-4).sum(-1) > K).all()  # more than the neighbors
    bank, asked = model.support_bank, torch.ones(Q, dtype=torch.long)
    rows, base = (bank.features, bank.classes, IDS), answers(model, queries, asked)
    own, query = model.bpgcn.rank(bank.features, IDS), model.bpgcn.rank_in_bank(queries)
    old = [
        torch.zeros(len(r.indices), M, dtype=torch.float64).scatter(1, r.indices, r.weights.detach())
        for r in (own, query)
    ]
    for image in {*range(0, M, 6), *query.indices[:, 0].tolist()}:
        new = [ranked_without(model, None, image), ranked_without(model, queries, image)]
        if "graph_symmetrization" not in options:  # who reads the image no longer cares what the image reads
            new[0][image] = old[0][image]
        of_bank, of_queries = (
            Ranking(torch.arange(M).expand(len(a), M), a + STEP * (b - a)) for a, b in zip(old, new, strict=True)
        )
        fade = torch.ones(M, 1, dtype=torch.float64)
        fade[image] -= STEP
        monkeypatch.setattr(bank_editing, "known_classes", lambda *a, f=fade: f * known_classes(*a))
        monkeypatch.setattr(model.bpgcn, "rank", lambda *_, r=of_bank: r)
        monkeypatch.setattr(model.bpgcn, "rank_in_bank", lambda *_, r=of_queries: r)
        model.set_support_bank(*rows)
        change = answers(model, queries, asked) - base
        monkeypatch.undo()
        model.set_support_bank(*rows)
        assert_close(scores[:, image], change / STEP, atol=2e-4, rtol=2e-3)


def clusters() -> tuple[BPGCNForImageClassification, Tensor]:
    """Two classes that overlap, one image in three labelled, 60 images, 6 neighbors."""
    classes = torch.where(torch.arange(60) % 3 == 0, torch.arange(60) % 2, -100)
    model = tiny_model(num_neighbors=6, head="label_propagation", ranking_temperature=0.3, num_labels=2).double()
    model.support_bank.dtype = torch.float64
    center = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64).repeat(1, 4)
    features = center[torch.arange(80) % 2] + 0.6 * torch.randn(80, 8, dtype=torch.float64)
    model.set_support_bank(features[:60], classes)
    return model, features[60:]


def test_removing_the_most_influential_changes_answers_more_than_removing_random_neighbors():
    model, queries = clusters()
    asked = model(features=queries).logits.argmax(-1)
    before, neighbors = answers(model, queries, asked), model.bpgcn.rank_in_bank(queries).indices
    picked = removal_influence(model, features=queries).argsort()[:, :3]
    changes = {"influence": [], "random": []}
    for i in range(len(queries)):
        one = queries[i : i + 1], asked[i : i + 1]
        changes["influence"].append((without(model, *one, picked[i]) - before[i]).abs())
        for _ in range(3):
            drawn = neighbors[i][torch.randperm(6)[:3]]
            changes["random"].append((without(model, *one, drawn) - before[i]).abs())
    by_influence, at_random = (torch.cat(values).mean() for values in changes.values())
    assert at_random > 1e-2
    assert by_influence > 1.5 * at_random


def test_predicted_and_real_changes_of_single_removals_rank_alike():
    model, queries = clusters()
    scores = removal_influence(model, features=queries)
    asked = model(features=queries).logits.argmax(-1)
    before = answers(model, queries, asked)
    real = torch.stack([without(model, queries, asked, image) - before for image in range(60)], dim=1)
    ranks = torch.stack([part.flatten().argsort().argsort().double() for part in (scores, real)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9


# --- what can be asked, and how ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [influence, label_influence, removal_influence])
def test_dropout_noise_and_the_callers_modes_change_nothing(function):
    model, queries = model_and_queries(head_dropout=0.5, ranking_relaxation="gumbel", learn_temperature=True)
    expected = function(model, features=queries)
    model.train()
    with torch.no_grad():
        found = function(model, features=queries)
        assert not torch.is_grad_enabled()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    if function is influence:
        expected, found = expected.__dict__, found.__dict__
        assert not any(part.requires_grad for part in found.values())
    assert_close(found, expected, atol=0, rtol=0)


def test_an_image_of_the_bank_has_no_influence_on_itself_as_a_neighbor():
    model, _ = model_and_queries()
    found = influence(model, features=model.support_bank.features, node_ids=IDS)
    assert not (found.neighbor_indices == torch.arange(M)[:, None]).any()
    assert (influence(model, features=model.support_bank.features).neighbor_indices == torch.arange(M)[:, None]).any()
    scores = removal_influence(model, features=model.support_bank.features[:Q], node_ids=IDS[:Q])
    assert scores.isfinite().all()


def test_images_and_their_features_get_the_same():
    model, _ = model_and_queries()
    images = tiny_images(2).double()
    features = model.get_image_features(images)
    for function in (label_influence, removal_influence):
        assert_close(function(model, images), function(model, features=features))
    assert_close(influence(model, images).removal, influence(model, features=features).removal)


def test_a_linear_head_alone_reads_no_neighbor():
    model, queries = model_and_queries(head="linear", propagation_mix=0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = influence(model, features=queries)
    assert not any(part.any() for part in (found.weight_influence, found.feature_gradient, found.removal))
    assert not removal_influence(model, features=queries).any()
    assert label_influence(model, features=queries).any()


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_bank_in_half_precision_is_asked_in_single(head):
    model = tiny_model(head=head, bank_dtype="float16")
    features = spread_features(M + Q).float()
    model.set_support_bank(features[Q:], CLASSES_OF, IDS)
    found = influence(model, features=features[:Q])
    assert found.feature_gradient.dtype == torch.float32
    z = label_influence(model, features=features[:Q]) @ known_classes(CLASSES_OF, CLASSES, torch.float32)
    assert_close(z, propagated_labels(model, features[:Q]).float(), atol=5e-3, rtol=0)
    assert removal_influence(model, features=features[:Q]).isfinite().all()


def test_bad_input_is_named():
    model, queries = model_and_queries()
    with pytest.raises(ValueError, match="method='shapley'"):
        influence(model, features=queries, method="shapley")
    for wrong in (CLASSES, -1, torch.zeros(Q + 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="class_index"):
            influence(model, features=queries, class_index=wrong)
        with pytest.raises(ValueError, match="class_index"):
            removal_influence(model, features=queries, class_index=wrong)
    model.support_bank.clear()
    for function in (influence, label_influence, removal_influence):
        with pytest.raises(ValueError, match="build_support_bank"):
            function(model, features=queries)
        with pytest.raises(ValueError, match="pixel_values or features"):
            function(model)
