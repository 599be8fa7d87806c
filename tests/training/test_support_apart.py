"""Support apart from the queries: who is ranked, what is revealed, and that training sees what the bank will answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn.objectives import head_loss
from modeling_bpgcn.training.support_apart import set_support_apart
from tests.model_factory import only, tiny_model
from tests.training_factory import arguments, digit_trainer, logged, parameters, tiny_digit_model, trained

N, QUERIES = 14, 6
LABELS = torch.tensor([0, 1, 2, 0, -100, 1, 0, 1, 2, 2, 0, 1, -100, -100])


def feature_rows() -> Tensor:
    return torch.randn(N, 8, dtype=torch.float64)


def apart(model, features: Tensor, labels: Tensor = LABELS):
    return model(features=features, labels=labels, support="batch", num_context=N - QUERIES, support_apart=True)


def fill_bank(model, features: Tensor) -> None:
    model.set_support_bank(features[QUERIES:], LABELS[QUERIES:])


# --- the split --------------------------------------------------------------------------------------------------------


@given(st.integers(3, 40), st.floats(0.01, 0.99))
def test_the_split_keeps_every_row_and_both_parts(count, fraction):
    nodes = {"labels": torch.arange(count), "features": torch.arange(count).double()[:, None]}
    rows, asked = set_support_apart(nodes, count, fraction)
    assert sorted(rows["labels"].tolist()) == list(range(count))
    assert (rows["features"][:, 0] == rows["labels"]).all()
    assert 1 <= asked <= count - 2
    assert abs(count - asked - fraction * count) <= 2


def test_without_a_fraction_nothing_is_drawn():
    nodes, before = {"labels": torch.arange(5)}, torch.get_rng_state()
    rows, asked = set_support_apart(nodes, 4, 0.0)
    assert rows is nodes
    assert asked == 4
    assert torch.equal(torch.get_rng_state(), before)


# --- what training computes is what the bank answers ------------------------------------------------------------------


@pytest.mark.parametrize("head", ["gcn", "sgc", "appnp", "gat", "arma"])
@pytest.mark.parametrize("symmetrization", ["none", "mean"])
@pytest.mark.parametrize("label_embedding", [False, True])
def test_queries_are_answered_as_from_a_bank_of_the_support(head, symmetrization, label_embedding):
    torch.manual_seed(0)
    options = {"graph_symmetrization": symmetrization, "label_embedding": label_embedding, "propagation_mix": 0.0}
    model, features = tiny_model(head=head, **options).double(), feature_rows()
    model.train()  # without dropout: the support's classes are read
    found = apart(model, features).logits[:QUERIES]
    model.eval()
    fill_bank(model, features)
    model.bpgcn.support_bank.double()
    expected = model(features=features[:QUERIES], support="bank").logits
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_the_propagated_loss_is_that_of_labels_propagated_from_the_bank(symmetrization):
    torch.manual_seed(0)
    options = {"graph_symmetrization": symmetrization, "propagation_mix": 1.0, **only("propagation_loss")}
    model, features = tiny_model(**options).double(), feature_rows()
    loss = apart(model, features).loss
    fill_bank(model, features)
    expected = head_loss(model(features=features[:QUERIES], support="bank").logits, LABELS[:QUERIES])
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_support_reads_no_query_and_queries_do_not_read_each_other():
    torch.manual_seed(0)
    model = tiny_model(graph_symmetrization="mean").double()
    features = feature_rows().requires_grad_()
    logits = apart(model, features).logits
    [gradient] = torch.autograd.grad(logits[QUERIES:].exp().square().sum(), features, retain_graph=True)
    assert (gradient[QUERIES:].abs().sum(-1) > 0).any()
    assert (gradient[:QUERIES] == 0).all()
    [gradient] = torch.autograd.grad(logits[0].exp().square().sum(), features)
    assert gradient[0].abs().max() > 0
    assert gradient[QUERIES:].abs().max() > 0
    assert (gradient[1:QUERIES] == 0).all()


def test_only_queries_are_asked_and_the_ranking_learns_from_them():
    torch.manual_seed(0)
    model = tiny_model().double().train()
    features = feature_rows().requires_grad_()
    outputs = apart(model, features)
    assert (outputs.neighbor_indices >= QUERIES).all()
    outputs.loss.backward()
    assert (features.grad[:4].abs().sum(-1) > 0).all()
    changed = LABELS.clone()
    changed[:QUERIES] = -100
    silent = apart(model, features.detach(), changed).loss_parts
    assert silent["head_loss"] == 0
    assert outputs.loss_parts["head_loss"] > 0


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [{}, {"graph_scope": "full"}, {"gradient_cache_chunk_size": 5}], ids=str)
def test_it_trains_in_every_scope_and_differs_from_training_without(tmp_path, scope):
    start = parameters(tiny_digit_model())
    run = trained(tmp_path / "apart", support_fraction=0.5, max_steps=2, **scope)
    plain = trained(tmp_path / "plain", max_steps=2, **scope)
    assert logged(run, "loss") != logged(plain, "loss")
    assert all(value > 0 for value in logged(run, "ranking_gradient_norm"))
    moved = parameters(run.model)
    assert any(".backbone." in name and not torch.equal(moved[name], value) for name, value in start.items())


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=r"support_fraction=.* must be at least 0 and below 1"):
        arguments(tmp_path, support_fraction=fraction)


@pytest.mark.parametrize(
    "other", [{"graph_scope": "memory"}, {"ranking_shards": "ring"}, {"gradient_norm_penalty": 1.0}], ids=str
)
def test_options_that_exclude_it_are_named(tmp_path, other):
    with pytest.raises(ValueError, match=f"support_fraction cannot be used with {next(iter(other))}="):
        arguments(tmp_path, support_fraction=0.5, **other)


def test_a_mutual_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set graph_symmetrization to none or mean"):
        digit_trainer(tmp_path, tiny_digit_model(graph_symmetrization="mutual"), support_fraction=0.5)
