"""Consistency between two views of an unlabelled image; the second lacks a random part of the patch tokens."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..configuration_bpgcn import BPGCNConfig
from .gather import gather_rows


def check_views(args: TrainingArguments) -> None:
    """Raise a `ValueError` for options of the second view that are out of range, or that another option excludes."""
    if not 0 <= args.view_loss_weight < math.inf:
        raise ValueError(f"view_loss_weight={args.view_loss_weight} must be a number of 0 or more.")
    if not 0 < args.view_token_dropout < 1:
        raise ValueError(f"view_token_dropout={args.view_token_dropout} must be above 0 and below 1.")
    if args.view_loss_weight and (args.gradient_cache_chunk_size or args.graph_scope == "full"):
        raise ValueError(
            "view_loss_weight needs a batch that is embedded at once: leave out gradient_cache_chunk_size and"
            " graph_scope full."
        )


def second_view(batch: dict[str, Tensor], share: float, num_special: int) -> dict[str, Tensor]:
    """The unlabelled rows of a batch of `hidden_states` [B, T, D], `labels` and `node_ids`, without a random `share` of
    their patch tokens (as PatchDropout, Liu et al. 2023), other ones for each; the first `num_special` tokens stay.
    One labelled row where there is no other: no backbone takes an empty batch.

    Raises:
        ValueError: for a batch of images: tokens that have their positions come out of a prefix cache.
    """
    if "hidden_states" not in batch:
        raise ValueError("view_loss_weight needs the tokens of a prefix cache: set prefix_cache and trainable_blocks.")
    rows = (batch["labels"] < 0).nonzero()[:, 0]
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device)
    states = batch["hidden_states"][rows]
    num_patches = states.shape[1] - num_special
    kept = max(num_patches - round(share * num_patches), 1)
    order = torch.rand(len(rows), num_patches, device=states.device).argsort(-1)[:, :kept].sort(-1).values
    patches = states[:, num_special:].gather(1, order[..., None].expand(-1, -1, states.shape[2]))
    views = {"hidden_states": torch.cat([states[:, :num_special], patches], dim=1)}
    return views | {name: batch[name][rows] for name in ("labels", "node_ids")}


def view_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    nodes: dict[str, Tensor],
    embed: Callable[[dict[str, Tensor]], Tensor],
    noise: AbstractContextManager,
    share: float,
    config: BPGCNConfig,
) -> Tensor:
    """Mean KL(p || q) of the answers p to the U unlabelled of N nodes, without gradient, and q to their second views:
    queries at the nodes as a bank, all known classes shown, each without its own first view (as in unsupervised data
    augmentation, Xie et al. 2020, equation 1). 0 when no node is unlabelled.

    Args:
        batch: rows of this process, see `second_view`; `share` as there.
        nodes: `features` [N, D], `labels` and `node_ids` of all processes.
        embed: features [n, D] of such a batch.
        noise: within it the graph draws random numbers.
    """
    views = second_view(batch, share, 1 + getattr(config.backbone_config, "num_register_tokens", 0))
    views |= {"features": embed(views)}
    unlabeled = views["labels"] < 0
    views = {name: gather_rows(views[name][unlabeled]) for name in nodes}
    U = len(views["node_ids"])
    if U == 0:
        return views["features"].sum() * 0.0
    rows = {name: torch.cat([views[name], nodes[name]]) for name in ("features", "labels", "node_ids")}
    with noise:
        answers = model(
            features=rows["features"],
            node_ids=rows["node_ids"],
            support_classes=rows["labels"],
            support="batch",
            num_context=len(nodes["node_ids"]),
            support_apart=True,
        ).logits
    first = answers[U:][nodes["labels"] < 0].detach()
    return (first.exp() * (first - answers[:U])).sum(-1).mean()
