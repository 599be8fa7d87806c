"""One line that says whether the ranking trains, and if not, why."""

from ..configuration_bpgcn import BPGCNConfig
from .graph_gradients import GraphGradients

FAULT, TRAINS = "FAULT:", "The ranking trains:"
WEAK = 0.05  # an `edge_share` below: the ranking hardly trains
FLAT = 0.97  # effective neighbours, as a share of k, above: all weigh about the same
SATURATED = 1.5  # effective neighbours below: the nearest has it all
FIXED, FLAT_NAME = "fixed", "flat"
DROWNED = 0.5  # weight of an image as its own neighbour above: no other matters


def verdict(config: BPGCNConfig, graph: GraphGradients, num_labeled: int) -> str:
    """The state of the ranking in words, which begin with `FAULT` where the code is to blame rather than a setting, and
    with `TRAINS` where all is well."""
    if not _reads_edges(config):
        other = " The neighborhood loss trains the similarities themselves." if config.neighborhood_loss_weight else ""
        weights = "propagation_loss_weight and propagation_consistency_loss_weight are 0"
        return f"No loss reads the edges: head={config.head!r}, and {weights}.{other}"
    if graph.weights is None:
        cause = "were never handed to the graph" if graph.ranking.weights.requires_grad else "are detached or constant"
        return f"{FAULT} the edges carry no gradient. Their weights {cause}."
    if graph.through_edges is None:
        return f"{FAULT} the edges' gradient does not reach the features. The ranking has read detached features."
    name, cause = _state(config, graph)
    if not graph.weights.any() and name != FIXED:
        return f"No gradient: the loss asks nothing of this graph, of which {num_labeled} images are labeled."
    arrives = f"{percent(graph.edge_share)} of the features' gradient arrives through the edge weights"
    if graph.edge_share >= WEAK and name != FLAT_NAME:  # among equal weights there is no ranking, whatever arrives
        return f"The ranking trains although {cause}: {arrives}." if cause else f"{TRAINS} {arrives}."
    return f"The ranking is {name}: {cause}; {arrives}." if cause else f"The ranking is {name}: {arrives}."


def _state(config: BPGCNConfig, graph: GraphGradients) -> tuple[str, str]:
    """What keeps a ranking from training, in a word and in words."""
    tau, k, effective = graph.temperature, graph.ranking.indices.shape[1], graph.effective_neighbors
    if k == 1 and config.ranking_normalization == "selected":
        return FIXED, "the weight of a single neighbor is 1, whatever its similarity"
    if graph.self_mass is not None and graph.self_mass > DROWNED:
        return "drowned", f"tau = {tau:.3g} gives an image {percent(graph.self_mass)} of its own weights"
    if effective > FLAT * k:
        return FLAT_NAME, f"tau = {tau:.3g} leaves the weights within {percent(graph.spread)} of uniform"
    if effective < SATURATED:
        return "saturated", f"tau = {tau:.3g} leaves {effective:.1f} effective neighbors of {k}"
    return "faint", ""


def percent(share: float) -> str:
    """A share with two digits: `41 %`, `3.5 %`, `0.014 %`."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _reads_edges(config: BPGCNConfig) -> bool:
    head_loss = config.head_loss_weight > 0 or config.consistency_loss_weight > 0
    propagates = config.propagation_loss_weight > 0 or config.propagation_consistency_loss_weight > 0
    return propagates or (head_loss and config.head not in ("linear", "label_propagation"))
