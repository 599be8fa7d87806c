"""Flat minima: the penalty on the gradient of the features, and the step of SAM."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


def check_sharpness(args: TrainingArguments) -> None:
    """Raise a `ValueError` for a `sam_rho` or `gradient_norm_penalty` out of range, or that another option excludes."""
    for name in ("sam_rho", "gradient_norm_penalty"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name}={getattr(args, name)} must be a number of 0 or more.")
    if args.sam_rho and args.gradient_accumulation_steps != 1:
        raise ValueError(
            "sam_rho takes two gradients of one batch: set gradient_accumulation_steps 1, and for larger batches"
            " gradient_cache_chunk_size."
        )
    if args.sam_rho and args.optim in ("lomo", "adalomo"):
        raise ValueError(
            f"sam_rho needs whole gradients before a step, which optim={args.optim.value} lacks: use another."
        )
    if args.gradient_norm_penalty and args.ranking_shards != "none":
        raise ValueError(
            f"gradient_norm_penalty needs a second derivative, which ranking_shards={args.ranking_shards} has not:"
            " leave it at none."
        )


def check_sharpness_runs(trainer: Trainer) -> None:
    """Raise a `ValueError` where gradients are sharded or scaled, and so not what either option asks for."""
    used = [name for name in ("sam_rho", "gradient_norm_penalty") if getattr(trainer.args, name)]
    found = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "fp16": trainer.accelerator.mixed_precision == "fp16",
    }
    for name, there in found.items():
        if used and there:
            raise ValueError(
                f"{' and '.join(used)} cannot be used with {name}: leave out one of them. Data parallelism, bf16 and"
                " gradient_cache_chunk_size can."
            )


@contextmanager
def gradient_penalty(model: nn.Module, weight: float) -> Iterator[None]:
    r"""Within, the loss L of `model(features=...)` has a further part, `gradient_penalty`, times `weight`:

        ||dL / dF||^2, the sum of squares of the derivative for the features F [N, D] that enter ranking and head

    (double backpropagation, Drucker and LeCun 1992, here of features in place of images). Context rows (`num_context`)
    are left out. The penalty is differentiable, through ranking and head alone: the backbone takes part as ever.
    """
    if weight == 0:
        yield
        return
    with (
        model.register_forward_pre_hook(_ask_for_gradient, with_kwargs=True),
        model.register_forward_hook(partial(_penalize, weight), with_kwargs=True),
    ):
        yield


def _ask_for_gradient(module, args, kwargs):
    # features of a backbone that does not train
    features = kwargs["features"]
    return args, kwargs | {"features": features if features.requires_grad else features.detach().requires_grad_()}


def _penalize(weight: float, module, args, kwargs, outputs):
    # the backward pass has the precision of the forward pass already
    with torch.autocast(outputs.features.device.type, enabled=False):
        [gradient] = torch.autograd.grad(outputs.loss, outputs.features, create_graph=True)
        penalty = gradient[: len(gradient) - kwargs["num_context"]].square().sum()
    outputs.loss = outputs.loss + weight * penalty
    outputs.loss_parts["gradient_penalty"] = penalty.detach()
    return outputs


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[None]:
    r"""Within, parameters that have a gradient stand at w + rho g / ||g||, the worst place within rho to first order,
    and their gradients are gone; afterwards they are back at w, bit for bit (SAM, Foret et al. 2021, equation 2).

    The norm is that of all gradients together. Where it is 0 or not finite the parameters stay where they are.
    """
    parameters = [p for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        has_direction = (norm > 0) & norm.isfinite()
        for parameter in parameters:
            parameter.add_(torch.where(has_direction, parameter.grad * (rho / norm), 0.0))
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
