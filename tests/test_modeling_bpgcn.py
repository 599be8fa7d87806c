"""The models: from pixels to an answer, with any backbone, saved, loaded, compiled, in half precision, and the seed."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
)

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification, BPGCNModel, ranking
from modeling_bpgcn import modeling_bpgcn as modeling
from modeling_bpgcn.modeling_bpgcn import BPGCNImageClassifierOutput, BPGCNModelOutput
from modeling_bpgcn.ranking import soft_topk
from tests.model_factory import (
    BACKBONES,
    CLASSES,
    HEAD_NAMES,
    captured_warnings,
    tiny_backbone,
    tiny_config,
    tiny_images,
    tiny_model,
)

ROOT = Path(__file__).parents[1]
LABELS = torch.tensor([0, 1, 2, 0, 1, -100, 0, -100, 1, -100, 2, 2])


def trainable(model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, images: Tensor, labels: Tensor = LABELS, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, with one draw of the masked propagation."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(images, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- the letter of the note ------------------------------------------------------------------------------------------


def seed_loss(x: Tensor, layers: list[tuple[Tensor, Tensor]], labels: Tensor) -> Tensor:
    """Equations 2 to 5 of the note, A + I, symmetric normalisation, two GCN layers, NLL on the labelled rows."""
    unit = F.normalize(x, p=2, dim=1)
    similarity = unit @ unit.T
    soft_weights = F.softmax(similarity / 1.0, dim=1)
    _, rankings = torch.topk(similarity, k=10)
    top_k_weights = soft_weights.gather(1, rankings)
    A = torch.zeros_like(similarity).scatter(1, rankings, top_k_weights) + torch.eye(len(x), dtype=x.dtype)
    degree = A.sum(1)
    P = A / degree[:, None].sqrt() / degree[None, :].sqrt()
    (weight1, bias1), (weight2, bias2) = layers
    x = F.relu(P @ x @ weight1.T + bias1)
    output = F.log_softmax(P @ x @ weight2.T + bias2, dim=1)
    return F.nll_loss(output[labels >= 0], labels[labels >= 0])


def test_the_seed_config_is_the_notes_formula_in_value_and_every_gradient():
    fields = {"backbone_config": tiny_backbone(), "num_labels": CLASSES, "head_hidden_size": 6}
    model = BPGCNForImageClassification(BPGCNConfig.seed(**fields)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images, labels = tiny_images(24).double(), LABELS.repeat(2)
    layers = [(layer.weight, layer.bias) for layer in model.head.layers]
    assert len(layers) == 2
    features = model.get_image_features(images)
    features.retain_grad()
    expected = seed_loss(features, layers, labels)
    expected.backward()
    expected_gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    at_features = features.grad

    loss, actual_gradients = gradients(model, images, labels)
    assert_close(loss, expected.detach())
    # softmax over keys ignores what all of them share, so their bias gets none
    reached = [
        gradient.abs().max() > 1e-8 for name, gradient in expected_gradients.items() if "k_proj.bias" not in name
    ]
    assert all(reached)
    assert_close(actual_gradients, expected_gradients)

    leaf = features.detach().requires_grad_()
    model(features=leaf, labels=labels).loss.backward()
    assert at_features.abs().max() > 1e-3
    assert_close(leaf.grad, at_features)


# --- pixels to features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 12])  # the configured one and another
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_trains_and_answers(kind, size):
    model, images = tiny_model(backbone_config=tiny_backbone(kind)), tiny_images(12, size)
    model.train()
    loss, found = gradients(model, images)
    assert loss > 0
    # DDP waits for every gradient that it was promised
    assert set(found) == set(trainable(model))
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    with torch.no_grad():
        model.eval().set_support_bank(model.get_image_features(images), LABELS)
        answer = model(images[:5])
    assert answer.logits.shape == (5, CLASSES)
    assert_close(answer.logits.exp().sum(-1), torch.ones(5))
    assert answer.features.shape == (5, 8)
    assert answer.neighbor_indices.shape == answer.neighbor_weights.shape == (5, 3)


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_every_head_trains_and_answers(head):
    model, images = tiny_model(head=head), tiny_images(12)
    model.train()
    loss, found = gradients(model, images)
    assert loss > 0
    assert set(found) == set(trainable(model))
    with torch.no_grad():
        model.eval().set_support_bank(model.get_image_features(images), LABELS)
        answer = model(images[:5]).logits
    assert_close(answer.exp().sum(-1), torch.ones(5))
    assert answer.std(0).max() > 1e-3


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_pooling_reads_the_class_token_or_the_patches(pooling, kind):
    model, images = tiny_model(backbone_config=tiny_backbone(kind), pooling=pooling), tiny_images(3)
    with torch.no_grad():
        tokens = model.bpgcn.backbone(images).last_hidden_state
        pooled = model.get_image_features(images)
    assert tokens.shape[1] == 1 + 4 + (4 if kind == "dinov2_with_registers" else 0)
    parts = {"cls": [tokens[:, 0]], "mean": [tokens[:, -4:].mean(1)]}  # the patches come last, after any registers
    assert_close(pooled, torch.cat(parts["cls"] + parts["mean"] if pooling == "cls_mean" else parts[pooling], -1))


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbones_weights_are_loaded(kind, tmp_path):
    backbone = AutoModel.from_config(tiny_backbone(kind)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    backbone.save_pretrained(tmp_path)
    for model_class in (BPGCNForImageClassification, BPGCNModel):
        model = model_class.from_backbone_pretrained(tmp_path, num_labels=5, pooling="mean", num_neighbors=4).eval()
        assert (model.config.num_labels, model.config.pooling, model.config.num_neighbors) == (5, "mean", 4)
        assert type(model.config.backbone_config) is type(backbone.config)
        assert_close(model.base_model.backbone.state_dict(), backbone.state_dict(), atol=0, rtol=0)
        with torch.no_grad():
            tokens = backbone(torch.ones(2, 3, 8, 8)).last_hidden_state
            assert torch.equal(model.base_model.backbone(torch.ones(2, 3, 8, 8)).last_hidden_state, tokens)


@pytest.mark.parametrize(
    ("field", "hint"), [("num_neighbours", "Did you mean num_neighbors?"), ("xyzzy", "is no field of BPGCNConfig.")]
)
def test_an_unknown_field_is_named_with_the_nearest(field, hint, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{field}=4 is no field of BPGCNConfig.")) as error:
        BPGCNForImageClassification.from_backbone_pretrained(tmp_path, **{field: 4})
    assert str(error.value).endswith(hint)


def test_parameters_that_never_get_a_gradient_are_frozen_when_made_and_when_loaded(tmp_path):
    for kind, unused in (("dinov2", {"embeddings.mask_token"}), ("vit", {"pooler.dense.weight", "pooler.dense.bias"})):
        made = tiny_model(backbone_config=tiny_backbone(kind))
        made.save_pretrained(tmp_path / kind)
        made.bpgcn.backbone.save_pretrained(tmp_path / f"{kind} backbone")
        for model in (
            made,
            BPGCNForImageClassification.from_pretrained(tmp_path / kind),
            BPGCNForImageClassification.from_backbone_pretrained(tmp_path / f"{kind} backbone"),
        ):
            parameters = dict(model.bpgcn.backbone.named_parameters())
            assert {name for name, parameter in parameters.items() if not parameter.requires_grad} == unused


# --- features to neighbours ------------------------------------------------------------------------------------------


def test_the_base_model_returns_features_and_their_ranking():
    model, images = BPGCNModel(tiny_config()).eval(), tiny_images(6)
    output = model(images, support="batch")
    assert isinstance(output, BPGCNModelOutput)
    assert_close(output.features, model.get_image_features(images))
    expected = soft_topk(output.features, num_neighbors=3, temperature=0.1)
    assert torch.equal(output.neighbor_indices, expected.indices)
    assert_close(output.neighbor_weights, expected.weights)
    output.neighbor_weights[:, 0].sum().backward()
    reached = [p.grad is not None and p.grad.abs().max() > 0 for p in trainable(model.backbone).values()]
    assert all(reached)


@pytest.mark.parametrize(
    ("field", "value", "keyword"),
    [
        ("num_neighbors", 2, "num_neighbors"),
        ("ranking_metric", "euclidean", "metric"),
        ("ranking_temperature", 0.7, "temperature"),
        ("ranking_relaxation", "lapsum", "relaxation"),
        ("ranking_normalization", "all", "normalization"),
        ("ranking_exclude_self", False, "exclude_self"),
    ],
)
def test_each_ranking_option_of_the_config_reaches_the_operator(field, value, keyword):
    model, x = tiny_model(**{field: value}), torch.randn(7, 8)
    expected = soft_topk(x, **({"num_neighbors": 3, "temperature": 0.1} | {keyword: value}))
    ranking = model.bpgcn.rank(x)
    assert torch.equal(ranking.indices, expected.indices)
    assert_close(ranking.weights, expected.weights)
    default = soft_topk(x, num_neighbors=3, temperature=0.1)
    assert default.weights.shape != ranking.weights.shape or not torch.equal(default.weights, ranking.weights)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph_symmetrization", "mean"),
        ("graph_symmetrization", "mutual"),
        ("graph_normalization", "symmetric"),
        ("graph_self_loop", "unit"),
        ("self_weight", 0.1),
    ],
)
def test_each_graph_option_of_the_config_reaches_the_answer(field, value):
    answers, x = [], torch.randn(9, 8)
    for fields in ({}, {field: value}):
        torch.manual_seed(1)
        # softmax over all, else the rows of the directed graph sum to 1 and every normalisation is the same
        answers.append(tiny_model(ranking_normalization="all", **fields)(features=x, support="batch").logits)
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_the_same_image_twice_in_a_batch_is_no_neighbour_of_itself():
    model, x = tiny_model(), torch.randn(6, 8)
    x, ids = torch.cat([x, x[:2]]), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    output = model(features=x, node_ids=ids, support="batch")
    assert not (ids[output.neighbor_indices] == ids[:, None]).any()
    assert (model(features=x, support="batch").neighbor_indices[:2, 0] == torch.tensor([6, 7])).all()


def test_fewer_candidates_than_neighbours_is_said_once():
    model = tiny_model(num_neighbors=8)
    with captured_warnings(modeling.logger) as messages:
        for _ in range(2):
            output = model(features=torch.randn(5, 8), support="batch")
    assert output.neighbor_indices.shape == (5, 4)
    assert len(messages) == 1
    assert "num_neighbors=8 is more than the 4 candidates of this graph: 4 are used" in messages[0]


def test_neighbours_are_drawn_by_lot_in_training_only():
    model, x = tiny_model(ranking_relaxation="gumbel", ranking_temperature=0.5), torch.randn(12, 8)
    mean = soft_topk(x, num_neighbors=3, temperature=0.5, relaxation="gumbel_mean")
    assert torch.equal(model.bpgcn.rank(x).weights, mean.weights)
    model.set_support_bank(x, torch.arange(12) % 3)
    queries = torch.randn(5, 8)
    alone = [model(features=query[None]).logits for query in queries]
    assert_close(torch.cat(alone), model(features=queries).logits)
    model.train()
    assert not torch.equal(model.bpgcn.rank(x).indices, model.bpgcn.rank(x).indices)


def test_support_classes_are_seen_by_label_propagation_alone():
    model, x = tiny_model(propagation_mix=1.0), torch.randn(12, 8)
    seen = model(features=x, support="batch", support_classes=LABELS)
    graph = model._label_graph(model.bpgcn.rank(x))
    z, _ = model.label_propagation(graph, torch.eye(CLASSES)[LABELS.clamp_min(0)] * (LABELS >= 0)[:, None])
    arrived = z.sum(-1) > 0
    assert arrived.sum() > 6
    assert_close(seen.logits[arrived], model.label_propagation.log_probabilities(z)[arrived])
    without = model(features=x, support="batch", labels=LABELS)
    assert torch.equal(without.logits, model(features=x, support="batch").logits)  # labels are not seen


def test_label_propagation_of_a_batch_whose_classes_nobody_gave_knows_nothing():
    answer = tiny_model(head="label_propagation")(features=torch.randn(5, 8), support="batch").logits
    assert_close(answer, torch.full((5, CLASSES), -math.log(CLASSES)))


# --- a learned temperature -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["all", "selected"])
def test_a_learned_temperature_gets_a_gradient_and_survives_saving(normalization, tmp_path):
    model = tiny_model(learn_temperature=True, ranking_normalization=normalization).train()
    log_tau = model.bpgcn.ranking_temperature.log_temperature
    assert_close(log_tau.exp().item(), 0.1)
    _, found = gradients(model, tiny_images(12))
    assert found["bpgcn.ranking_temperature.log_temperature"].isfinite()
    assert found["bpgcn.ranking_temperature.log_temperature"].abs() > 1e-4
    torch.optim.SGD([log_tau], lr=0.1).step()
    assert log_tau.exp().item() != pytest.approx(0.1)
    model.save_pretrained(tmp_path)
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.bpgcn.ranking_temperature.log_temperature, log_tau)


def test_a_learned_temperature_stays_within_its_bounds():
    temperature = tiny_model(learn_temperature=True).bpgcn.ranking_temperature
    for value, bound in ((-50.0, 1e-3), (50.0, 100.0)):
        torch.nn.init.constant_(temperature.log_temperature, value)
        assert temperature().item() == pytest.approx(bound)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 3, 10, 8), r"Images of \(10, 8\) pixels do not divide into patches of \(4, 4\): .* as 8 or 12"),
        (torch.zeros(2, 3, 8, 3), r"Images of \(8, 3\) pixels do not divide .* such as 4 or 4"),
        (torch.zeros(3, 8, 8), r"pixel_values must be \[batch, channels, height, width\]; got \(3, 8, 8\)"),
    ],
    ids=["no multiple", "smaller than a patch", "no batch"],
)
def test_pixels_that_do_not_fit_are_named(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(pixels, support="batch")


def test_features_that_are_not_finite_are_named():
    x = torch.randn(6, 8)
    x[1, 3], x[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"features of rows \[1, 4\] of 6 are not finite: look for broken images"):
        tiny_model()(features=x, support="batch")
    images = tiny_images(3)
    images[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"features of rows \[2\] of 3 are not finite"):
        tiny_model()(images, support="batch")


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": torch.zeros(2, 3, 8, 8), "features": torch.zeros(2, 8)}])
@pytest.mark.parametrize("model_class", [BPGCNForImageClassification, BPGCNModel])
def test_pixels_and_features_are_alternatives(model_class, inputs):
    with pytest.raises(ValueError, match="Pass either pixel_values or features"):
        model_class(tiny_config())(**inputs)


@pytest.mark.parametrize("model_class", [BPGCNForImageClassification, BPGCNModel])
def test_an_unknown_support_is_named(model_class):
    with pytest.raises(ValueError, match="support='graph' is unknown: choose one of bank, batch, transductive"):
        model_class(tiny_config())(features=torch.randn(5, 8), support="graph")


@pytest.mark.parametrize("relaxation", ["softmax", "lapsum", "threshold", "entmax"])
def test_all_zero_features_give_a_finite_answer_and_gradient(relaxation):
    model = tiny_model(ranking_relaxation=relaxation, learn_temperature=True).train()
    x = torch.zeros(12, 8, requires_grad=True)
    output = model(features=x, labels=LABELS)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_single_image_is_answered():
    output = tiny_model()(tiny_images(1), support="batch")
    assert output.logits.isfinite().all()
    assert output.neighbor_indices.shape == (1, 0)


# --- what transformers offers passes through -------------------------------------------------------------------------


def test_outputs_come_as_a_tuple_when_asked_for():
    model, x = tiny_model(), torch.randn(5, 8)
    output = model(features=x, support="batch")
    assert isinstance(output, BPGCNImageClassifierOutput)
    as_tuple = model(features=x, support="batch", return_dict=False)
    assert_close(list(as_tuple), [output.logits, output.features, output.neighbor_indices, output.neighbor_weights])
    assert len(model.bpgcn(features=x, support="batch", return_dict=False)) == 3
    assert output.path_features is None
    assert len(model(features=x, support="batch", output_path_features=True).path_features) == 2


def test_a_frozen_backbone_is_run_without_gradient():
    model = tiny_model().train()
    output = model(tiny_images(12), labels=LABELS, train_backbone=False)
    output.loss.backward()
    assert not output.features.requires_grad
    assert all(parameter.grad is None for parameter in model.bpgcn.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.head.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradients(kind):
    model, images, calls = tiny_model(backbone_config=tiny_backbone(kind)).train(), tiny_images(12), []
    layer = next(m for m in model.modules() if type(m).__name__.endswith("Layer"))
    norm = next(m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm))
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(model, images)
    assert len(calls) == 1
    model.activation_checkpointing_enable()
    checkpointed = gradients(model, images)
    assert len(calls) == 3
    assert_close(checkpointed, plain)


@pytest.mark.parametrize("kind", BACKBONES)
def test_sdpa_and_eager_attention_agree(kind, tmp_path):
    tiny_model(backbone_config=tiny_backbone(kind)).save_pretrained(tmp_path)
    answers, images = [], tiny_images(12)
    for implementation in ("eager", "sdpa"):
        model = BPGCNForImageClassification.from_pretrained(tmp_path, attn_implementation=implementation).double()
        assert model.bpgcn.backbone.config._attn_implementation == implementation
        answers.append(model(images.double(), support="batch").logits)
    assert_close(*answers, atol=1e-6, rtol=0)  # eager attention takes its softmax in float32


def test_the_default_attention_is_sdpa():
    assert tiny_model().bpgcn.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
def test_in_bfloat16_bank_and_temperature_keep_their_precision(bank_dtype, tmp_path):
    model, images = tiny_model(learn_temperature=True, bank_dtype=bank_dtype), tiny_images(12)
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(images), LABELS, 2**40 + torch.arange(12))
        expected = model(images[:6])
    model.save_pretrained(tmp_path)
    half = BPGCNForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == half.bpgcn.backbone.dtype == half.head.layers[0].weight.dtype == torch.bfloat16
    assert half.bpgcn.ranking_temperature.log_temperature.dtype == torch.float32
    assert_close(dict(half.support_bank.named_buffers()), dict(model.support_bank.named_buffers()), atol=0, rtol=0)
    assert half.support_bank.features.dtype == getattr(torch, bank_dtype)
    assert half.support_bank.ids.dtype == half.support_bank.classes.dtype == torch.int64
    for support in ("bank", "transductive"):
        with torch.no_grad():
            answer = half(images[:6], support=support)
        assert answer.logits.dtype == answer.neighbor_weights.dtype == torch.float32
        assert answer.logits.isfinite().all()
    with torch.no_grad():
        assert (half(images[:6]).logits.exp() - expected.logits.exp()).abs().max() < 0.15
    half.train()
    loss, found = gradients(half, images)
    assert loss.isfinite()
    assert set(found) == set(trainable(half))
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_autocast_trains_as_float32_does_but_for_rounding():
    model, images = tiny_model().train(), tiny_images(12)
    loss, _ = gradients(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, found = gradients(model, images)
    assert cast.dtype == torch.float32
    assert_close(cast, loss, rtol=0.2, atol=0)
    assert all(gradient.isfinite().all() for gradient in found.values())


# torch 2.13 looks at the gradient of tensors that cross a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("head", ["gcn", pytest.param("gat", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_values_and_gradients(head):
    model, images = tiny_model(head=head, learn_temperature=True).train(), tiny_images(12)
    plain = gradients(model, images)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    loss = compiled(images, labels=LABELS).loss
    loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close(loss.detach(), plain[0])
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain[1])
    model.eval()
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(images), LABELS)
        assert_close(compiled(images[:5]).logits, model(images[:5]).logits)
    torch._dynamo.reset()


# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Tensor, Tensor]:
    """A folder with a trained model and its bank, images, and the answers to them."""
    model, images = tiny_model(learn_temperature=True).train(), tiny_images(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        gradients(model, images)
        optimizer.step()
    model.eval()
    model.config.id2label = {0: "left", 1: "right", 2: "up"}
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(images), LABELS)
        logits = model(images).logits
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    return folder, images, logits


def test_auto_classes_load_what_was_saved_bit_for_bit(saved):
    folder, images, logits = saved
    assert type(AutoConfig.from_pretrained(folder)) is BPGCNConfig
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is BPGCNForImageClassification
    with torch.no_grad():
        assert torch.equal(model(images).logits, logits)
        base = AutoModel.from_pretrained(folder)
        assert type(base) is BPGCNModel
        assert torch.equal(base(images).features, model(images).features)


def test_saving_again_writes_the_same_file(saved, tmp_path):
    folder, *_ = saved
    BPGCNForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_keys_are_those_of_the_live_model_so_that_a_run_resumes(saved):
    from safetensors import safe_open

    with safe_open(saved[0] / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(BPGCNForImageClassification.from_pretrained(saved[0]).state_dict())


def test_another_number_of_classes_is_an_error_unless_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    fields = {"id2label": dict(enumerate("abcde"))}
    with pytest.raises(RuntimeError, match=r"Sizes in .* differ from its config: head.* ignore_mismatched_sizes=True"):
        BPGCNForImageClassification.from_pretrained(tmp_path, **fields)
    model = BPGCNForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **fields)
    assert model(features=torch.randn(6, 8), support="batch").logits.isfinite().all()
    assert model.support_bank.propagated.shape == (0, 5)


def run_isolated(script: str, folder: Path, *arguments: str) -> str:
    """A process that sees neither this checkout nor the network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    work = folder / "elsewhere"
    work.mkdir()
    command = [sys.executable, "-I", "-c", script, *arguments]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


REMOTE = """
import sys
sys.modules["modeling_bpgcn"] = None  # even where the package is installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

folder, inputs, outputs = sys.argv[1:]
inputs = torch.load(inputs, weights_only=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
for thing in (config, base, model):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
with torch.no_grad():
    torch.save({"logits": model(inputs).logits, "features": base(inputs).features}, outputs)
print(config.model_type, type(base).__name__, type(model).__name__)
"""


def test_remote_code_answers_where_the_package_cannot_be_imported(saved, tmp_path):
    folder, images, logits = saved
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save(images, inputs)
    printed = run_isolated(REMOTE, tmp_path, str(folder), str(inputs), str(outputs))
    assert printed.split() == ["bpgcn", "BPGCNModel", "BPGCNForImageClassification"]
    answer = torch.load(outputs, weights_only=True)
    assert_close(answer["logits"], logits, atol=1e-6, rtol=0)
    assert answer["features"].shape == (12, 8)


PIPELINE = """
import sys
sys.path.insert(0, sys.argv[1])
import modeling_bpgcn
from transformers import pipeline

for answer in pipeline("image-classification", model=sys.argv[2], device="cpu")(sys.argv[3]):
    print(answer["label"], answer["score"])
"""


def test_a_pipeline_in_a_clean_process_answers_a_jpeg(saved, tmp_path):
    from PIL import Image

    folder, *_ = saved
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(folder)
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "photo.jpg")
    lines = run_isolated(PIPELINE, tmp_path, str(ROOT), str(folder), str(tmp_path / "photo.jpg")).splitlines()
    answers = {label: float(score) for label, score in (line.split() for line in lines)}
    with Image.open(tmp_path / "photo.jpg") as image:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = BPGCNForImageClassification.from_pretrained(folder)(pixels).logits[0]
    assert set(answers) == {"left", "right", "up"}
    for label, log_probability in zip(("left", "right", "up"), logits.tolist(), strict=True):
        assert answers[label] == pytest.approx(math.exp(log_probability), abs=1e-5)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_hessian_vector_product_of_the_whole_loss_equals_finite_differences(backend, monkeypatch):
    monkeypatch.setattr(ranking, "DENSE_SCORES", 0 if backend == "tiled" else 2**60)
    weights = {"propagation_loss_weight": 1.0, "neighborhood_loss_weight": 0.5, "consistency_loss_weight": 0.1}
    model = (
        tiny_model(ranking_temperature=0.4, ranking_normalization="all", head_dropout=0.0, **weights).double().train()
    )
    features = torch.randn(14, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, -100, -100, -100, -100, -100, -100])
    direction = torch.randn_like(features)

    def gradient(x):
        torch.manual_seed(0)  # the same labels revealed
        return torch.autograd.grad(model(features=x, labels=labels).loss, x, create_graph=True)[0]

    (product,) = torch.autograd.grad((gradient(features) * direction).sum(), features)
    assert product.abs().max() > 1e-3
    step = 1e-5
    ahead, behind = ((features + sign * step * direction).detach().requires_grad_() for sign in (1, -1))
    assert_close(product, (gradient(ahead) - gradient(behind)) / (2 * step), rtol=1e-4, atol=1e-5)


def test_a_step_is_the_same_dense_and_tiled(monkeypatch):
    results = []
    for limit in (2**60, 0):
        monkeypatch.setattr(ranking, "DENSE_SCORES", limit)
        torch.manual_seed(0)
        model = tiny_model(ranking_normalization="all").double().train()
        features = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
        loss = model(features=features, labels=torch.arange(30) % 3).loss
        results.append((loss, torch.autograd.grad(loss, features)[0]))
    (dense, dense_gradient), (tiled, tiled_gradient) = results
    assert dense_gradient.abs().max() > 0
    assert_close(tiled, dense)
    assert_close(tiled_gradient, dense_gradient, rtol=1e-9, atol=1e-12)
