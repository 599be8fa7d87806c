"""Small models and data that the tests of the modelling files share."""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification
from modeling_bpgcn.configuration_bpgcn import LOSS_WEIGHTS
from modeling_bpgcn.ranking import Ranking

CLASSES = 3
BACKBONES = ("dinov2", "dinov2_with_registers", "vit")
HEAD_NAMES = ("gcn", "sgc", "appnp", "gat", "arma", "label_propagation", "linear")


def tiny_backbone(kind: str = "dinov2", **overrides) -> PreTrainedConfig:
    """Patches of 4 pixels, images of 8, width 8, two layers."""
    fields = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "mlp_ratio": 2,
        "image_size": 8,
        "patch_size": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind.startswith("dinov2"):
        del fields["intermediate_size"]
    else:
        del fields["mlp_ratio"]
    return AutoConfig.for_model(kind, **(fields | overrides))


def tiny_config(**overrides) -> BPGCNConfig:
    """Three classes, three neighbours, a head of width 8 without dropout."""
    fields = {
        "backbone_config": tiny_backbone(),
        "num_labels": CLASSES,
        "num_neighbors": 3,
        "ranking_temperature": 0.1,
        "head_hidden_size": 8,
        "head_num_attention_heads": 2,
        "head_propagation_steps": 3,
        "head_dropout": 0.0,
    }
    return BPGCNConfig(**(fields | overrides))


def only(loss: str) -> dict[str, float]:
    """Weights that leave one part of the objective."""
    return dict.fromkeys(LOSS_WEIGHTS, 0.0) | {f"{loss}_weight": 1.0}


def tiny_model(**overrides) -> BPGCNForImageClassification:
    """In evaluation mode, every parameter away from its start (biases are 0 there, which would hide their absence)."""
    model = BPGCNForImageClassification(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranking_temperature" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tiny_images(count: int, size: int = 8) -> Tensor:
    """Images that differ in colour and in pattern, so that their features spread."""
    return torch.randn(count, 3, 1, 1) + torch.randn(count, 3, size, size)


def random_ranking(N: int, k: int, M: int | None = None, dtype=torch.float64) -> Ranking:
    """Directed, unsymmetric, no self-loops (unless the sources are another set of M), positive weights."""
    scores = torch.rand(N, M or N)
    if M is None:
        scores.fill_diagonal_(-1)
    return Ranking(scores.topk(k).indices, torch.rand(N, k, dtype=dtype) + 0.1)


def dense_ranking(ranking: Ranking, M: int | None = None) -> Tensor:
    """A [N, M]: the weights of a ranking in their columns."""
    N = ranking.indices.shape[0]
    return ranking.weights.new_zeros(N, M or N).scatter(1, ranking.indices, ranking.weights)


@contextlib.contextmanager
def captured_warnings(logger) -> Iterator[list[str]]:
    """What a transformers logger warns of, said-once memory cleared first."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        type(logger).warning_once.cache_clear()
