"""Where the gradient of the loss arrives: at every stage from the loss back to the first block, along the feature path
(what the messages say) and the ranking path (who is whose neighbour), and what that means for training."""

import sys
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..configuration_bpgcn import LOSS_WEIGHTS
from ..image_features import first_modules
from ..modeling_bpgcn import BPGCNForImageClassification
from .gradient_verdict import percent, verdict
from .graph_gradients import (
    GraphGradients,
    config_values,
    embed_nodes,
    gradients,
    graph_gradients,
    prepare,
    similarity_gradient,
)
from .undisturbed import undisturbed

SHARED, FEATURE, RANKING = "both paths", "feature path", "ranking path"
RELATIVE_ZERO = 1e-6  # of the largest one: a smaller gradient counts as none


@dataclass(frozen=True)
class Stage:
    """A stop of the gradient: its norm on each path that leads here, None where nothing arrives. A path that does not
    lead here is left out; where nothing trains (frozen blocks) all are."""

    name: str
    norms: dict[str, float | None]


@dataclass(frozen=True)
class GradientFlow:
    """
    What `gradient_flow` found.

    Args:
        stages: from the loss to the first block.
        loss_parts: for each part of the objective its weighted `value`, and the norm of its gradient at the features
            by path.
        edge_share: how much of the features' gradient arrives through the edge weights, |e| / (|e| + |g - e|) for the
            whole gradient g and the part e that has passed them.
        cosine: of the angle between the two paths' gradients at the features; None where one is missing.
        edges_reached: share of edges whose weight gets a gradient of more than `RELATIVE_ZERO` times the largest.
        unlabeled_reached: share of unlabelled images whose feature does, by path; None without such images.
        effective_neighbors: mean perplexity of the rows of edge weights, at most `num_neighbors`.
        num_neighbors: k of this graph.
        self_mass: mean weight of an image as its own neighbour; None where it is none.
        temperature: tau.
        verdict: all of it in one line.
    """

    stages: list[Stage]
    loss_parts: dict[str, dict[str, float | None]]
    edge_share: float
    cosine: float | None
    edges_reached: float
    unlabeled_reached: dict[str, float | None]
    effective_neighbors: float
    num_neighbors: int
    self_mass: float | None
    temperature: float
    verdict: str

    def norms(self, stage: str) -> dict[str, float | None]:
        """The norms of a stage, by path; KeyError for one that is not there."""
        return {part.name: part.norms for part in self.stages}[stage]

    def numbers(self) -> dict[str, float]:
        """The main numbers, as logs carry them; norms are 0 where nothing arrives."""
        values = {"edge_share": self.edge_share, "edges_reached": self.edges_reached, "cosine": self.cosine}
        for path, norm in self.norms("features").items():
            name = path.replace(" ", "_")
            values |= {f"{name}_norm": norm or 0.0, f"{name}_reaches_unlabeled": self.unlabeled_reached[path]}
        return {f"gradient_flow_{name}": value for name, value in values.items() if value is not None}

    def table(self) -> str:
        """Stage, feature path and ranking path as lines of text, then the other numbers and the verdict."""
        lines = [f"{'stage':<24}{FEATURE:>14}{RANKING:>14}"]
        for stage in self.stages:
            norms = (
                {FEATURE: stage.norms[SHARED], RANKING: stage.norms[SHARED]} if SHARED in stage.norms else stage.norms
            )
            cells = (_cell(norms, path) if norms else "frozen" for path in (FEATURE, RANKING))
            lines.append(f"{stage.name:<24}" + "".join(f"{cell:>14}" for cell in cells))
        return "\n".join([*lines, "", *self.notes(), "", self.verdict])

    def notes(self) -> list[str]:
        """The shares and the state of the ranking, a line each."""
        reached = (f"{path} {percent(x)}" for path, x in self.unlabeled_reached.items() if x is not None)
        own = "" if self.self_mass is None else f", self takes {percent(self.self_mass)}"
        effective = f"{self.effective_neighbors:.1f} effective neighbors of {self.num_neighbors}"
        lines = [
            f"through the edges: {percent(self.edge_share)} of the features' gradient",
            f"edges with a gradient: {percent(self.edges_reached)}",
            f"unlabeled images reached: {', '.join(reached) or 'there are none'}",
            f"tau {self.temperature:.3g}: {effective}{own}",
        ]
        if self.cosine is not None:
            lines.append(f"cosine of both paths: {self.cosine:+.2f}")
        for name, part in self.loss_parts.items():
            norms = ", ".join(f"{path} {_cell(part, path)}" for path in self.unlabeled_reached)
            lines.append(f"{name.replace('_', ' ')} {part['value']:.3g}: {norms}")
        return lines


def _cell(norms: dict[str, float | None], path: str) -> str:
    if path not in norms:
        return "-"
    return "none" if norms[path] is None else f"{norms[path]:.2e}"


def gradient_flow(
    model: BPGCNForImageClassification | PeftModel, batch: dict[str, Tensor], *, seed: int = 0
) -> GradientFlow:
    r"""
    Follow the gradient of the training objective on the graph of one batch, from the loss to the first block.

    Stages, last to first: `loss`; each layer of the head, its output and its parameters, where the paths are still one;
    on the feature path `messages`, the features as the head reads them [N, D]; on the ranking path `edge weights`,
    dL/da [N, k], and `similarities`, dL/dS [N, N] as far as it has passed the edges,

        dL/dS_ij = sum_l dL/da_il da_il/dS_ij      (softmax over the k selected: a_ij (g_ij - sum_l g_il a_il) / tau)

    where S_ij and S_ji are two numbers and unselected candidates count too (normalization `all` gives them a gradient);
    `features`, dL/dF [N, D]; and the parameters of each block of the backbone. A neighbourhood loss reads similarities
    without edges: it is part of the ranking path from `features` on. The backbone's backward pass is linear in what
    arrives at the features, so the gradient of each path is carried on to the blocks by itself.

    The objective is that of training on the batch's own graph. Dropout is off, and `gumbel` is its mean, so that the
    numbers are the model's and not a draw's; which labels masked propagation reveals is drawn by `seed`. The model, its
    parameters' gradients and torch's random stream are left as they were.

    Args:
        model: on its device; not sharded.
        batch: `labels` [N] int64 (-100 unknown), `node_ids` [N] if images have names, and one of `pixel_values`,
            `hidden_states` and `features` as in the model's forward pass.
        seed: of the revealed labels.

    Raises:
        ValueError: for a batch without labels or images, or features that are not finite.
    """
    model, batch = prepare(model, batch)
    unlabeled = batch["labels"] < 0
    with undisturbed(model), torch.enable_grad():
        features = embed_nodes(model, batch)
        graph = graph_gradients(model, batch, features, seed)
        paths = {RANKING: graph.ranked} if model.head is None else {FEATURE: graph.messages, RANKING: graph.ranked}
        stages = [Stage("loss", {SHARED: 1.0})]
        for name, output_g, parameters_g in reversed(graph.head):
            stages += [Stage(f"{name} output", {SHARED: _norm(output_g)})]
            stages += [Stage(f"{name} weights", {SHARED: _norm(*parameters_g)})]
        if FEATURE in paths:  # else there is no head to read messages
            stages.append(Stage("messages", {FEATURE: _norm(graph.messages)}))
        stages += [
            Stage("edge weights", {RANKING: _norm(graph.weights)}),
            *_similarities(model, batch, features, graph),
        ]
        stages.append(Stage("features", {path: _norm(gradient) for path, gradient in paths.items()}))
        if "features" not in batch:
            stages += _blocks(model.bpgcn.backbone, features, paths)
        parts = {name: _part(model, batch, features, seed, name, paths) for name in graph.loss_parts}
    return GradientFlow(
        stages=stages,
        loss_parts=parts,
        edge_share=graph.edge_share,
        cosine=_cosine(graph.messages, graph.ranked),
        edges_reached=0.0 if graph.weights is None else _share(graph.weights.abs()),
        unlabeled_reached={path: _reached(gradient, unlabeled) for path, gradient in paths.items()},
        effective_neighbors=graph.effective_neighbors,
        num_neighbors=graph.ranking.indices.shape[1],
        self_mass=graph.self_mass,
        temperature=graph.temperature,
        verdict=verdict(model.config, graph, int((~unlabeled).sum())),
    )


def _similarities(model, batch, features, graph: GraphGradients) -> list[Stage]:
    if graph.through_edges is None:
        return [Stage("similarities", {RANKING: None})]
    gradient = similarity_gradient(model, features, batch.get("node_ids"), graph)
    return [] if gradient is None else [Stage("similarities", {RANKING: _norm(gradient)})]


def _blocks(backbone: nn.Module, features: Tensor, paths: dict[str, Tensor | None]) -> list[Stage]:
    """The backbone's parts, last to first; a backbone that is no plain stack of blocks is one part."""
    try:
        embeddings, *blocks = first_modules(backbone, sys.maxsize)
    except ValueError:
        groups, last = {}, "backbone"
    else:
        groups, last = {"embeddings": embeddings} | {f"block {i}": block for i, block in enumerate(blocks)}, "last norm"
    parameters = {name: [p for p in part.parameters() if p.requires_grad] for name, part in groups.items()}
    inside = {id(p) for part in groups.values() for p in part.parameters()}
    rest = [p for p in backbone.parameters() if id(p) not in inside and p.requires_grad]
    if rest or not groups:
        parameters[last] = rest
    norms = {name: {} for name in parameters}
    for path, gradient in paths.items():
        flat = [p for group in parameters.values() for p in group]
        found = iter([None] * len(flat) if gradient is None else gradients(features, flat, gradient))
        for name, group in parameters.items():
            norm = _norm(*(next(found) for _ in group))
            if group:
                norms[name][path] = norm
    return [Stage(name, norms[name]) for name in reversed(norms)]


def _part(model, batch, features, seed: int, name: str, paths) -> dict[str, float | None]:
    """One part of the objective by itself: its weighted value, and the norms of its gradient at the features."""
    others = {weight: 0.0 for weight in LOSS_WEIGHTS if weight != f"{name}_weight"}
    with config_values(model.config, **others):
        graph = graph_gradients(model, batch, features, seed)
    found = {FEATURE: graph.messages, RANKING: graph.ranked}
    return {"value": graph.loss.item()} | {path: _norm(found[path]) for path in paths}


def _norm(*parts: Tensor | None) -> float | None:
    """The norm of all of them together, None where there is none."""
    squares = [part.double().square().sum() for part in parts if part is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else None


def _share(sizes: Tensor, of: Tensor | None = None) -> float:
    """The share of sizes >= 0 (of those where `of` holds) that count as a gradient."""
    reached = sizes > RELATIVE_ZERO * sizes.max() if sizes.numel() else sizes > 0
    return (reached if of is None else reached[of]).double().mean().item()


def _reached(gradient: Tensor | None, rows: Tensor) -> float | None:
    """The share of rows that get a gradient [N, D], among those asked for."""
    if not rows.any():
        return None
    return 0.0 if gradient is None else _share(gradient.norm(dim=-1), rows)


def _cosine(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None or not (one.any() and other.any()):
        return None
    return torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()
