"""The gradient of the training objective on one batch graph, told apart by the way it takes to the features."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..modeling_bpgcn import BPGCNForImageClassification
from ..ranking import Ranking, rank_logits, similarity
from .ranking_metrics import effective_neighbors

SELF_CHECK = 1e-2  # relative; float32 at a small temperature leaves some 1e-4


@dataclass(frozen=True)
class GraphGradients:
    """Gradients of a loss on one graph of N images; None where there is none.

    `loss` [], `loss_parts` unweighted; `ranking` [N, k] with its `temperature`; `messages` [N, D] and `ranked` [N, D],
    the gradients of the features as the head and as the ranking read them; `through_edges` [N, D], what of `ranked` has
    passed the edge weights; `weights` [N, k], of these; `head`: name, gradient of the output and of the parameters of
    each layer, first to last; `is_self` [N, k]: the edge leads to the image itself.
    """

    loss: Tensor
    loss_parts: dict[str, Tensor]
    ranking: Ranking
    temperature: float
    is_self: Tensor
    messages: Tensor | None
    ranked: Tensor | None
    through_edges: Tensor | None
    weights: Tensor | None
    head: list[tuple[str, Tensor | None, list[Tensor | None]]]

    @property
    def edge_share(self) -> float:
        """|e| / (|e| + |g - e|), g the gradient at the features and e what of it has passed the edge weights."""
        edges = self.through_edges
        if edges is None:
            return 0.0
        rest = self.ranked - edges if self.messages is None else self.ranked - edges + self.messages
        total = edges.norm() + rest.norm()
        return (edges.norm() / total).item() if total > 0 else 0.0

    @property
    def effective_neighbors(self) -> float:
        """Mean perplexity of the rows of edge weights."""
        return effective_neighbors(self.ranking.weights.detach()).mean().item()

    @property
    def self_mass(self) -> float | None:
        """Mean weight of an image as its own neighbour; None where it is no neighbour of any."""
        return (self.ranking.weights.detach() * self.is_self).sum(-1).mean().item() if self.is_self.any() else None

    @property
    def spread(self) -> float:
        """How far the heaviest and lightest of a row's weights are from their mean, relative to it; self left out."""
        weights = self.ranking.weights.detach().masked_fill(self.is_self, torch.nan)
        mean = weights.nanmean(-1, keepdim=True)
        return ((weights - mean).abs() / mean).nan_to_num(0.0).amax(-1).median().item()


@contextmanager
def config_values(config, **values) -> Iterator[None]:
    """Other values in a config, for a while."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def prepare(
    model: BPGCNForImageClassification | PeftModel, batch: dict[str, Tensor]
) -> tuple[BPGCNForImageClassification, dict[str, Tensor]]:
    """The model without adapters' wrapper, and the batch on its device.

    Raises:
        ValueError: for a batch without labels.
    """
    if batch.get("labels") is None:
        raise ValueError(
            "The batch has no `labels`: without a loss there is no gradient. Use -100 for unknown classes."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(base.parameters()).device
    return base, {name: value.to(device) for name, value in batch.items()}


def temperature_of(model: BPGCNForImageClassification) -> float:
    """tau, as it is now, also where it is learned."""
    return torch.as_tensor(model.bpgcn.ranking_temperature(), dtype=torch.float64).item()


def embed_nodes(model: BPGCNForImageClassification, batch: dict[str, Tensor]) -> Tensor:
    """Features [N, D] of a batch; where no part of the backbone trains, a leaf that asks for its gradient."""
    images = (batch.get(name) for name in ("pixel_values", "features", "hidden_states"))
    features = model.bpgcn.embed(*images)
    return features if features.requires_grad else features.detach().requires_grad_()


def gradients(output: Tensor, inputs: Sequence[Tensor | None], upstream: Tensor | None = None) -> list[Tensor | None]:
    """d output / d inputs (times `upstream`), None for an input that is not tracked or that the output never read."""
    tracked = [x for x in inputs if x is not None and x.requires_grad]
    if not tracked or not output.requires_grad:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(output, tracked, upstream, retain_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def graph_gradients(
    model: BPGCNForImageClassification, batch: dict[str, Tensor], features: Tensor, seed: int
) -> GraphGradients:
    """One pass through ranking, graph, head and objective, and back to the features [N, D].

    `model.bpgcn.rank` and the head run as in training: what is broken there shows here.
    """
    torch.manual_seed(seed)
    node_ids = batch.get("node_ids")
    with _layer_outputs(model.head) as layers:
        outputs = model(
            features=features, labels=batch["labels"], node_ids=node_ids, support="batch", output_path_features=True
        )
    ranked, messages = outputs.path_features
    ranking = Ranking(outputs.neighbor_indices, outputs.neighbor_weights)
    parameters = [list(layer.parameters()) for layer, _ in layers.values()]
    wanted = [messages, ranked, ranking.weights, *(output for _, output in layers.values())]
    found = gradients(outputs.loss, [*wanted, *(p for group in parameters for p in group)])
    messages_g, ranked_g, weights_g, *outputs_g = found[: len(wanted)]
    parameters_g = iter(found[len(wanted) :])
    through_edges = None if weights_g is None else gradients(ranking.weights, [ranked], weights_g)[0]
    ids = torch.arange(len(features), device=features.device) if node_ids is None else node_ids
    return GraphGradients(
        loss=outputs.loss.detach(),
        loss_parts=outputs.loss_parts,
        ranking=ranking,
        temperature=temperature_of(model),
        is_self=ids[ranking.indices] == ids[:, None],
        messages=None if messages_g is None else messages_g.to(features.dtype),
        ranked=ranked_g,
        through_edges=through_edges,
        weights=weights_g,
        head=[
            (name, output_g, [next(parameters_g) for _ in group])
            for name, output_g, group in zip(layers, outputs_g, parameters, strict=True)
        ],
    )


@contextmanager
def _layer_outputs(head: nn.Module | None) -> Iterator[dict[str, tuple[nn.Module, Tensor]]]:
    """Of the head's layers that run: name -> module and output. A layer is the outermost that has parameters itself."""
    seen, handles = {}, []

    def record(name: str):
        def hook(module, args, output):
            seen[name] = module, output[0] if isinstance(output, tuple) else output

        return hook

    def watch(module: nn.Module, name: str) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_hook(record(name)))
            return
        for child, part in module.named_children():
            watch(part, f"{name} {child}".replace("layers ", "layer "))

    if head is not None:
        watch(head, "head")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def similarity_gradient(
    model: BPGCNForImageClassification, features: Tensor, node_ids: Tensor | None, graph: GraphGradients
) -> Tensor | None:
    r"""dL/dS [N, N] that has passed the edge weights; S_ij, what i thinks of j, and S_ji are two numbers.

    The operator is applied to explicit similarities, so that autograd says what its relaxation and normalization make
    of dL/da [N, k]. None unless this gradient, carried on from S, is the one that has reached the features: then
    `model.bpgcn.rank` is not `soft_topk` with `rank_options()`, and only its author knows what it makes of S.
    """
    options = model.bpgcn.rank_options()
    ids = None
    if options["exclude_self"]:
        ids = torch.arange(len(features), device=features.device) if node_ids is None else node_ids
        ids = ids, ids
    rows = features.detach().to(graph.ranking.weights.dtype).requires_grad_()
    scores = similarity(rows, rows, options["metric"])
    leaf = scores.detach().requires_grad_()
    k = graph.ranking.indices.shape[1]
    again = rank_logits(leaf / graph.temperature, k, options["relaxation"], options["normalization"], ids)
    # near-equal scores may come in another order here
    by_edge = torch.zeros_like(leaf).scatter_add(1, graph.ranking.indices, graph.weights)
    [scores_g] = gradients(again.weights, [leaf], by_edge.gather(1, again.indices))
    [carried_on] = gradients(scores, [rows], scores_g)
    arrived = graph.through_edges.to(carried_on.dtype)
    explained = (carried_on - arrived).norm() <= SELF_CHECK * arrived.norm()
    return scores_g if explained else None
