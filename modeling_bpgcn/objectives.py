"""The objective: losses that a better ranking lowers, beside the head's own. Rows labelled -100 have no known class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .configuration_bpgcn import BPGCNConfig
from .graph import RankingGraph
from .heads import LabelPropagation
from .ranking import similarity

logger = logging.get_logger(__name__)

UNKNOWN = -100


def objective(
    config: BPGCNConfig,
    labels: Tensor,
    head_logits: Tensor | None,
    propagation: LabelPropagation,
    label_graph: RankingGraph,
    features: Tensor,
    ids: Tensor | None,
    temperature: float | Tensor,
    num_context: int = 0,
    reveal_ratio: float | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses whose weight is not 0, and each of them, unweighted and detached.

    The last `num_context` of the N nodes are context: their classes are always revealed, and nothing is asked of them.
    `reveal_ratio` takes the place of the config's; `read` [N] are the classes that the head has read (-100: it has
    not), for which its loss does not ask.
    """
    reveal_ratio = config.reveal_ratio if reveal_ratio is None else reveal_ratio
    parts = {}
    asked = slice(0, len(labels) - num_context)
    if config.head_loss_weight and head_logits is not None:
        unread = labels if read is None else labels.masked_fill(read >= 0, UNKNOWN)
        parts["head_loss"] = head_loss(head_logits[asked], unread[asked])
    if config.propagation_loss_weight:
        parts["propagation_loss"] = masked_propagation_loss(
            propagation, label_graph, labels, config.num_labels, reveal_ratio, num_context
        )
    for part in (neighborhood_loss, average_precision_loss):
        name = part.__name__
        if getattr(config, f"{name}_weight"):
            ids = torch.arange(len(labels), device=labels.device) if ids is None else ids
            parts[name] = part(features, labels, ids, temperature, config.ranking_metric, num_context)
    if config.consistency_loss_weight and head_logits is not None:
        parts["consistency_loss"] = consistency_loss(head_logits[asked], labels[asked])
    if config.propagation_consistency_loss_weight:
        parts["propagation_consistency_loss"] = propagation_consistency_loss(
            propagation, label_graph, labels, config.num_labels, num_context
        )
    loss = sum(getattr(config, f"{name}_weight") * value for name, value in parts.items())
    return loss, {name: value.detach() for name, value in parts.items()}


def check_classes(num_labels: int, *, labels: Tensor | None, support_classes: Tensor | None) -> None:
    """Raise a `ValueError` for classes that the model does not know; warn once when a batch teaches no class."""
    if torch.compiler.is_compiling():
        return
    for name, classes in (("labels", labels), ("support_classes", support_classes)):
        if classes is None:
            continue
        wrong = classes[(classes >= num_labels) | ((classes < 0) & (classes != UNKNOWN))]
        if wrong.numel():
            raise ValueError(
                f"{name} holds class {int(wrong[0])}, but num_labels={num_labels}: set num_labels when the model is"
                f" made, and use {UNKNOWN} for unknown classes."
            )
    if labels is not None and not (labels >= 0).any():
        logger.warning_once(
            "A batch holds no labelled image, so no class teaches its step: set labeled_batch_fraction, or use larger"
            " batches."
        )


def known_classes(classes: Tensor, num_labels: int, dtype: torch.dtype) -> Tensor:
    """[N] classes -> [N, C] one-hot rows, zero where unknown."""
    rows = F.one_hot(classes.clamp_min(0), num_labels).to(dtype)
    return rows * (classes >= 0)[:, None]


def head_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL of the labelled rows; 0 (with a gradient of 0) when there is none. Shapes [N, C] and [N]."""
    total = F.nll_loss(log_probabilities, labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels >= 0).sum().clamp_min(1)


def draw_hidden(labels: Tensor, reveal_ratio: float, num_context: int = 0) -> Tensor:
    """The labelled nodes whose class is not revealed, at random; at least one of each kind, where context does not
    reveal any. Empty when no node is left to ask, or none to reveal."""
    labeled = (labels[: len(labels) - num_context] >= 0).nonzero()[:, 0]
    least = 0 if (labels[len(labels) - num_context :] >= 0).any() else 1  # context may be all that is revealed
    if labeled.numel() < 1 + least:
        return labeled[:0]
    # drawn on the CPU: the same for every process and device
    shuffled = labeled[torch.randperm(labeled.numel()).to(labels.device)]
    return shuffled[min(max(round(reveal_ratio * labeled.numel()), least), labeled.numel() - 1) :]


def masked_propagation_loss(
    propagation: LabelPropagation,
    graph: RankingGraph,
    labels: Tensor,
    num_labels: int,
    reveal_ratio: float,
    num_context: int = 0,
) -> Tensor:
    """Reveal the classes of a random share of the labelled nodes, propagate them, mean NLL of the others.

    Only the edge weights carry this gradient: it is the pure ranking path (relatives: TPN, Liu et al. 2019; masked
    label prediction, Shi et al. 2021). 0 when no node is left to ask, or none to reveal.
    """
    hidden = draw_hidden(labels, reveal_ratio, num_context)
    if hidden.numel() == 0:
        return graph.edge_weight.sum() * 0.0
    seen = labels.index_fill(0, hidden, UNKNOWN)
    z, _ = propagation(graph, known_classes(seen, num_labels, graph.edge_weight.dtype))
    return F.nll_loss(propagation.log_probabilities(z[hidden]), labels[hidden])


def neighborhood_loss(
    features: Tensor,
    labels: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    metric: str,
    num_context: int = 0,
) -> Tensor:
    """-log of the soft ranking's mass on a labelled node's own class, among labelled nodes, itself excluded (NCA,
    Goldberger et al. 2005). Nodes without another of their class are left out; 0 when none is left."""
    labeled = (labels >= 0).nonzero()[:, 0]
    asked = labeled < len(labels) - num_context
    features, classes, ids = features[labeled], labels[labeled], ids[labeled]
    other = ids[:, None] != ids[None, :]
    same = (classes[:, None] == classes[None, :]) & other
    counted = same.any(-1) & asked
    if not counted.any():
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        exact = features if features.dtype == torch.float64 else features.float()
        logits = similarity(exact[counted], exact, metric) / temperature
    logits = logits.masked_fill(~other[counted], -math.inf)
    own = torch.logsumexp(logits.masked_fill(~same[counted], -math.inf), dim=-1)
    return (torch.logsumexp(logits, dim=-1) - own).mean()


def average_precision_loss(
    features: Tensor,
    labels: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    metric: str,
    num_context: int = 0,
) -> Tensor:
    r"""1 - the average precision of a labelled node's ranking of the others, with smooth ranks (Smooth-AP, Brown et al.
    2020, equation 5), mean over the nodes: for node i, the P_i of its class, and all others O_i,

        AP_i = 1/|P_i| sum_{j in P_i} (1 + sum_{l in P_i} sigma_lj) / (1 + sum_{l in O_i} sigma_lj)
        sigma_lj = sigmoid((S_il - S_ij) / temperature), l != j

    in memory O(L^3 / C) for L labelled nodes. Nodes without another of their class are left out; 0 when none is
    left."""
    labeled = (labels >= 0).nonzero()[:, 0]
    features, classes, ids = features[labeled], labels[labeled], ids[labeled]
    asked = (labeled < len(labels) - num_context)[:, None]
    other = ids[:, None] != ids[None, :]
    same = (classes[:, None] == classes[None, :]) & other
    node, match = (same & asked).nonzero(as_tuple=True)  # every pair (i, j) of one class
    if node.numel() == 0:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        exact = features if features.dtype == torch.float64 else features.float()
        scores = similarity(exact, exact, metric)
        above = torch.sigmoid((scores[node] - scores[node, match][:, None]) / temperature)  # [pairs, L]
    counted = other[node].scatter(1, match[:, None], False)
    precision = (1 + (above * (counted & same[node])).sum(-1)) / (1 + (above * counted).sum(-1))
    pairs = same.sum(-1)[node]  # |P_i| of each pair
    return 1 - (precision / pairs).sum() / (1 / pairs.to(precision.dtype)).sum()


def consistency_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Unlabelled rows: sure answers, that share out over the classes as the labelled rows do. With p_i the answers,
    and q the classes' shares (one more image of each class counted): mean_i H(p_i) + KL(mean_i p_i || q), which is >= 0
    (information maximisation, Krause et al. 2010, equation 6). 0 when every row is labelled. Shapes [N, C] and [N]."""
    rows = log_probabilities[labels < 0]
    if rows.shape[0] == 0:
        return log_probabilities.sum() * 0.0
    entropy = -(rows.exp() * rows).sum(-1).mean()
    marginal = rows.exp().mean(0)
    counts = torch.bincount(labels[labels >= 0], minlength=rows.shape[1]).to(rows.dtype) + 1
    divergence = (marginal * (marginal.clamp_min(1e-12).log() - (counts / counts.sum()).log())).sum()
    return entropy + divergence


def propagation_consistency_loss(
    propagation: LabelPropagation, graph: RankingGraph, labels: Tensor, num_labels: int, num_context: int = 0
) -> Tensor:
    """`consistency_loss` of the propagated labels, every known class revealed. Only the edge weights carry this
    gradient, as that of `masked_propagation_loss`. 0 when no node is left to ask, or none to reveal."""
    asked = labels[: len(labels) - num_context]
    if not ((asked < 0).any() and (labels >= 0).any()):
        return graph.edge_weight.sum() * 0.0
    z, _ = propagation(graph, known_classes(labels, num_labels, graph.edge_weight.dtype))
    return consistency_loss(propagation.log_probabilities(z[: len(asked)]), asked)
