"""Known classes as inputs of the head: a learned embedding of each, added to the feature (masked label prediction, Shi
et al. 2021, "Masked Label Prediction: Unified Message Passing Model for Semi-Supervised Classification", 3.3)."""

from torch import Tensor, nn

from .configuration_bpgcn import BPGCNConfig
from .graph import RankingGraph
from .heads import HEADS, States
from .objectives import UNKNOWN, draw_hidden


class LabelInformedHead(nn.Module):
    """Another head on X + Y E: known classes Y [N, C], rows of zeros where they are not known, and embeddings E [C, D].

    Its first state is no longer the features alone, so a bank stores it.
    """

    reads_classes = True

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.head = HEADS[config.head](config)
        self.embedding = nn.Linear(config.num_labels, config.feature_size, bias=False)

    def forward(
        self, features: Tensor, graph: RankingGraph, support: States | None = None, known: Tensor | None = None
    ):
        if known is not None:
            features = features + self.embedding(known.to(features.dtype))
        return self.head(features, graph, support)


def build_head(config: BPGCNConfig) -> nn.Module | None:
    """The head of a config; None where label propagation is all there is."""
    if config.head == "label_propagation":
        return None
    return LabelInformedHead(config) if config.label_embedding else HEADS[config.head](config)


def run_head(
    head: nn.Module | None,
    features: Tensor,
    graph: RankingGraph,
    support: States | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor | None, States]:
    """Scores [N, C] and states of a head, nothing of None; `known` [N, C] reaches one that reads classes alone."""
    if head is None:
        return None, []
    if getattr(head, "reads_classes", False):  # an attribute, as peft wraps the head in a class of its own
        return head(features, graph, support, known)
    return head(features, graph, support)


def classes_to_read(
    labels: Tensor | None, support_classes: Tensor | None, training: bool, reveal_ratio: float, num_context: int
) -> Tensor | None:
    """The classes [N] of a batch graph that the head reads (-100: unknown), None for none: those that the caller shows,
    else in training the labels but a random part, for which the loss asks."""
    if support_classes is not None or labels is None or not training:
        return support_classes
    return labels.index_fill(0, draw_hidden(labels, reveal_ratio, num_context), UNKNOWN)
