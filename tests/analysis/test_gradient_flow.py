"""The gradient's way: each norm is what autograd gives when it is asked another way, and each fault has its words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from peft import LoraConfig, get_peft_model
from PIL import Image

from modeling_bpgcn.analysis.gradient_flow import FEATURE, RANKING, SHARED, gradient_flow
from modeling_bpgcn.analysis.gradient_flow_plot import plot_gradient_flow, plot_temperature_sweep
from modeling_bpgcn.analysis.plots import WRONG
from modeling_bpgcn.analysis.temperature_sweep import temperature_sweep
from modeling_bpgcn.configuration_bpgcn import LOSS_WEIGHTS
from modeling_bpgcn.image_features import run_first_blocks
from modeling_bpgcn.ranking import Ranking
from tests.model_factory import BACKBONES, HEAD_NAMES, only, tiny_backbone, tiny_images, tiny_model

N = 14
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, -100, -100, -100, -100, -100, -100])
FLAT = {"ranking_temperature": 1.0, "ranking_exclude_self": False}


def feature_batch(dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {"features": torch.randn(N, 8, dtype=dtype), "labels": LABELS, "node_ids": torch.arange(N) + 50}


def image_batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": tiny_images(N), "labels": LABELS}


def with_weights(model, change):
    """The model with other edge weights, as a fault in the code would leave it."""
    rank = model.bpgcn.rank

    def changed(*args, **kwargs):
        ranking = rank(*args, **kwargs)
        return ranking._replace(weights=change(ranking.weights))

    model.bpgcn.rank = changed
    return model


def detached(model):
    return with_weights(model, torch.Tensor.detach)


def without_messages(model):
    """The model whose head reads its features without a gradient."""
    model.head.register_forward_pre_hook(lambda head, args: (args[0].detach(), *args[1:]))
    return model


def backpropagated(model, batch, seed=0, **extra):
    """The features of the batch and all gradients, by one plain backward pass."""
    model.zero_grad()
    torch.manual_seed(seed)
    batch = dict(batch)
    if "features" in batch:
        batch["features"] = batch["features"].clone().requires_grad_()
    outputs = model(**batch, **extra, support="batch")
    outputs.features.retain_grad()
    outputs.loss.backward()
    return outputs.features


def norm(parameters) -> float:
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


# --- the norms are autograd's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_edges_and_similarities_are_those_of_the_explicit_formula(normalization, exclude_self, symmetrization):
    model = tiny_model(
        ranking_normalization=normalization, ranking_exclude_self=exclude_self, graph_symmetrization=symmetrization
    ).double()
    batch = feature_batch()
    flow = gradient_flow(model, batch, seed=3)

    unit = torch.nn.functional.normalize(batch["features"], dim=-1)
    S = (unit @ unit.T).requires_grad_()
    candidates = ~torch.eye(N, dtype=torch.bool) if exclude_self else torch.ones(N, N, dtype=torch.bool)
    e = torch.exp(S / 0.1) * candidates
    neighbors = (S - 9.0 * ~candidates).topk(3).indices
    kept = e.gather(1, neighbors)
    weights = kept / (kept if normalization == "selected" else e).sum(-1, keepdim=True)
    weights.retain_grad()
    backpropagated(model, batch, seed=3, ranking=Ranking(neighbors, weights))
    assert S.grad.norm() > 1e-3
    assert flow.norms("edge weights") == {RANKING: pytest.approx(weights.grad.norm().item(), rel=1e-9)}
    assert flow.norms("similarities") == {RANKING: pytest.approx(S.grad.norm().item(), rel=1e-9)}


def test_the_softmax_over_the_selected_has_the_gradient_of_the_docstring():
    model = tiny_model().double()
    batch = feature_batch()
    torch.manual_seed(0)
    outputs = model(**batch | {"features": batch["features"].clone().requires_grad_()}, support="batch")
    a = outputs.neighbor_weights
    [g] = torch.autograd.grad(outputs.loss, [a])
    by_hand = a * (g - (g * a).sum(-1, keepdim=True)) / 0.1
    assert by_hand.norm() > 1e-3
    assert gradient_flow(model, batch).norms("similarities")[RANKING] == pytest.approx(by_hand.norm().item(), rel=1e-9)


@pytest.mark.parametrize("relaxation", ["straight_through", "lapsum", "threshold", "entmax", "sparsemax", "gumbel"])
def test_similarities_of_every_relaxation_explain_what_reaches_the_features(relaxation):
    # the stage is there only if its gradient, carried on, is the one of the features
    model = tiny_model(ranking_relaxation=relaxation, num_neighbors=5, ranking_temperature=0.5).double()
    assert gradient_flow(model, feature_batch()).norms("similarities")[RANKING] > 1e-4


def test_a_ranking_of_another_kind_has_no_similarities():
    flow = gradient_flow(with_weights(tiny_model().double(), lambda weights: weights**2), feature_batch())
    assert flow.norms("features")[RANKING] > 0
    with pytest.raises(KeyError):
        flow.norms("similarities")


@pytest.mark.parametrize("head", [name for name in HEAD_NAMES if name != "label_propagation"])
def test_each_path_is_what_is_left_when_the_other_is_cut(head):
    batch, state = feature_batch(), torch.get_rng_state()

    def model():
        torch.set_rng_state(state)
        return tiny_model(head=head, neighborhood_loss_weight=0.5).double()

    flow = gradient_flow(model(), batch)
    ranked = backpropagated(without_messages(model()), batch).grad
    total = backpropagated(model(), batch).grad
    messages = total - ranked
    assert min(ranked.norm(), messages.norm()) > 1e-3
    expected = {FEATURE: messages.norm().item(), RANKING: ranked.norm().item()}
    assert flow.norms("features") == pytest.approx(expected, rel=1e-9)
    assert flow.norms("messages") == pytest.approx({FEATURE: messages.norm().item()}, rel=1e-9)
    cosine = torch.cosine_similarity(messages.flatten(), ranked.flatten(), dim=0)
    assert flow.cosine == pytest.approx(cosine.item(), rel=1e-9)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_blocks_get_the_gradient_of_each_path_by_itself(backbone):
    batch, state = image_batch(), torch.get_rng_state()

    def model():
        torch.set_rng_state(state)
        return tiny_model(backbone_config=tiny_backbone(backbone))

    flow = gradient_flow(model(), batch)
    for path, cut in ((FEATURE, detached), (RANKING, without_messages)):
        one = cut(model())
        backpropagated(one, batch)
        [blocks] = (m for m in one.bpgcn.backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
        parts = {"block 0": blocks[0], "block 1": blocks[1], "embeddings": one.bpgcn.backbone.embeddings}
        for name, part in (parts | {"last norm": one.bpgcn.backbone.layernorm}).items():
            assert norm(part.parameters()) > 1e-4
            assert flow.norms(name)[path] == pytest.approx(norm(part.parameters()), rel=1e-3), (name, path)


def test_layers_of_the_head_come_last_to_first_with_their_parameters_gradient():
    model, batch = tiny_model(head="arma"), feature_batch(torch.float32)
    flow = gradient_flow(model, batch)
    assert [stage.name for stage in flow.stages][:7] == [
        "loss",
        *(f"head {layer} {what}" for layer in ("linear", "layer 1", "layer 0") for what in ("output", "weights")),
    ]
    assert flow.norms("loss") == {SHARED: 1.0}
    backpropagated(model, batch)
    for name, layer in (("linear", model.head.linear), ("layer 0", model.head.layers[0])):
        assert norm(layer.parameters()) > 1e-3
        assert flow.norms(f"head {name} weights")[SHARED] == pytest.approx(norm(layer.parameters()), rel=1e-4)


def test_the_parts_of_the_objective_add_up_and_go_their_own_ways():
    weights = {"neighborhood_loss_weight": 0.25, "propagation_loss_weight": 2.0, "consistency_loss_weight": 0.0}
    model, batch = tiny_model(**weights).double(), feature_batch()
    flow = gradient_flow(model, batch)
    torch.manual_seed(0)
    assert sum(part["value"] for part in flow.loss_parts.values()) == pytest.approx(
        model(**batch, support="batch").loss.item(), rel=1e-9
    )
    # only the head reads messages, and the others are pure ranking
    assert flow.loss_parts["head_loss"][FEATURE] == pytest.approx(flow.norms("messages")[FEATURE], rel=1e-9)
    assert {name for name, part in flow.loss_parts.items() if part[FEATURE] is not None} == {"head_loss"}
    assert all(part[RANKING] > 1e-4 for part in flow.loss_parts.values())


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.1, 10.0), temperature=st.floats(0.05, 2.0), k=st.integers(2, N + 3))
def test_a_scaled_objective_scales_every_norm_and_no_share(scale, temperature, k):
    torch.manual_seed(k)
    batch = feature_batch()
    fields = {"ranking_temperature": temperature, "num_neighbors": k}
    model = tiny_model(**fields).double()
    one = gradient_flow(model, batch)
    for name in LOSS_WEIGHTS:
        setattr(model.config, name, scale * getattr(model.config, name))
    other = gradient_flow(model, batch)
    for stage in one.stages[1:]:
        scaled = {path: value * scale for path, value in stage.norms.items()}
        assert other.norms(stage.name) == pytest.approx(scaled, rel=1e-6)
    assert other.edge_share == pytest.approx(one.edge_share, rel=1e-6)
    assert 0 < one.edge_share < 1
    assert (one.edges_reached, one.unlabeled_reached) == (other.edges_reached, other.unlabeled_reached)
    assert 1 <= one.effective_neighbors <= one.num_neighbors == min(k, N - 1)


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_component_without_labels_gets_no_gradient():
    torch.manual_seed(1)
    # two groups far apart: 6 images of which 4 are labelled, and 8 unlabelled ones
    centers = torch.cat([torch.eye(8)[:1].repeat(6, 1), torch.eye(8)[1:2].repeat(8, 1)]).double()
    features = centers + 0.3 * torch.rand(N, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, *[-100] * 10])
    model = tiny_model(consistency_loss_weight=0.0).double()
    flow = gradient_flow(model, {"features": features, "labels": labels})
    assert flow.edges_reached == pytest.approx(6 / N)
    assert flow.unlabeled_reached == {FEATURE: pytest.approx(2 / 10), RANKING: pytest.approx(2 / 10)}


def test_the_state_of_the_ranking_is_measured():
    batch = feature_batch()
    model = tiny_model(ranking_exclude_self=False, ranking_normalization="all").double()
    flow = gradient_flow(model, batch)
    unit = torch.nn.functional.normalize(batch["features"], dim=-1)
    weights = torch.softmax(unit @ unit.T / 0.1, dim=-1)
    assert flow.self_mass == pytest.approx(weights.diagonal().mean().item(), rel=1e-9)
    kept = weights.topk(3).values
    kept = kept / kept.sum(-1, keepdim=True)
    assert flow.effective_neighbors == pytest.approx(torch.special.entr(kept).sum(-1).exp().mean().item(), rel=1e-9)
    assert gradient_flow(tiny_model().double(), batch).self_mass is None


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_ranking_that_trains_is_told_from_one_that_is_flat():
    batch = feature_batch()
    trains = gradient_flow(tiny_model().double(), batch)
    assert trains.verdict.startswith(f"The ranking trains: {100 * trains.edge_share:.0f} % of the features'")
    flat = gradient_flow(tiny_model(**FLAT | {"ranking_temperature": 1000.0}).double(), batch)
    assert flat.verdict.startswith("The ranking is flat: tau = 1e+03 leaves the weights within")
    assert 0 < flat.edge_share < 0.05 < trains.edge_share
    assert flat.edges_reached == trains.edges_reached == 1.0


def test_detached_weights_are_a_fault_on_every_stage_of_the_ranking():
    flow = gradient_flow(detached(tiny_model()), image_batch())
    assert flow.verdict == "FAULT: the edges carry no gradient. Their weights are detached or constant."
    names = ["edge weights", "similarities", "features", "last norm", "block 1", "block 0", "embeddings"]
    assert [flow.norms(name)[RANKING] for name in names] == [None] * len(names)
    assert all(flow.norms(name)[FEATURE] > 0 for name in names[2:])
    assert (flow.edge_share, flow.edges_reached, flow.cosine) == (0.0, 0.0, None)
    assert flow.unlabeled_reached[RANKING] == 0.0 < flow.unlabeled_reached[FEATURE]


def test_weights_that_no_graph_reads_are_a_fault():
    model = tiny_model()
    for name in ("_graph", "_label_graph"):
        build = getattr(model, name)
        setattr(
            model, name, lambda ranking, *rest, build=build: build(Ranking(ranking.indices, ranking.weights.detach()))
        )
    verdict = gradient_flow(model, feature_batch(torch.float32)).verdict
    assert verdict == "FAULT: the edges carry no gradient. Their weights were never handed to the graph."


def test_a_ranking_of_detached_features_is_a_fault_although_its_edges_have_a_gradient():
    model = tiny_model(learn_temperature=True)
    rank = model.bpgcn.rank
    model.bpgcn.rank = lambda query, *rest: rank(query.detach(), *rest)
    flow = gradient_flow(model, feature_batch(torch.float32))
    assert flow.verdict.startswith("FAULT: the edges' gradient does not reach the features.")
    assert flow.norms("edge weights")[RANKING] > 0
    assert flow.norms("similarities")[RANKING] is flow.norms("features")[RANKING] is None


def test_a_neighborhood_loss_does_not_hide_dead_edges():
    flow = gradient_flow(detached(tiny_model(neighborhood_loss_weight=1.0)), image_batch())
    assert flow.verdict.startswith("FAULT")
    assert flow.norms("features")[RANKING] > 0
    assert flow.edge_share == 0.0


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"head": "linear"} | only("head_loss"), "No loss reads the edges: head='linear'"),
        ({"ranking_temperature": 1e-5}, "The ranking is saturated: tau = 1e-05 leaves 1.0 effective neighbors of 3"),
        ({"ranking_exclude_self": False, "ranking_temperature": 0.01}, "The ranking is drowned: tau = 0.01 gives"),
        ({"num_neighbors": 1} | only("head_loss"), "The ranking is fixed: the weight of a single"),
    ],
)
def test_settings_that_keep_the_ranking_from_training_are_named(fields, begins):
    torch.manual_seed(2)
    assert gradient_flow(tiny_model(**fields).double(), feature_batch()).verdict.startswith(begins)


def test_a_batch_that_asks_nothing_is_no_fault():
    batch = feature_batch() | {"labels": torch.tensor([0] + [-100] * (N - 1))}
    flow = gradient_flow(tiny_model(**only("propagation_loss")).double(), batch)
    assert flow.verdict == "No gradient: the loss asks nothing of this graph, of which 1 images are labeled."


# --- every kind of model and batch ------------------------------------------------------------------------------------


def test_without_a_head_there_is_one_path():
    flow = gradient_flow(tiny_model(head="label_propagation"), image_batch())
    assert flow.edge_share == 1.0
    assert "100 % of the features' gradient" in flow.verdict
    assert [stage.name for stage in flow.stages][:3] == ["loss", "edge weights", "similarities"]
    assert set(flow.norms("features")) == set(flow.norms("block 0")) == set(flow.unlabeled_reached) == {RANKING}


def test_frozen_blocks_say_so_and_the_others_do_not_change():
    model, batch = tiny_model(), image_batch()
    whole = gradient_flow(model, batch)
    model.bpgcn.backbone.embeddings.requires_grad_(False)
    model.bpgcn.backbone.encoder.layer[0].requires_grad_(False)
    frozen = gradient_flow(model, batch)
    assert frozen.norms("embeddings") == frozen.norms("block 0") == {}
    assert frozen.norms("block 1") == pytest.approx(whole.norms("block 1"), rel=1e-5)
    assert "frozen" in frozen.table()

    model.bpgcn.prefix_blocks = 1
    states = run_first_blocks(model.bpgcn.backbone, batch["pixel_values"], 1)
    cached = gradient_flow(model, {"hidden_states": states, "labels": LABELS})
    assert cached.norms("block 1") == pytest.approx(whole.norms("block 1"), rel=1e-4)

    model.bpgcn.requires_grad_(False)
    assert gradient_flow(model, batch).norms("features") == pytest.approx(whole.norms("features"), rel=1e-5)


def test_adapters_are_what_trains_of_a_block():
    model = tiny_model()
    settings = LoraConfig(r=2, target_modules=r".*encoder.*\.q_proj", modules_to_save=["head"], init_lora_weights=False)
    flow = gradient_flow(get_peft_model(model, settings), image_batch())
    assert flow.norms("embeddings") == {}
    assert flow.norms("block 0")[RANKING] > 0
    assert [stage.name for stage in flow.stages if "weights" in stage.name and "head" in stage.name] == [
        "head modules_to_save default layer 1 weights",
        "head modules_to_save default layer 0 weights",
    ]


def test_nothing_is_left_behind():
    model = tiny_model(learn_temperature=True, neighborhood_loss_weight=1.0).train()
    model.head.eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes, config = [m.training for m in model.modules()], model.config.to_dict()
    state = torch.get_rng_state()
    gradient_flow(model, image_batch_of(state))
    temperature_sweep(model, image_batch_of(state), [0.01, 1.0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def image_batch_of(state) -> dict[str, torch.Tensor]:
    batch = image_batch()
    torch.set_rng_state(state)
    return batch


def test_dropout_is_off_and_the_seed_draws_the_labels():
    batch = feature_batch(torch.float32)
    model = tiny_model(head_dropout=0.5).train()
    assert gradient_flow(model, batch) == gradient_flow(model, batch)
    assert gradient_flow(model, batch).norms("edge weights") != gradient_flow(model, batch, seed=1).norms(
        "edge weights"
    )


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="no `labels`"):
        gradient_flow(tiny_model(), {"features": torch.randn(N, 8)})


# --- what users read --------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_stage_and_the_verdict_last():
    flow = gradient_flow(detached(tiny_model()), image_batch())
    lines = flow.table().splitlines()
    assert lines[0].split() == ["stage", "feature", "path", "ranking", "path"]
    for line, stage in zip(lines[1:], flow.stages, strict=False):
        assert line.startswith(stage.name)
    [edges] = (line for line in lines if line.startswith("edge weights"))
    assert edges.split() == ["edge", "weights", "-", "none"]
    assert lines[-1] == flow.verdict


def test_the_numbers_are_finite_whatever_is_missing():
    flows = [gradient_flow(change(tiny_model()), image_batch()) for change in (lambda model: model, detached)]
    sound, faulty = (flow.numbers() for flow in flows)
    assert all(np.isfinite(value) for numbers in (sound, faulty) for value in numbers.values())
    assert sound["gradient_flow_ranking_path_norm"] == flows[0].norms("features")[RANKING]
    assert faulty["gradient_flow_ranking_path_norm"] == faulty["gradient_flow_edge_share"] == 0.0
    assert set(sound) - set(faulty) == {"gradient_flow_cosine"}


def texts(axes, color):
    return [text.get_text().strip() for text in axes.texts if to_hex(text.get_color()) == color]


def test_the_three_cases_differ_at_a_glance(tmp_path):
    batch = image_batch()
    models = {"default": tiny_model(), "detached weights": detached(tiny_model()), "tau = 1": tiny_model(**FLAT)}
    flows = {name: gradient_flow(model, batch) for name, model in models.items()}
    figure = plot_gradient_flow(flows, tmp_path / "new" / "flow.png")
    default, faulty, flat = figure.axes
    assert texts(default, WRONG) == texts(flat, WRONG) == []
    # edges, similarities, features, last norm, two blocks, embeddings
    assert texts(faulty, WRONG) == ["none"] * 7
    assert default.get_xlim() == faulty.get_xlim() == flat.get_xlim()
    labels = [label.get_text() for label in default.get_yticklabels()]
    assert labels == [stage.name for stage in flows["default"].stages]
    written = [" ".join(text.get_text().split()) for text in figure.texts]
    for name, flow in flows.items():
        assert name in written
        assert flow.verdict in written
    assert any("edges with a gradient: 0 %" in text for text in written)
    with Image.open(tmp_path / "new" / "flow.png") as image:
        assert np.asarray(image.convert("L")).min() < 100


def test_models_of_different_depth_share_the_stages(tmp_path):
    flows = {
        "two": gradient_flow(tiny_model(), image_batch()),
        "three": gradient_flow(
            tiny_model(backbone_config=tiny_backbone(num_hidden_layers=3), head="label_propagation"), image_batch()
        ),
    }
    figure = plot_gradient_flow(flows, tmp_path / "flow.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-5:] == ["last norm", "block 2", "block 1", "block 0", "embeddings"]
    assert len(labels) == len(set(labels))


def test_no_flow_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="No gradient flow to draw"):
        plot_gradient_flow({}, tmp_path / "flow.png")


# --- the temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_the_gradient_vanishes_at_both_ends(learned, tmp_path):
    model, batch = tiny_model(learn_temperature=learned).double(), feature_batch()
    sweep = temperature_sweep(model, batch, [1e-3, 0.01, 0.1, 1.0, 10.0, 100.0])
    peak = max(sweep.typical_norms)
    assert peak > 1e-3
    assert sweep.typical_norms[0] < 1e-6 * peak
    assert sweep.typical_norms[-1] < 0.05 * peak
    # warm: 1 / tau
    assert sweep.ranking_norms[-2] / sweep.ranking_norms[-1] == pytest.approx(10, rel=0.05)
    assert sweep.effective_neighbors == sorted(sweep.effective_neighbors)
    assert (sweep.effective_neighbors[0], sweep.effective_neighbors[-1]) == pytest.approx((1, 3), rel=0.02)
    assert sweep.current == pytest.approx(0.1)

    flow = gradient_flow(model, batch)
    at_current = sweep.feature_norms[2], sweep.ranking_norms[2]
    assert at_current == pytest.approx(tuple(flow.norms("features").values()), rel=1e-6)
    figure = plot_temperature_sweep(sweep, tmp_path / "sweep.png")
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["ranking path"] == sweep.ranking_norms
    assert (tmp_path / "sweep.png").is_file()


def test_images_between_two_equal_neighbors_hold_up_the_whole_norm_of_a_cold_ranking():
    torch.manual_seed(0)
    batch = feature_batch()
    # image 0 has two nearest neighbours, one on each side
    image = batch["features"][0]
    aside = torch.linalg.svd(image[None]).Vh[1] * 0.1 * image.norm()
    batch["features"][1], batch["features"][2] = image + aside, image - aside
    sweep = temperature_sweep(tiny_model().double(), batch, [1e-6, 1e-5, 0.05])
    assert sweep.ranking_norms[0] == pytest.approx(10 * sweep.ranking_norms[1], rel=0.01)
    assert sweep.ranking_norms[0] > sweep.ranking_norms[2]
    assert sweep.typical_norms[0] < 1e-6 * sweep.typical_norms[2]


def test_a_ranking_that_passes_nothing_can_be_drawn(tmp_path):
    model = detached(tiny_model(**only("propagation_loss")))
    sweep = temperature_sweep(model, feature_batch(torch.float32), [0.1, 1.0])
    assert sweep.ranking_norms == sweep.feature_norms == [0.0, 0.0]
    plot_temperature_sweep(sweep, tmp_path / "sweep.png")


@pytest.mark.parametrize("temperatures", [[], [0.1, 0.0], [-1.0], [float("inf")]])
def test_temperatures_out_of_range_are_refused(temperatures):
    with pytest.raises(ValueError, match="must be numbers above 0"):
        temperature_sweep(tiny_model(), feature_batch(torch.float32), temperatures)
