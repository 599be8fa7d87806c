"""The exported program answers as the model does, for every option that there is, batch and bank of any size."""

import pytest
import torch

from modeling_bpgcn import BPGCNModel
from modeling_bpgcn.configuration_bpgcn import CHOICES
from modeling_bpgcn.export import BANKS, bank_inputs, export_program
from modeling_bpgcn.export.program import AnswerFromBank
from tests.export.export_factory import SUPPORT, fill, model_with_bank, shallow_backbone
from tests.model_factory import HEAD_NAMES, tiny_config, tiny_images, tiny_model

EUCLIDEAN = {"ranking_metric": "euclidean", "ranking_temperature": 5.0}
RELAXATIONS = [name for name in CHOICES["ranking_relaxation"] if name != "gumbel"]


@torch.no_grad()
def assert_agrees(answer, model, pixel_values, tolerance=1e-5):
    """`answer(pixel_values)` is the model's; the logits differ between images, and so do the neighbours."""
    expected, found = model(pixel_values=pixel_values), answer(pixel_values)
    if len(pixel_values) > 2:
        assert expected.logits.std(0).max() > 100 * tolerance
        assert (expected.neighbor_indices != expected.neighbor_indices[:1]).any()
    assert torch.equal(found["neighbor_indices"], expected.neighbor_indices)
    torch.testing.assert_close(found["logits"], expected.logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(found["neighbor_weights"], expected.neighbor_weights, atol=tolerance, rtol=0)


def called(program, model, bank):
    """The program as a function of pixel values."""
    module, support = program.module(), bank_inputs(model) if bank == "input" else {}
    return lambda pixel_values: module(pixel_values, **support)


# --- what is traced, before it is traced: all options ----------------------------------------------------------------


def assert_plain_form_agrees(bank="constant", **fields):
    model = model_with_bank(**fields)
    support = bank_inputs(model)
    plain = AnswerFromBank(model, bank, ["pixel_values", *(support if bank == "input" else ())]).eval()
    assert_agrees(lambda x: plain(x, **(support if bank == "input" else {})), model, tiny_images(16))


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_plain_form_of_every_head(head, bank):
    assert_plain_form_agrees(bank, head=head)


@pytest.mark.parametrize("metric", [{}, EUCLIDEAN], ids=["cosine", "euclidean"])
@pytest.mark.parametrize("normalization", ["all", "selected"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_plain_form_of_every_relaxation(relaxation, normalization, metric):
    assert_plain_form_agrees(ranking_relaxation=relaxation, ranking_normalization=normalization, **metric)


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
@pytest.mark.parametrize("loop", ["share", "unit"])
@pytest.mark.parametrize("normalization", CHOICES["graph_normalization"])
@pytest.mark.parametrize("symmetrization", CHOICES["graph_symmetrization"])
def test_plain_form_of_every_graph(symmetrization, normalization, loop, bank_dtype):
    graph = {"graph_symmetrization": symmetrization, "graph_normalization": normalization, "graph_self_loop": loop}
    assert_plain_form_agrees("input", bank_dtype=bank_dtype, ranking_normalization="all", **graph)


@pytest.mark.parametrize(
    "fields",
    [
        {"learn_temperature": True},
        {"head": "appnp", "bank_dtype": "float16"},
        {"propagation_mix": 0.0},
        {"propagation_mix": 1.0},
        {"propagation_steps": 0},
        {"ranking_exclude_self": False},
        {"num_neighbors": SUPPORT},
        {"num_neighbors": SUPPORT + 5, "ranking_relaxation": "threshold"},
        {"pooling": "cls_mean"},
        {"head": "gat", "bank_dtype": "float16"},
        {"head": "label_propagation", "bank_dtype": "float16"},
    ],
    ids=str,
)
def test_plain_form_of_other_options(fields):
    assert_plain_form_agrees(**fields)


# --- the program ------------------------------------------------------------------------------------------------------


def test_constant_bank_and_any_batch_size():
    model = model_with_bank()
    answer = called(export_program(model, 8), model, "constant")
    for count in (1, 2, 7, 64):
        assert_agrees(answer, model, tiny_images(count))


def test_bank_as_input_of_any_size():
    model = model_with_bank(bank_dtype="float16", graph_normalization="symmetric")
    program = export_program(model, 8, bank="input")
    assert list(program.graph_signature.user_inputs) == ["pixel_values", *bank_inputs(model)]
    for count in (SUPPORT, 5, 37):
        fill(model, count)
        assert_agrees(called(program, model, "input"), model, tiny_images(7))


def test_bank_as_input_needs_none_in_the_model_and_holds_none():
    model = tiny_model(backbone_config=shallow_backbone())
    program = export_program(model, 8, bank="input")
    assert not [name for name in program.state_dict if "support" in name]
    fill(model, SUPPORT)
    assert_agrees(called(program, model, "input"), model, tiny_images(3))


def test_bank_of_too_few_images_is_refused():
    model = model_with_bank()
    program = export_program(model, 8, bank="input")
    few = {name: value[:4] for name, value in bank_inputs(model).items()}  # k + 2 = 5
    with pytest.raises(AssertionError, match="support_features"):
        program.module()(tiny_images(2), **few)


def test_export_leaves_the_model_as_it_was():
    model = model_with_bank()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_program(model, 8)
    assert model.support_bank.size == SUPPORT
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["vit", pytest.param("dinov2_with_registers", marks=pytest.mark.slow)])
def test_other_backbones(kind):
    model = model_with_bank(backbone_config=shallow_backbone(kind))
    assert_agrees(called(export_program(model, 8), model, "constant"), model, tiny_images(3))


def test_another_image_size_than_that_of_the_backbone():
    model = model_with_bank()
    answer = called(export_program(model, (12, 16)), model, "constant")
    pixel_values = torch.randn(3, 3, 12, 16)
    assert_agrees(answer, model, pixel_values)
    with pytest.raises(AssertionError, match="pixel_values"):
        answer(tiny_images(3))


@pytest.mark.parametrize(
    "fields",
    [
        {"head": "gat", **EUCLIDEAN},
        {"ranking_relaxation": "threshold", "ranking_normalization": "all"},
    ],
    ids=str,
)
def test_options_that_rank_otherwise_with_the_bank_as_input(fields):
    model = model_with_bank(**fields)
    program = export_program(model, 8, bank="input")
    fill(model, 9)
    assert_agrees(called(program, model, "input"), model, tiny_images(7))


@pytest.mark.slow
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("normalization", ["all", "selected"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_relaxation(relaxation, normalization, bank):
    model = model_with_bank(ranking_relaxation=relaxation, ranking_normalization=normalization)
    assert_agrees(called(export_program(model, 8, bank=bank), model, bank), model, tiny_images(16))


@pytest.mark.slow
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_every_head(head, bank):
    model = model_with_bank(head=head)
    assert_agrees(called(export_program(model, 8, bank=bank), model, bank), model, tiny_images(16))


# --- what cannot be exported ------------------------------------------------------------------------------------------


def test_options_without_an_export_are_named():
    with pytest.raises(ValueError, match="ranking_relaxation='gumbel' cannot be exported"):
        export_program(model_with_bank(ranking_relaxation="gumbel"), 8)
    model = model_with_bank()
    with pytest.raises(ValueError, match=r"bank='none' is unknown: choose one of constant, input\."):
        export_program(model, 8, bank="none")
    with pytest.raises(ValueError, match="do not divide into patches"):
        export_program(model, 9)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        export_program(model.train(), 8)
    with pytest.raises(ValueError, match=r"parameters in torch\.bfloat16.*model\.float\(\)"):
        export_program(model.eval().bfloat16(), 8)


def test_attention_without_an_export_is_named():
    model = model_with_bank()
    model.bpgcn.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' cannot be exported"):
        export_program(model, 8)


def test_an_empty_bank_is_no_constant():
    with pytest.raises(ValueError, match="no support bank that could be a constant"):
        export_program(tiny_model(), 8)


def test_another_class_of_model_is_named():
    with pytest.raises(TypeError, match="BPGCNModel, not a BPGCNForImageClassification"):
        export_program(BPGCNModel(tiny_config()), 8)
