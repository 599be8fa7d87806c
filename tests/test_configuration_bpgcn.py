"""BPGCNConfig: what can be chosen, what is refused and in which words, and that a saved choice comes back."""

import math
import re

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Dinov2Config

from modeling_bpgcn import BPGCNConfig
from modeling_bpgcn.configuration_bpgcn import CHOICES, LOSS_WEIGHTS, RANGES
from tests.model_factory import BACKBONES, only, tiny_backbone

# fields whose other values need a companion
COMPANIONS = {
    "num_neighbors": {"propagation_loss_weight": 0.0, "propagation_consistency_loss_weight": 0.0},
    "head_hidden_size": {"head": "gcn"},
}


def test_defaults_are_those_of_the_design():
    config = BPGCNConfig()
    assert isinstance(config.backbone_config, Dinov2Config)
    assert (config.pooling, config.num_neighbors, config.ranking_metric) == ("cls", 10, "cosine")
    assert (config.ranking_temperature, config.learn_temperature) == (0.05, False)
    assert (config.ranking_relaxation, config.ranking_exclude_self) == ("softmax", True)
    assert (config.graph_symmetrization, config.graph_normalization) == ("none", "row")
    assert (config.head, config.self_weight) == ("gcn", 0.5)
    assert (config.head_hidden_size, config.head_num_layers, config.head_dropout) == (256, 2, 0.5)
    assert {name: getattr(config, name) for name in LOSS_WEIGHTS} == {
        "head_loss_weight": 0.1,
        "propagation_loss_weight": 1.0,
        "neighborhood_loss_weight": 0.0,
        "average_precision_loss_weight": 0.0,
        "consistency_loss_weight": 0.1,
        "propagation_consistency_loss_weight": 1.0,
    }
    assert (config.label_embedding, config.edge_dropout, config.bank_size) == (False, 0.0, 0)


def test_the_seed_is_the_letter_of_the_note_and_can_be_overridden():
    config = BPGCNConfig.seed(num_labels=5, num_neighbors=4)
    assert (config.ranking_temperature, config.ranking_normalization) == (1.0, "all")
    assert (config.ranking_exclude_self, config.num_neighbors, config.num_labels) == (False, 4, 5)
    assert (config.graph_normalization, config.graph_self_loop) == ("symmetric", "unit")
    assert (config.head, config.head_num_layers) == ("gcn", 2)
    assert [getattr(config, name) for name in LOSS_WEIGHTS] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert config.propagation_mix == 0


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken_and_any_other_is_refused_by_name(name):
    for value in CHOICES[name]:
        assert getattr(BPGCNConfig(**{name: value}), name) == value
    message = f"{name}='other' is unknown: choose one of {', '.join(CHOICES[name])}."
    with pytest.raises(ValueError, match=re.escape(message)):
        BPGCNConfig(**{name: "other"})


@pytest.mark.parametrize("name", RANGES)
def test_every_number_has_a_range_that_its_error_states(name):
    kind, lowest, highest, closed = RANGES[name]
    least = f"{'at least' if closed else 'above'} {lowest:g}"
    outside = [lowest - 1, math.nan, math.inf, "3", None, True]
    outside += [] if closed else [lowest]
    outside += [1.5] if kind is int else []
    if highest < math.inf:
        outside += [highest + 0.1] + ([] if closed else [highest])
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be a")) as error:
            BPGCNConfig(**{name: value})
        assert ("a whole number" if kind is int else "a number") in str(error.value)
        assert least in str(error.value)
        assert (f"{'at most' if closed else 'below'} {highest:g}" in str(error.value)) == (highest < math.inf)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_closed_range_are_inside(name):
    kind, lowest, highest, closed = RANGES[name]
    inside = [kind(lowest) if closed else lowest + 0.01]
    inside += [kind(highest) if closed else highest - 0.01] if highest < math.inf else [kind(1000)]
    for value in inside:
        assert getattr(BPGCNConfig(**({name: value} | COMPANIONS.get(name, {}))), name) == value


@pytest.mark.parametrize("name", ["learn_temperature", "ranking_exclude_self"])
def test_switches_are_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name}='yes' must be true or false"):
        BPGCNConfig(**{name: "yes"})


def test_a_whole_temperature_is_a_number():
    assert BPGCNConfig(ranking_temperature=1).ranking_temperature == 1


ONE_NEIGHBOR = (
    "num_neighbors=1 with ranking_normalization='selected' gives every edge weight 1, .* set propagation_loss_weight=0"
    " and propagation_consistency_loss_weight=0"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict.fromkeys(LOSS_WEIGHTS, 0.0), "All of head_loss_weight, .* are 0: nothing would train"),
        ({"graph_self_loop": "unit", "self_weight": 0.3}, "self_weight=0.3 has no effect with graph_self_loop='unit'"),
        (
            {"head": "gat", "head_hidden_size": 10, "head_num_attention_heads": 4},
            "head_hidden_size=10 must be a multiple of head_num_attention_heads=4",
        ),
        ({"num_neighbors": 1}, ONE_NEIGHBOR),
        ({"num_neighbors": 1, "propagation_loss_weight": 0.0}, ONE_NEIGHBOR),
        ({"num_neighbors": 1, "propagation_consistency_loss_weight": 0.0}, ONE_NEIGHBOR),
        (
            {"head": "label_propagation"} | only("consistency_loss"),
            "head='label_propagation' has no parameters, so .* set propagation_loss_weight,"
            " propagation_consistency_loss_weight, neighborhood_loss_weight or average_precision_loss_weight above 0",
        ),
        ({"label_embedding": True, "head": "linear"}, "label_embedding has no effect with head='linear'"),
        (
            {"label_embedding": True, "head": "label_propagation"},
            "label_embedding has no effect with head='label_propagation'",
        ),
    ],
    ids=[
        "no loss",
        "unit loop",
        "gat width",
        "one neighbour",
        "one neighbour, consistency",
        "one neighbour, masked",
        "loss without head",
        "classes for a linear head",
        "classes without a head",
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BPGCNConfig(**fields)


def test_what_resolves_a_contradiction_is_accepted():
    BPGCNConfig(num_neighbors=1, ranking_normalization="all")
    BPGCNConfig(num_neighbors=1, propagation_loss_weight=0.0, propagation_consistency_loss_weight=0.0)
    BPGCNConfig(graph_self_loop="unit")
    BPGCNConfig(head="gcn", head_hidden_size=10, head_num_attention_heads=4)
    for loss in ("propagation_loss", "propagation_consistency_loss", "neighborhood_loss"):
        BPGCNConfig(head="label_propagation", **only(loss))


def test_check_catches_what_was_set_after_construction():
    config = BPGCNConfig()
    config.ranking_temperature = -1.0
    with pytest.raises(ValueError, match=r"ranking_temperature=-1\.0 must be a number above 0"):
        config.check()


OPEN = 1e-3
FIELDS = {name: st.sampled_from(values) for name, values in CHOICES.items()}
FIELDS |= {
    name: st.integers(int(lowest), int(min(highest, 64)))
    if kind is int
    else st.floats(lowest + (not closed) * OPEN, min(highest, 10.0) - (not closed) * OPEN)
    for name, (kind, lowest, highest, closed) in RANGES.items()
}
FIELDS |= {"learn_temperature": st.booleans(), "ranking_exclude_self": st.booleans()}


@settings(max_examples=30, deadline=None)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS), kind=st.sampled_from(BACKBONES))
def test_every_accepted_choice_survives_a_round_trip(fields, kind):
    try:
        config = BPGCNConfig(backbone_config=tiny_backbone(kind), num_labels=4, **fields)
    except ValueError:
        reject()  # a contradiction; each has its own test above
    again = BPGCNConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in fields} == fields
    assert again.num_labels == 4


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_saved_config_comes_back_with_its_backbone(kind, tmp_path):
    config = BPGCNConfig(
        backbone_config=tiny_backbone(kind, num_hidden_layers=3), pooling="mean", id2label={0: "a", 1: "b"}
    )
    config.save_pretrained(tmp_path)
    for loaded in (BPGCNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is BPGCNConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert (loaded.backbone_config.model_type, loaded.backbone_config.num_hidden_layers) == (kind, 3)
        assert (loaded.pooling, loaded.id2label, loaded.num_labels) == ("mean", {0: "a", 1: "b"}, 2)


def test_the_backbone_can_be_a_dictionary():
    config = BPGCNConfig(backbone_config={"model_type": "vit", "hidden_size": 24})
    assert config.backbone_config.model_type == "vit"
    assert config.feature_size == 24


@pytest.mark.parametrize(("pooling", "times"), [("cls", 1), ("mean", 1), ("cls_mean", 2)])
def test_feature_size_follows_the_pooling(pooling, times):
    assert BPGCNConfig(backbone_config=tiny_backbone(), pooling=pooling).feature_size == 8 * times


def test_no_field_takes_the_name_of_a_generation_parameter():
    assert not {"temperature", "top_k"} & set(BPGCNConfig().to_dict())
