"""The backbone in two parts: the same values and gradients as in one, whatever trains, and nothing else is touched; the
last block for the CLS token alone: the same again, and the whole block wherever that could differ."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.image_features import first_modules, num_frozen_blocks, run_first_blocks, run_last_blocks
from modeling_bpgcn.training.freezing import train_last_blocks
from tests.model_factory import BACKBONES, tiny_backbone, tiny_images, tiny_model

BLOCKS = 3
LABELS = torch.tensor([0, 1, 2, 0, 1, -100, 0, -100])
SIZES = {"size of the config": 8, "positions interpolated": 12}


def model_of(kind: str = "dinov2", dtype=torch.float32, **overrides) -> BPGCNForImageClassification:
    """Three blocks, every parameter away from its start, in training mode; features that read all tokens."""
    backbone = tiny_backbone(kind, num_hidden_layers=BLOCKS)
    fields = {"backbone_config": backbone, "head": "linear", "pooling": "cls_mean"}
    return tiny_model(**(fields | overrides)).to(dtype).train()


def split(model: BPGCNForImageClassification, images: Tensor, num_blocks: int) -> Tensor:
    """The states that enter block `num_blocks`, and a model that goes on from there."""
    model.bpgcn.prefix_blocks = num_blocks
    return run_first_blocks(model.bpgcn.backbone, images, num_blocks)


def gradients(model: nn.Module, **inputs) -> dict[str, Tensor]:
    """Of the loss, for every parameter that trains; one that got none is a 0."""
    model.zero_grad()
    torch.manual_seed(0)  # which labels the objective reveals
    model(**inputs, labels=LABELS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in trained.items()}


# --- the same as the whole backbone -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_blocks", range(BLOCKS + 1))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", BACKBONES)
def test_both_parts_give_what_the_whole_gives(kind, dtype, size, num_blocks):
    model, images = model_of(kind, dtype), tiny_images(8, size).to(dtype)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    whole = model.bpgcn.backbone(images, **options).last_hidden_state
    states = split(model, images, num_blocks)
    assert states.dtype == dtype
    assert states.shape == whole.shape
    assert torch.equal(run_last_blocks(model.bpgcn.backbone, states, num_blocks), whole)


@pytest.mark.parametrize("trained_blocks", range(BLOCKS))
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_parameter_gets_the_same_gradient(kind, dtype, size, trained_blocks):
    model, images = model_of(kind, dtype), tiny_images(8, size).to(dtype)
    train_last_blocks(model.bpgcn.backbone, trained_blocks)
    expected = gradients(model, pixel_values=images)
    # a bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if not name.endswith("k_proj.bias"))
    assert any(".backbone." in name for name in expected) == (trained_blocks > 0)
    frozen = num_frozen_blocks(model.bpgcn.backbone)
    assert frozen == BLOCKS - trained_blocks
    for num_blocks in range(1, frozen + 1):
        found = gradients(model, hidden_states=split(model, images, num_blocks))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_gradient_checkpointing_computes_the_last_blocks_again(kind):
    model, images = model_of(kind), tiny_images(8)
    train_last_blocks(model.bpgcn.backbone, 2)
    states = split(model, images, 1)
    expected = gradients(model, hidden_states=states)
    model.activation_checkpointing_enable()
    blocks = first_modules(model.bpgcn.backbone, BLOCKS)[1:]
    runs = [0] * BLOCKS
    for number, block in enumerate(blocks):
        norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
        norm.register_forward_pre_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    found = gradients(model, hidden_states=states)
    assert runs == [0, 2, 2]
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert torch.equal(run_first_blocks(model.bpgcn.backbone, images, 1), states)


@pytest.mark.parametrize("kind", BACKBONES)
def test_lora_in_the_last_blocks_gets_the_same_gradient(kind):
    base, images = model_of(kind), tiny_images(8)
    pattern = r".*\.(1|2)\.attention\.(q_proj|v_proj)"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=pattern, modules_to_save=["head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at the start, and then A gets no gradient
                parameter.normal_()
    assert num_frozen_blocks(base.bpgcn.backbone) == 1
    expected = gradients(model, pixel_values=images)
    assert sum(".lora_" in name for name in expected) == 2 * 2 * 2
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    found = gradients(model, hidden_states=split(base, images, 1))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_states_stand_for_images_in_both_models(kind, pooling):
    model, images = model_of(kind, pooling=pooling).eval(), tiny_images(8)
    states = split(model, images, 2)
    tolerance = {"atol": 1e-6 if pooling == "cls" else 0, "rtol": 0}  # the last block for one token: rounding
    with torch.no_grad():
        expected = model(images, support="batch")
        for found in (
            model(hidden_states=states, support="batch"),
            model(hidden_states=states.double(), support="batch"),
            model.bpgcn(hidden_states=states, support="batch"),
        ):
            assert_close(found.features, expected.features, **tolerance)
            assert torch.equal(found.neighbor_indices, expected.neighbor_indices)
            assert_close(found.neighbor_weights, expected.neighbor_weights, **tolerance)
        halved = model(hidden_states=states.half(), support="batch")
    assert_close(halved.features, expected.features, atol=2e-2, rtol=0)
    assert halved.features.dtype == torch.float32


def test_autocast_reaches_the_last_blocks_alike():
    model, images = model_of(), tiny_images(8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        states = split(model, images, 1)
        expected = model.bpgcn.get_image_features(images)
        assert torch.equal(model.bpgcn.get_image_features(hidden_states=states), expected)


# torch 2.13 looks at the gradient of tensors that cross a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("pooling", ["cls", pytest.param("cls_mean", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same(pooling):
    torch._dynamo.reset()
    model, images = model_of(pooling=pooling), tiny_images(8)
    train_last_blocks(model.bpgcn.backbone, 2)
    states = split(model, images, 1)
    expected = gradients(model, hidden_states=states)
    found = gradients(torch.compile(model, backend="aot_eager"), hidden_states=states)
    for name, gradient in expected.items():
        assert_close(found[f"_orig_mod.{name}"], gradient)
    torch._dynamo.reset()


# --- the last block for the CLS token alone ---------------------------------------------------------------------------

VARIANTS = {
    "no layer scale": {"layerscale_value": 1.0},
    "layer scale": {"layerscale_value": 0.3},
    "SwiGLU": {"use_swiglu_ffn": True},
    "no bias": {"qkv_bias": False},
    "eager": {"attn_implementation": "eager"},
    "drop path": {"drop_path_rate": 0.5},
}
T = 5  # one CLS token and 2 x 2 patches


def stack(kind: str = "dinov2", dtype=torch.float32, attn_implementation: str = "sdpa", **overrides) -> nn.Module:
    """Three blocks in training mode, every parameter but the layer scale away from its start."""
    config = tiny_backbone(kind, num_hidden_layers=BLOCKS, **overrides)
    backbone = AutoModel.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lambda1" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone.to(dtype).train()


def last_block(backbone: nn.Module) -> nn.Module:
    return first_modules(backbone, BLOCKS)[-1]


def cls_gradients(backbone: nn.Module, states: Tensor, cls_only: bool, num_blocks: int = 1) -> dict[str, Tensor]:
    """The CLS token, the gradient of a sum of it for the states and all that trains, and the next random number."""
    states = states.clone().requires_grad_()
    backbone.zero_grad()
    torch.manual_seed(0)  # whom drop path drops
    cls = run_last_blocks(backbone, states, num_blocks, cls_only)[:, 0]
    (cls * torch.linspace(-1, 2, cls.numel()).view_as(cls)).sum().backward()
    reached = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    return {"cls": cls.detach(), "random": torch.rand(()), "states": states.grad, **reached}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To `tolerance` of each tensor's largest entry, or of 1."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        assert largest > 0 or name.endswith("k_proj.bias"), name
        assert_close(found[name], value, atol=tolerance * max(1, largest), rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def normed_tokens(monkeypatch) -> list[int]:
    """How many tokens each layer norm saw: before attention, before the MLP (of each block), and at the end. Patched in
    the class: a hook would have the whole block run."""
    counts, forward = [], nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: counts.append(x.shape[1]) or forward(self, x))
    return counts


@pytest.mark.parametrize("num_blocks", range(BLOCKS))
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_the_cls_token_alone_gives_the_same(kind, dtype, tolerance, variant, num_blocks, normed_tokens):
    backbone, states = stack(kind, dtype, **variant), torch.randn(16, T, 8, dtype=dtype)
    expected = cls_gradients(backbone, states, False, num_blocks)
    assert sum(".q_proj.weight" in name for name in expected) == BLOCKS - num_blocks
    whole = 2 * (BLOCKS - num_blocks) + 1
    assert normed_tokens == [T] * whole
    found = cls_gradients(backbone, states, True, num_blocks)
    assert normed_tokens[whole:] == [T] * (whole - 2) + [1, 1]
    assert found["cls"].dtype == expected["cls"].dtype == dtype
    assert_close(found["cls"], expected["cls"], atol=tolerance / 10, rtol=1e-6)
    assert_same(found, expected, tolerance)
    backbone.eval()
    without_drops = cls_gradients(backbone, states, False, num_blocks)
    assert torch.equal(without_drops["cls"], expected["cls"]) == ("drop_path_rate" not in variant)
    assert_same(cls_gradients(backbone, states, True, num_blocks), without_drops, tolerance)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_cls_token_alone_trains_adapters_alike(use_dora, normed_tokens):
    config = LoraConfig(r=2, target_modules=r".*\.\d\..*(_proj|fc\d)", use_dora=use_dora, init_lora_weights=False)
    base = stack("dinov2", torch.float64)
    get_peft_model(base, config).double()
    states = torch.randn(16, T, 8, dtype=torch.float64)
    expected = cls_gradients(base, states, False)
    assert sum(".lora_" in name for name in expected) == (BLOCKS - 1) * 6 * (2 + use_dora)
    normed_tokens.clear()
    assert_same(cls_gradients(base, states, True), expected, 1e-13)
    assert normed_tokens == [T, T, T, 1, 1]


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@pytest.mark.parametrize("whole_model", [False, True], ids=["autocast", "bf16 weights"])
def test_in_half_precision_it_is_close_and_of_the_same_dtype(whole_model, drop_path_rate, normed_tokens):
    dtype = torch.bfloat16 if whole_model else torch.float32
    backbone, states = stack(dtype=dtype, drop_path_rate=drop_path_rate), torch.randn(16, T, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole_model):
        expected, found = (cls_gradients(backbone, states, cls_only) for cls_only in (False, True))
    assert normed_tokens[-2:] == [1, 1]
    assert found["cls"].dtype == expected["cls"].dtype == dtype
    assert_same(found, expected, 3e-2)


def test_compiled_it_is_one_graph():
    torch._dynamo.reset()
    backbone, states = stack(), torch.randn(16, T, 8)
    expected = run_last_blocks(backbone, states, 1)[:, :1]
    found = torch.compile(run_last_blocks, backend="aot_eager", fullgraph=True)(backbone, states, 1, True)
    assert_close(found, expected, atol=1e-6, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", BACKBONES)
def test_with_no_block_left_the_norm_is_the_rest(kind):
    backbone, states = stack(kind), torch.randn(16, T, 8)
    expected = run_last_blocks(backbone, states, BLOCKS)[:, :1]
    assert torch.equal(run_last_blocks(backbone, states, BLOCKS, cls_only=True), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_only_features_of_the_cls_token_take_it(pooling, normed_tokens):
    model, images = model_of(pooling=pooling), tiny_images(8)
    states = split(model, images, 1)
    normed_tokens.clear()
    model.bpgcn.get_image_features(hidden_states=states)
    assert normed_tokens == [T, T, T, *([1, 1] if pooling == "cls" else [T, T])]


def checkpoint(backbone: nn.Module) -> None:
    backbone.activation_checkpointing_enable()


def watch(name: str, register: str) -> Callable[[nn.Module], None]:
    return lambda backbone: getattr(last_block(backbone).get_submodule(name), register)(lambda *_: None)


def replace_forward(backbone: nn.Module) -> None:
    block = last_block(backbone)
    block.forward = block.forward


def change_type(name: str) -> Callable[[nn.Module], None]:
    def change(backbone: nn.Module) -> None:
        module = last_block(backbone).get_submodule(name)
        module.__class__ = type("Other", (type(module),), {})

    return change


def adapt_with_dropout(backbone: nn.Module) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(backbone, config).to(backbone.dtype)


@pytest.mark.parametrize(
    ("kind", "fields", "change"),
    [
        pytest.param("vit", {}, None, id="other parts"),
        pytest.param("dinov2", {"attention_probs_dropout_prob": 0.5}, None, id="attention dropout"),
        pytest.param("dinov2", {}, adapt_with_dropout, id="adapter dropout"),
        pytest.param("dinov2", {}, checkpoint, id="checkpointing"),
        pytest.param("dinov2", {}, watch("", "register_forward_hook"), id="hook on the block"),
        pytest.param("dinov2", {}, watch("attention", "register_forward_pre_hook"), id="hook on the attention"),
        pytest.param("dinov2", {}, watch("mlp.fc1", "register_full_backward_hook"), id="backward hook"),
        pytest.param("dinov2", {}, watch("norm2", "register_full_backward_pre_hook"), id="backward pre-hook"),
        pytest.param("dinov2", {}, replace_forward, id="forward replaced"),
        pytest.param("dinov2", {}, change_type(""), id="other block"),
        pytest.param("dinov2_with_registers", {}, change_type("attention"), id="other attention"),
    ],
)
def test_the_whole_block_runs_where_its_parts_might_differ(kind, fields, change, normed_tokens):
    backbone, states = stack(kind, **fields), torch.randn(16, T, 8)
    if change is not None:
        change(backbone)
    expected = cls_gradients(backbone, states, False, num_blocks=2)
    normed_tokens.clear()
    assert_same(cls_gradients(backbone, states, True, num_blocks=2), expected, 1e-6)
    assert normed_tokens[:3] == [T, T, 1]  # checkpointing has more to come


def test_a_block_without_attention_runs_whole():
    backbone, states = stack(), torch.randn(16, T, 8)
    backbone.encoder.layer[-1] = nn.Linear(8, 8)
    assert_same(cls_gradients(backbone, states, True), cls_gradients(backbone, states, False), 1e-6)


@pytest.mark.parametrize("cause", ["attention dropout", "adapter dropout", "checkpointing"])
def test_what_is_off_in_evaluation_does_not_hinder_it(cause, normed_tokens):
    backbone = stack(dtype=torch.float64, attention_probs_dropout_prob=0.5 * (cause == "attention dropout"))
    change = {"adapter dropout": adapt_with_dropout, "checkpointing": checkpoint}.get(cause)
    if change is not None:
        change(backbone)
    backbone.eval()
    states = torch.randn(16, T, 8, dtype=torch.float64)
    expected = cls_gradients(backbone, states, False)
    assert_same(cls_gradients(backbone, states, True), expected, 1e-13)
    assert normed_tokens[-2:] == [1, 1]


def test_another_attention_runs_in_the_whole_block(monkeypatch, normed_tokens):
    def uniform(module, query, key, value, mask, **options):  # over as many tokens as there are queries
        return value[:, :, : query.shape[2]].mean(2, keepdim=True).expand_as(query).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "uniform", uniform)
    backbone, states = stack(), torch.randn(16, T, 8)
    softmax = run_last_blocks(backbone, states, 2, cls_only=True)
    backbone.config._attn_implementation = "uniform"
    expected = run_last_blocks(backbone, states, 2)[:, :1]
    assert not torch.allclose(expected, softmax)
    assert torch.equal(run_last_blocks(backbone, states, 2, cls_only=True), expected)


# --- no more than the part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKBONES)
def test_each_part_runs_its_own_blocks_once(kind):
    model, images = model_of(kind), tiny_images(8)
    backbone = model.bpgcn.backbone
    runs = []
    for number, module in enumerate(first_modules(backbone, BLOCKS)):
        module.register_forward_hook(lambda *_, number=number: runs.append(number))
    backbone.layernorm.register_forward_hook(lambda *_: runs.append("norm"))
    states = run_first_blocks(backbone, images, 2)  # 0 are the embeddings
    assert runs == [0, 1, 2]
    assert not states.requires_grad
    runs.clear()
    assert run_last_blocks(backbone, states, 2).requires_grad
    assert runs == [3, "norm"]


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_backbone_stays_as_it_was(kind, tmp_path):
    model, images = model_of(kind), tiny_images(8)
    backbone = model.bpgcn.backbone
    before, names = copy.deepcopy(backbone.state_dict()), [name for name, _ in backbone.named_modules()]
    gradients(model, hidden_states=split(model, images, 2))
    assert [name for name, _ in backbone.named_modules()] == names
    after = backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not [module for module in backbone.modules() if module._forward_hooks or module._forward_pre_hooks]

    model.save_pretrained(tmp_path)
    assert "prefix" not in (tmp_path / "config.json").read_text()
    assert BPGCNForImageClassification.from_pretrained(tmp_path).bpgcn.prefix_blocks == 0


# --- what is frozen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("", BLOCKS),
        ("layernorm.weight", BLOCKS),
        ("embeddings.mask_token", BLOCKS),
        ("embeddings.cls_token", 0),
        ("embeddings.patch_embeddings.projection.bias", 0),
        (".0.norm1.bias", 0),
        (".1.mlp.fc1.weight", 1),
        (".2.attention.q_proj.weight", 2),
    ],
)
def test_frozen_blocks_end_where_a_parameter_trains(trained, expected):
    backbone = model_of().bpgcn.backbone
    matched = [
        parameter.requires_grad_(bool(trained) and name.endswith(trained))
        for name, parameter in backbone.named_parameters()
    ]
    assert sum(parameter.requires_grad for parameter in matched) == bool(trained)
    assert num_frozen_blocks(backbone) == expected


@pytest.mark.parametrize("kind", BACKBONES)
def test_adapters_everywhere_leave_no_frozen_block(kind):
    base = model_of(kind)
    assert num_frozen_blocks(base.bpgcn.backbone) == 0
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert num_frozen_blocks(base.bpgcn.backbone) == 0


# --- errors -----------------------------------------------------------------------------------------------------------


def backbone_of(kind: str, **fields) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(kind, image_size=8, patch_size=2, **fields))


def test_a_backbone_that_is_no_plain_stack_is_named():
    fields = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8, "num_attention_heads": 2}
    backbone = backbone_of("clip_vision_model", **fields)
    for use in (num_frozen_blocks, lambda backbone: run_first_blocks(backbone, torch.zeros(1, 3, 8, 8), 1)):
        with pytest.raises(ValueError, match="CLIPVisionModel is not `embeddings`, a list of num_hidden_layers=2"):
            use(backbone)


@pytest.mark.parametrize(
    "backbone",
    [
        backbone_of("swin", embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2),
        backbone_of("convnext", hidden_sizes=[8] * 2, depths=[1] * 2, num_stages=2),
    ],
    ids=["swin", "convnext"],
)
def test_embeddings_that_are_no_sequence_are_named(backbone):
    with pytest.raises(ValueError, match=f"The embeddings of {type(backbone).__name__} are not hidden states"):
        run_first_blocks(backbone, torch.zeros(1, 3, 8, 8), 1)


def test_states_need_a_model_that_knows_their_block():
    model, images = model_of(), tiny_images(8)
    with pytest.raises(ValueError, match=r"hidden_states need prefix_blocks, .*: it is 0"):
        model(hidden_states=torch.zeros(8, 5, 8), labels=LABELS)
    states = split(model, images, 1)
    with pytest.raises(ValueError, match=r"hidden_states must be \[batch, sequence, hidden\]; got \(5, 8\)"):
        model(hidden_states=states[0], labels=LABELS)


@pytest.mark.parametrize("other", ["pixel_values", "features"])
def test_states_are_an_alternative_to_the_other_inputs(other):
    model, images = model_of(), tiny_images(8)
    inputs = {"pixel_values": images, "features": torch.zeros(8, 8), "hidden_states": split(model, images, 1)}
    with pytest.raises(ValueError, match="Pass either pixel_values or features"):
        model(**{name: inputs[name] for name in (other, "hidden_states")})
