"""Forward mode gives what differences and reverse mode give, for every head, and leaves the model as it was."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn.analysis.sensitivity import NUMBERS, loss_sensitivity, sensitivity
from modeling_bpgcn.configuration_bpgcn import CHOICES
from tests.model_factory import HEAD_NAMES, tiny_images, tiny_model

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, -100, -100, -100, -100, 0, 1])
SEED = 3
EVERY_PART = {"neighborhood_loss_weight": 0.5, "consistency_loss_weight": 0.2}
GRAPHS = {
    "row": {},
    "mean": {"graph_symmetrization": "mean", "graph_normalization": "symmetric", "ranking_normalization": "all"},
    "mutual": {"graph_symmetrization": "mutual", "propagation_steps": 0},
    "euclidean": {"ranking_metric": "euclidean", "ranking_temperature": 3.0, "graph_normalization": "none"},
}


def double_model(**overrides):
    return tiny_model(**(EVERY_PART | {"head_dropout": 0.5, "self_weight": 0.4} | overrides)).double().train()


def images() -> dict[str, Tensor]:
    return {"pixel_values": tiny_images(len(LABELS)).double(), "labels": LABELS, "node_ids": torch.arange(12) + 40}


def outputs_at(model, batch, name: str, value: float):
    """The answers of the batch graph without noise, for another value of a number of the config."""
    before = getattr(model.config, name)
    setattr(model.config, name, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        found = model.eval()(**batch, support="batch")
    setattr(model.config, name, before)
    return found


def differences(model, batch, name: str, step: float = 1e-6) -> dict[str, Tensor]:
    value = getattr(model.config, name)
    above, below = (outputs_at(model, batch, name, value + sign * step) for sign in (1, -1))
    return {key: (above[key] - below[key]) / (2 * step) for key in ("loss", "logits", "neighbor_weights")}


def assert_equals_differences(model, batch, name: str) -> dict[str, Tensor]:
    expected, found = differences(model, batch, name), sensitivity(model, batch, [name], seed=SEED)[name]
    assert found.value == getattr(model.config, name)
    for key, value in expected.items():
        tolerance = 1e-6 * float(value.abs().max()) + 1e-8
        assert_close(torch.as_tensor(getattr(found, key), dtype=torch.float64), value, rtol=1e-6, atol=tolerance)
    return expected


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_it_equals_central_differences_for_every_head(head, graph):
    model, batch = double_model(head=head, **graph), images()
    by_temperature = assert_equals_differences(model, batch, "ranking_temperature")
    assert by_temperature["loss"].abs() > 1e-3
    assert by_temperature["neighbor_weights"].abs().max() > 1e-3
    by_share = assert_equals_differences(model, batch, "self_weight")
    # these read no neighbour, or not with a share of their own
    assert (by_share["loss"] == 0) == (head in ("label_propagation", "linear"))
    assert by_share["neighbor_weights"].abs().max() == 0


# straight-through has, by design, not the derivative of its value
@pytest.mark.parametrize("normalization", ["all", "selected"])
@pytest.mark.parametrize("relaxation", sorted({*CHOICES["ranking_relaxation"]} - {"straight_through"}))
def test_it_equals_central_differences_for_every_relaxation(relaxation, normalization):
    model = double_model(ranking_relaxation=relaxation, ranking_normalization=normalization)
    expected = assert_equals_differences(model, images(), "ranking_temperature")
    assert expected["loss"].abs() > 1e-3


def test_of_straight_through_it_is_that_of_the_softmax_behind():
    model, batch = double_model(ranking_relaxation="straight_through"), images()
    found = sensitivity(model, batch)["ranking_temperature"].neighbor_weights
    model.config.ranking_relaxation = "softmax"
    assert found.abs().max() > 1e-3
    assert_close(found, differences(model, batch, "ranking_temperature")["neighbor_weights"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("relaxation", CHOICES["ranking_relaxation"])
def test_a_learned_temperature_has_the_derivative_of_reverse_mode(relaxation):
    model, batch = double_model(learn_temperature=True, ranking_relaxation=relaxation), images()
    parameter = model.bpgcn.ranking_temperature.log_temperature
    with torch.no_grad():
        parameter.sub_(0.3)
    found = sensitivity(model, batch, seed=SEED)["ranking_temperature"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        loss = model.eval()(**batch, support="batch").loss
    [by_log] = torch.autograd.grad(loss, parameter)
    tau = float(parameter.detach().exp())
    assert found.value == pytest.approx(tau)
    assert abs(float(by_log)) > 1e-3
    assert found.loss == pytest.approx(float(by_log) / tau, rel=1e-9)


def test_propagated_classes_move_with_the_temperature_too():
    model = double_model(propagation_mix=0.7)
    batch = images() | {"support_classes": torch.where(torch.arange(12) < 4, LABELS, -100)}
    found = assert_equals_differences(model, batch, "ranking_temperature")
    del batch["support_classes"]
    assert not torch.allclose(sensitivity(model, batch)["ranking_temperature"].logits, found["logits"])


def test_a_large_graph_takes_the_tiled_ranking(monkeypatch):
    from modeling_bpgcn import ranking

    model, batch = double_model(ranking_normalization="all"), images()
    dense = loss_sensitivity(model, batch)
    monkeypatch.setattr(ranking, "DENSE_SCORES", 0)
    monkeypatch.setattr(ranking, "_rank_dense", None)
    tiled = loss_sensitivity(model, batch)
    assert tiled == pytest.approx(dense, rel=1e-9)
    assert all(abs(value) > 1e-3 for value in tiled.values())


def test_in_float32_it_is_close():
    model, batch = double_model(), images()
    exact = loss_sensitivity(model, batch)
    single = loss_sensitivity(model.float(), batch | {"pixel_values": batch["pixel_values"].float()})
    assert exact.keys() == single.keys() == set(NUMBERS)
    assert single == pytest.approx(exact, rel=1e-3)


def test_the_loss_alone_and_features_in_place_of_images():
    model, batch = double_model(), images()
    whole = sensitivity(model, batch, seed=SEED)
    assert loss_sensitivity(model, batch, seed=SEED) == {name: one.loss for name, one in whole.items()}
    with torch.no_grad():
        features = model.eval().get_image_features(batch.pop("pixel_values"))
    assert loss_sensitivity(model, batch | {"features": features}, seed=SEED) == pytest.approx(
        {name: one.loss for name, one in whole.items()}, rel=1e-9
    )


def test_without_a_share_the_self_weight_does_nothing():
    model = double_model(self_weight=0.5, graph_self_loop="unit")
    found = sensitivity(model, images())
    assert found["self_weight"].loss == 0
    assert torch.equal(found["self_weight"].logits, torch.zeros(12, 3, dtype=torch.float64))
    assert found["ranking_temperature"].loss != 0


def test_the_model_is_left_as_it_was():
    model, batch = double_model(), images()
    config, state = model.config.to_dict(), torch.get_rng_state()
    loss_sensitivity(model, batch)
    assert model.config.to_dict() == config
    assert type(model.config.self_weight) is type(model.config.ranking_temperature) is float
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bpgcn.ranking_temperature() == 0.1
    model.bpgcn.rank = None
    with pytest.raises(TypeError):
        loss_sensitivity(model, batch)
    assert model.config.to_dict() == config
    assert model.bpgcn.ranking_temperature() == 0.1


def test_bad_input_is_named():
    model, batch = double_model(), images()
    with pytest.raises(ValueError, match="to='tau' is unknown: choose from ranking_temperature, self_weight"):
        sensitivity(model, batch, ["tau"])
    del batch["labels"]
    with pytest.raises(ValueError, match="needs labels of 0 or more: the batch has none"):
        sensitivity(model, batch)
