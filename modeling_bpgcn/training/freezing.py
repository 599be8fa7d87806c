"""Which parameters train, by name, and in which group of the optimizer."""

import re

import torch
from torch import nn

GROUPS = ("backbone", "head", "temperature")


def group_of(name: str) -> str:
    """The group of a parameter of `BPGCNForImageClassification` (or of a PEFT model around it)."""
    if "ranking_temperature." in name:
        return "temperature"
    return "backbone" if ".backbone." in name else "head"


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float]) -> None:
    """Split the optimizer's parameter groups by `group_of`, each with its learning rate; the temperature never decays.

    Raises:
        ValueError: when no parameter trains.
    """
    names = {p: n for n, p in model.named_parameters()}
    groups = []
    for old in optimizer.param_groups:
        for name in GROUPS:
            members = [p for p in old["params"] if group_of(names[p]) == name]
            if members:
                decay = 0.0 if name == "temperature" else old["weight_decay"]
                groups.append({**old, "params": members, "lr": rates[name], "weight_decay": decay, "name": name})
    if not groups:
        raise ValueError("No parameter trains: freeze fewer of them, or raise trainable_blocks.")
    optimizer.param_groups[:] = groups


def freeze_by_pattern(model: nn.Module, patterns: list[str]) -> None:
    """Stop the training of every parameter whose name matches one of the regular expressions.

    Raises:
        ValueError: for a pattern that matches no parameter, naming it and some of the names.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if re.search(pattern, name)]
        if not matched:
            raise ValueError(
                f"freeze={pattern!r} matches no parameter; names look like {', '.join(list(names)[::40])}."
            )
        for name in matched:
            names[name].requires_grad_(False)


def train_last_blocks(backbone: nn.Module, num_blocks: int) -> None:
    """Freeze what comes before the last `num_blocks` blocks of the backbone; 0 freezes all of it.

    Raises:
        ValueError: for more blocks than there are, or a backbone whose blocks cannot be told.
    """
    count = backbone.config.num_hidden_layers
    stacks = [n for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ValueError(
            f"trainable_blocks: {type(backbone).__name__} has no list of {count} blocks; use freeze instead."
        )
    if num_blocks > count:
        raise ValueError(f"trainable_blocks={num_blocks} is more than the {count} blocks of the backbone.")
    first = f"{stacks[0]}.{count - num_blocks}."
    reached = False
    for name, parameter in backbone.named_parameters():
        # the parameters come in the order of the forward pass
        reached = reached or name.startswith(first)
        if not reached:
            parameter.requires_grad_(False)
