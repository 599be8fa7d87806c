"""Training as answers are given later: a part of each batch plays the support bank, and the rest asks it."""

import torch
from torch import Tensor
from transformers import TrainingArguments


def check_support(args: TrainingArguments) -> None:
    """Raise a `ValueError` for a `support_fraction` out of range, or that another option excludes."""
    if not 0 <= args.support_fraction < 1:
        raise ValueError(f"support_fraction={args.support_fraction} must be at least 0 and below 1.")
    others = {"graph_scope": "memory", "ranking_shards": ("rows", "ring"), "gradient_norm_penalty": None}
    for name, excluded in others.items():
        value = getattr(args, name)
        if args.support_fraction and (value if excluded is None else value in excluded):
            raise ValueError(f"support_fraction cannot be used with {name}={value}: leave out one of them.")


def check_support_graph(args: TrainingArguments, symmetrization: str) -> None:
    """Raise a `ValueError` for a graph in which no query could read the support."""
    for name in ("support_fraction", "view_loss_weight"):
        if getattr(args, name) and symmetrization == "mutual":
            raise ValueError(
                f"{name} needs neighbours that are not mutual, as a query is the neighbour of no other image: set"
                " graph_symmetrization to none or mean."
            )


def set_support_apart(nodes: dict[str, Tensor], asked: int, fraction: float) -> tuple[dict[str, Tensor], int]:
    """Rows [N, ...] in random order, of which the last share of `fraction` is support, at least 2 and not all; and the
    number of the others, the queries. With a fraction of 0 the nodes and `asked` as they are."""
    if fraction == 0:
        return nodes, asked
    count = len(nodes["labels"])
    num_support = min(max(round(fraction * count), 2), count - 1)
    # drawn on the CPU: the same for every process and device
    order = torch.randperm(count).to(nodes["labels"].device)
    return {name: rows[order] for name, rows in nodes.items()}, count - num_support
