"""The objective of a batch as one deterministic function, which any derivative may be taken of."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..image_features import first_modules
from ..modeling_bpgcn import BPGCNForImageClassification
from .undisturbed import undisturbed

PARTS = ("head", "features", "last_blocks")


@contextlib.contextmanager
def fixed_objective(model: BPGCNForImageClassification, seed: int) -> Iterator[None]:
    """Within, the objective is one function, differentiable twice: no dropout, the same labels revealed, attention by
    plain operations. Modes and random numbers are as before afterwards.

    Raises:
        ValueError: for an attention without a second derivative.
    """
    attention = model.bpgcn.backbone.config._attn_implementation
    if attention not in ("sdpa", "eager", None):
        raise ValueError(
            f"attn_implementation={attention!r} has no second derivative: load the model with 'sdpa' or 'eager'."
        )
    # nor have the fused kernels of scaled_dot_product_attention
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        yield


def labeled_inputs(model: BPGCNForImageClassification, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the objective reads of a batch, on the model's device.

    Raises:
        ValueError: for a batch in which no image is labelled.
    """
    if "labels" not in batch or not (batch["labels"] >= 0).any():
        raise ValueError("The objective needs labels of 0 or more: the batch has none.")
    names = ("pixel_values", "features", "labels", "node_ids", "support_classes")
    return {name: batch[name].to(model.device) for name in names if name in batch}


@torch.no_grad()
def embedded(model: BPGCNForImageClassification, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with `features` [N, D] of its own in place of images."""
    rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", "features")}
    with fixed_objective(model, 0):
        features = model.bpgcn.embed(inputs.get("pixel_values"), inputs.get("features"))
    return rest | {"features": features.detach().clone()}


def objective_of(
    model: BPGCNForImageClassification, batch: dict[str, Tensor], part: str, num_blocks: int = 1, seed: int = 0
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The objective as a function of a part's tensors, and these, as copies that ask for a gradient.

    Args:
        part: `head` (its parameters), `features` [N, D] that enter ranking and head, or `last_blocks` (the parameters
            of the backbone from its last `num_blocks` blocks on, as `trainable_blocks` counts them).

    Raises:
        ValueError: for a part that is unknown, or that the model or the batch does not have.
    """
    if part not in PARTS:
        raise ValueError(f"of={part!r} is unknown: choose from {', '.join(PARTS)}.")
    inputs = labeled_inputs(model, batch)
    state = {name: p.detach() for name, p in model.named_parameters()}
    if part == "last_blocks":
        if "pixel_values" not in inputs:
            raise ValueError("The curvature of last_blocks needs pixel_values in the batch: features are past them.")
        names = _last_parameters(model, num_blocks)
    else:
        inputs = embedded(model, inputs)
        names = [name for name in state if name.startswith("head.")] if part == "head" else []
        if part == "head" and not names:
            raise ValueError(f"head={model.config.head!r} has no parameters: leave head out of `of`.")
    state |= {name: state[name].clone().requires_grad_() for name in names}
    tensors = [state[name] for name in names]
    if part == "features":
        tensors = [inputs["features"].requires_grad_()]

    def loss_fn() -> Tensor:
        with fixed_objective(model, seed):
            return functional_call(model, state, kwargs=inputs | {"support": "batch"}).loss

    return loss_fn, tensors


def _last_parameters(model: BPGCNForImageClassification, num_blocks: int) -> list[str]:
    backbone = model.bpgcn.backbone
    if not 1 <= num_blocks <= backbone.config.num_hidden_layers:
        raise ValueError(f"num_blocks={num_blocks} must be 1 to {backbone.config.num_hidden_layers}.")
    first = set(first_modules(backbone, backbone.config.num_hidden_layers - num_blocks).parameters())
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for n, p in backbone.named_parameters() if p not in first and not n.startswith("pooler.")]
