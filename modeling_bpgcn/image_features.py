"""Images to pooled features, and the backbone in two parts, so that frozen first blocks need to run only once."""

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Layer, eager_attention_forward
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersLayer,
)

# same parts by the same names
BLOCKS = {Dinov2Layer: Dinov2Attention, Dinov2WithRegistersLayer: Dinov2WithRegistersAttention}


def check_pixels(pixel_values: Tensor, config) -> None:
    """Raise a ValueError unless `pixel_values` is [B, channels, height, width] and divides into the patches of the
    backbone's `config`: the border would be lost silently."""
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be [batch, channels, height, width]; got {tuple(pixel_values.shape)}.")
    patch = getattr(config, "patch_size", 1)
    patches = (patch, patch) if isinstance(patch, int) else tuple(patch)
    for side, p in zip(pixel_values.shape[-2:], patches, strict=True):
        if side < p or side % p:
            raise ValueError(
                f"Images of {tuple(pixel_values.shape[-2:])} pixels do not divide into patches of {patches}: set"
                f" the image processor's size to a multiple, such as {max(p, side // p * p)} or"
                f" {(side // p + 1) * p}."
            )


def pool_tokens(tokens: Tensor, pooling: str, config) -> Tensor:
    """Features [B, D], or [B, 2 D] for `cls_mean`, of the backbone's tokens [B, T, D].

    Args:
        pooling: `cls` (the first token), `mean` (of the patches) or `cls_mean` (both).
        config: of the backbone, whose register tokens are no patches.

    Raises:
        ValueError: for what is not tokens.
    """
    if tokens.ndim != 3:
        raise ValueError(
            f"The backbone {config.model_type} returns {tuple(tokens.shape)}, not tokens [batch, sequence, hidden]."
        )
    first_patch = 1 + getattr(config, "num_register_tokens", 0)
    pooled = {"cls": (0,), "mean": (1,), "cls_mean": (0, 1)}[pooling]
    return torch.cat([tokens[:, 0] if part == 0 else tokens[:, first_patch:].mean(1) for part in pooled], dim=-1)


def check_features(features: Tensor) -> None:
    """Raise a ValueError that names the rows of features [B, D] that are not finite."""
    if torch.isfinite(features).all():
        return
    rows = (~torch.isfinite(features).all(-1)).nonzero()[:, 0].tolist()
    raise ValueError(
        f"The features of rows {rows[:10]} of {features.shape[0]} are not finite: look for broken images or weights,"
        " lower the learning rate, or use bf16 in place of fp16."
    )


def num_frozen_blocks(backbone: nn.Module) -> int:
    """How many blocks, counted from the first, have no parameter that trains; 0 if the embeddings train.

    Raises:
        ValueError: for a backbone that is not a plain stack of blocks.
    """
    embeddings, blocks, _ = _parts(backbone)
    if _trains(embeddings):
        return 0
    return next((number for number, block in enumerate(blocks) if _trains(block)), len(blocks))


def first_modules(backbone: nn.Module, num_blocks: int) -> nn.ModuleList:
    """The embeddings and the first `num_blocks` blocks: all that `run_first_blocks` runs.

    Raises:
        ValueError: for a backbone that is not a plain stack of blocks.
    """
    embeddings, blocks, _ = _parts(backbone)
    return nn.ModuleList([embeddings, *blocks[:num_blocks]])


@torch.no_grad()
def run_first_blocks(backbone: nn.Module, pixel_values: Tensor, num_blocks: int) -> Tensor:
    """Images [B, channels, height, width] -> hidden states [B, T, D] that enter block `num_blocks`, without gradient.

    Raises:
        ValueError: for a backbone that is not a plain stack of blocks.
    """
    embeddings, *blocks = first_modules(backbone, num_blocks)
    takes_any_size = "interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters
    options = {"interpolate_pos_encoding": True} if takes_any_size else {}
    hidden_states = embeddings(pixel_values.to(backbone.dtype), **options)
    if not isinstance(hidden_states, Tensor) or hidden_states.ndim != 3:
        raise ValueError(
            f"The embeddings of {type(backbone).__name__} are not hidden states [batch, sequence, hidden]."
        )
    return _run(blocks, hidden_states)


def run_last_blocks(backbone: nn.Module, hidden_states: Tensor, num_blocks: int, cls_only: bool = False) -> Tensor:
    """Hidden states [B, T, D] that enter block `num_blocks` -> the tokens [B, T, D] that the whole backbone returns.

    With `cls_only`, its first token [B, 1, D]. Keys and values of the last block still come from all tokens; its query,
    output projection and MLP run for that one, where `_runs_for_cls` allows it, with the same value and gradient.

    Raises:
        ValueError: for other shapes, or a backbone that is not a plain stack of blocks.
    """
    if hidden_states.ndim != 3:
        raise ValueError(f"hidden_states must be [batch, sequence, hidden]; got {tuple(hidden_states.shape)}.")
    _, blocks, layernorm = _parts(backbone)
    blocks, hidden_states = list(blocks[num_blocks:]), hidden_states.to(backbone.dtype)
    if cls_only and blocks and _runs_for_cls(blocks[-1]):
        return layernorm(_run_for_cls(blocks[-1], _run(blocks[:-1], hidden_states)))
    hidden_states = _run(blocks, hidden_states)
    return layernorm(hidden_states[:, :1] if cls_only else hidden_states)


def _runs_for_cls(block: nn.Module) -> bool:
    """Whether `_run_for_cls` is what `block` computes, random numbers included, and nobody watches its parts."""
    # FSDP2 and wrappers have types of their own
    if type(block) not in BLOCKS or type(block.attention) is not BLOCKS[type(block)]:
        return False
    if block.attention.config._attn_implementation not in ("eager", "sdpa"):
        return False
    if block.training and (block.gradient_checkpointing or block.attention.attention_dropout > 0):
        return False
    for module in block.modules():
        hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
        if any(hooks) or "forward" in vars(module):  # sharding, offloading, captured activations
            return False
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:  # of adapters: one draw a token
            return False
    return True


def _run_for_cls(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """The first token [B, 1, D] of `block(hidden_states)`."""
    attention = block.attention
    cls, normed = hidden_states[:, :1], block.norm1(hidden_states)
    projections = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
    heads = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in projections)  # [B, heads, T, head_dim]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    mixed, _ = attend(attention, *heads, None, scaling=attention.scaling)  # [B, 1, heads, head_dim]
    cls = block.drop_path(block.layer_scale1(attention.o_proj(mixed.flatten(2)))) + cls
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(cls)))) + cls


def _run(blocks: Iterable[nn.Module], hidden_states: Tensor) -> Tensor:
    for block in blocks:
        output = block(hidden_states)
        hidden_states = output[0] if isinstance(output, tuple) else output
    return hidden_states


def _parts(backbone: nn.Module) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    count = getattr(backbone.config, "num_hidden_layers", None)
    stack = next((m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    parts = getattr(backbone, "embeddings", None), stack, getattr(backbone, "layernorm", None)
    if None in parts:
        raise ValueError(
            f"{type(backbone).__name__} is not `embeddings`, a list of num_hidden_layers={count} blocks and a"
            " `layernorm`: its first blocks cannot run apart from the others."
        )
    return parts


def _trains(module: nn.Module) -> bool:
    # the mask token is for masked images, and those never come
    return any(p.requires_grad for name, p in module.named_parameters() if not name.endswith("mask_token"))
