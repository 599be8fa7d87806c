"""Which support images moved an answer: derivatives by each neighbor, and what removing a support image would change.

An answer from the support bank is log p_c of a class c (its logits are log-probabilities). A support image moves it
as a neighbor of the query, by its weight and its message; as a neighbor of other support images, whose states the
bank stores; and by its class, which flowed to them. `influence` says what each neighbor does, all that is stored held;
`label_influence` from whose classes the propagated labels came, exactly; `removal_influence` what would change if an
image were removed from the bank: all of it in one number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..label_embedding import run_head
from ..modeling_bpgcn import BPGCNForImageClassification
from ..objectives import known_classes
from ..ranking import Ranking, soft_topk

METHODS = ("exact", "first_order")
WAITING = 1e-6  # weight of the image that would move up, where an edge needs one to be differentiated by
EPS = 1e-12


@dataclass(frozen=True)
class Influence:
    """What each of the k neighbors of Q queries does to log p_c, its class c named by `class_index`.

    `class_index` [Q] and `log_probability` [Q]: the class asked about, and log p_c.
    `neighbor_indices` [Q, k] rows of the bank, `neighbor_weights` [Q, k] w, each row scaled to sum to 1.
    `weight_influence` [Q, k]: w_j (g_j - sum_l w_l g_l) with g = d log p_c / d w, minus the derivative along taking j
        away and scaling the others to sum to 1. Above 0: j speaks for c. Each row sums to 0.
    `feature_gradient` [Q, k, D]: d log p_c / d feature of the neighbor, through its similarity to the query and, where
        the head's first state is the feature, through its message. The query, the bank's deeper states and its
        propagated labels are held. `feature_norm` and `feature_influence` [Q, k] are its norm and its inner product
        with the feature; the cosine does not change along the feature, so there the latter is the message's part alone.
    `removal` [Q, k]: the change of log p_c when j goes and the next of the ranking moves up, all that is stored held.
    """

    class_index: Tensor
    log_probability: Tensor
    neighbor_indices: Tensor
    neighbor_weights: Tensor
    weight_influence: Tensor
    feature_gradient: Tensor
    feature_influence: Tensor
    removal: Tensor

    @property
    def feature_norm(self) -> Tensor:
        """[Q, k] norms of `feature_gradient`."""
        return self.feature_gradient.norm(dim=-1)


def influence(
    model: BPGCNForImageClassification,
    pixel_values: Tensor | None = None,
    features: Tensor | None = None,
    *,
    node_ids: Tensor | None = None,
    class_index: int | Tensor | None = None,
    method: str = "exact",
) -> Influence:
    """What each neighbor does to the answers of queries from the support bank.

    Args:
        pixel_values: [Q, channels, height, width] images, or `features` [Q, D] what the backbone made of them.
        node_ids: [Q] int64 names of the images, so that a query's copy in the bank is none of its neighbors.
        class_index: the class c asked about, one for all or [Q]; the answered class unless given.
        method: `exact` answers again without each neighbor, k answers per query; `first_order` estimates `removal` from
            the derivative by the weights.

    Raises:
        ValueError: for an unknown method, a class that the model does not know, or a model without a support bank.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}.")
    with _evaluating(model):
        query = model.bpgcn.embed(pixel_values, features).detach()
        bank = model.support_bank
        rows = _Rows.of_queries(model, query, node_ids)
        k, held = rows.num_neighbors, (bank.degree, bank.states, bank.propagated)
        logits = _answer(model, query, Ranking(rows.indices, rows.weights), *held).detach()
        classes = _asked(logits, class_index)
        edge = rows.leaf(model.config)
        answers = _answer(model, query, Ranking(rows.indices, edge), *held).gather(1, classes[:, None])
        [slope] = _gradients(answers.sum(), [edge])
        if method == "first_order":
            removal = rows.change(slope)
        else:
            without = Ranking(rows.indices.repeat_interleave(k, 0), rows.without.flatten(0, 1))
            answers = _answer(model, query.repeat_interleave(k, 0), without, *held).detach()
            removal = answers.view(len(query), k, -1) - logits[:, None]
            removal = removal.gather(2, classes[:, None, None].expand(-1, k, 1))[..., 0]
        weights, slope = rows.weights[:, :k], slope[:, :k]
        share = weights / weights.sum(-1, keepdim=True).clamp_min(EPS)
        carried = weights * slope
        return Influence(
            class_index=classes,
            log_probability=logits.gather(1, classes[:, None])[:, 0],
            neighbor_indices=rows.indices[:, :k],
            neighbor_weights=share,
            weight_influence=carried - share * carried.sum(-1, keepdim=True),
            removal=removal,
            **_by_feature(model, query, node_ids, classes, rows.indices[:, :k]),
        )


def label_influence(
    model: BPGCNForImageClassification,
    pixel_values: Tensor | None = None,
    features: Tensor | None = None,
    *,
    node_ids: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    r"""How much of a query's propagated labels came from the class of each support image: coefficients c [Q, M] >= 0.

        z_query = sum_s c_s onehot(y_s)

    Exact (to the precision the bank stores), as label propagation is linear in the known classes: it runs backwards
    from `chunk_size` queries at a time over the bank's graph, which is ranked again from its features. 0 for images of
    unknown class. Arguments and errors as in `influence`.
    """
    with _evaluating(model):
        query = model.bpgcn.embed(pixel_values, features).detach()
        bank, propagation = model.support_bank, model.label_propagation
        with torch.no_grad():
            nearest = model.bpgcn.rank_in_bank(query, node_ids)
            graph = model._label_graph(model.bpgcn.rank(bank.features, bank.ids))
        parts = []
        for indices, weights in zip(*(part.split(chunk_size) for part in nearest), strict=True):
            # a column for each query: columns do not mix, so that one backward pass serves them all
            known = weights.new_zeros(bank.size, len(indices)).requires_grad_()
            _, read = propagation(graph, known)
            z = propagation.read(model._label_graph(Ranking(indices, weights), bank.degree), read)
            parts.append(torch.autograd.grad(z.diagonal().sum(), known)[0].T)
        return torch.cat(parts) * (bank.classes >= 0)


def removal_influence(
    model: BPGCNForImageClassification,
    pixel_values: Tensor | None = None,
    features: Tensor | None = None,
    *,
    node_ids: Tensor | None = None,
    class_index: int | Tensor | None = None,
) -> Tensor:
    """The change of log p_c [Q, M] that removing each support image from the bank would bring, to first order.

    Below 0: the image supports the answer; the most influential come first in `scores.argsort()`. All that a rebuilt
    bank would change is counted: where the image was among the k neighbors, of the query or of a support image, the
    next one moves up, and its class is gone. These changes of the edge weights are exact (but for relaxations other
    than `softmax` and `straight_through`, where the weights that stay keep their proportions, and for `gumbel` and
    `mutual` graphs, where nothing moves up); the answer is taken to be linear in them. So trust the order more than the
    amounts, which overshoot where few labels reach a query. A query's copy in the bank counts, as others read it.

    One backward pass through the bank's graph per query, in time O(M k D) and memory O(M (D + k^2)). Arguments and
    errors as in `influence`.
    """
    with _evaluating(model):
        query = model.bpgcn.embed(pixel_values, features).detach()
        bank = model.support_bank
        nearest = _Rows.of_queries(model, query, node_ids)
        support = _Rows.widen(model, model.bpgcn.rank(bank.features, bank.ids), bank.features, bank.ids)
        edge, support_edge = nearest.leaf(model.config), support.leaf(model.config)
        known = known_classes(bank.classes, model.config.num_labels, edge.dtype).requires_grad_()
        ranking = Ranking(support.indices, support_edge)
        graph = model._graph(ranking)
        _, states = run_head(model.head, bank.features.to(model.dtype), graph, known=known)
        _, propagated = model.label_propagation(model._label_graph(ranking), known)
        logits = _answer(model, query, Ranking(nearest.indices, edge), graph.degree, states, propagated)
        given = Ranking(nearest.indices, nearest.weights), bank.degree, bank.states, bank.propagated
        classes = _asked(_answer(model, query, *given), class_index)
        scores = torch.zeros(len(query), bank.size).to(logits.detach())
        for i, answer in enumerate(logits.gather(1, classes[:, None])[:, 0]):
            by_edge, by_support_edge, by_class = _gradients(answer, [edge, support_edge, known])
            with torch.no_grad():
                own = _Rows(*(part[i : i + 1] for part in nearest))
                for rows, slope in ((own, by_edge[i : i + 1]), (support, by_support_edge)):
                    neighbors = rows.indices[:, : rows.num_neighbors]
                    scores[i].index_add_(0, neighbors.flatten(), rows.change(slope).flatten())
                scores[i] -= (by_class * known).sum(-1)
                if model.config.graph_symmetrization != "none":  # others read this one over its own row's edges, too
                    scores[i] -= (by_support_edge * support.weights).sum(-1)
        return scores


class _Rows(NamedTuple):
    """Rows of a ranking with the candidate behind the k neighbors, and what they would be without one of them.

    `indices` [N, k + 1]; `weights` [N, k + 1], 0 for the last; `without` [N, k, k + 1], the weights without the j-th.
    One column less where there is no further candidate.
    """

    indices: Tensor
    weights: Tensor
    without: Tensor

    @classmethod
    def of_queries(cls, model, query: Tensor, ids: Tensor | None) -> "_Rows":
        bank = model.support_bank
        ranking = model.bpgcn.rank_in_bank(query, ids)
        return cls.widen(model, ranking, query, ids, bank.features, None if ids is None else bank.ids)

    @classmethod
    @torch.no_grad()
    def widen(cls, model, ranking: Ranking, query, query_ids, key=None, key_ids=None) -> "_Rows":
        config, (indices, weights) = model.config, ranking
        k, kept = weights.shape[1], weights
        # one neighbor more can make another pair mutual, and draws other noise
        if config.graph_symmetrization != "mutual" and config.ranking_relaxation != "gumbel":
            options = model.bpgcn.rank_options() | {"num_neighbors": config.num_neighbors + 1}
            indices, kept = soft_topk(query, key, query_ids=query_ids, key_ids=key_ids, **options)
        others = kept[:, None, :] * (1 - torch.eye(kept.shape[1]).to(kept))[:k]
        rest = others.sum(-1)
        if config.ranking_normalization == "all":  # the candidates that are not kept have their part of the rest
            rest = torch.maximum(rest, 1 - kept[:, :k])
        without = others / rest[..., None].clamp_min(torch.finfo(rest.dtype).tiny)
        return cls(indices, F.pad(weights, (0, kept.shape[1] - k)), without)

    @property
    def num_neighbors(self) -> int:
        return self.without.shape[1]

    def leaf(self, config) -> Tensor:
        """The weights, to be differentiated by."""
        weights = self.weights.clone()
        if config.head == "gat":  # attention gives an edge of weight 0 no gradient
            weights[:, self.num_neighbors :] = WAITING * weights.sum(-1, keepdim=True)
        return weights.requires_grad_()

    def change(self, gradient: Tensor) -> Tensor:
        """What loss of each neighbor changes to first order [N, k], for a gradient [N, k + 1] by the weights."""
        return torch.einsum("njl,nl->nj", self.without - self.weights[:, None], gradient)


def _answer(model, query: Tensor, ranking: Ranking, degree: Tensor, states: list, propagated: Tensor) -> Tensor:
    """log p [Q, C] of queries at a bank, as the model's forward has it, from a ranking that is given."""
    z = model.label_propagation.read(model._label_graph(ranking, degree), propagated)
    head_logits = None
    if model.head is not None:
        scores, _ = model.head(query.to(model.dtype), model._graph(ranking, degree), states)
        head_logits = torch.log_softmax(scores.to(ranking.weights.dtype), dim=-1)
    return model.label_propagation.mix(head_logits, z)


def _by_feature(model, query: Tensor, ids: Tensor | None, classes: Tensor, neighbors: Tensor) -> dict[str, Tensor]:
    """d log p_c / d feature of the neighbors and its inner product with the feature: query by query, as they share
    neighbors."""
    bank = model.support_bank
    dtype = torch.promote_types(bank.features.dtype, torch.float32)  # half precision holds no small gradient
    gradients, inner = [], []
    for i in range(len(query)):
        leaf = bank.features.to(dtype, copy=True).requires_grad_()
        own = (None, None) if ids is None else (ids[i : i + 1], bank.ids)
        ranking = model.bpgcn.rank(query[i : i + 1], own[0], leaf, own[1])
        states = [leaf, *bank.states[1:]] if bank.shares_features else bank.states
        logits = _answer(model, query[i : i + 1], ranking, bank.degree, states, bank.propagated)
        [gradient] = _gradients(logits[0, classes[i]], [leaf])
        gradients.append(gradient[neighbors[i]])
        inner.append((gradients[-1] * leaf.detach()[neighbors[i]]).sum(-1))
    return {"feature_gradient": torch.stack(gradients), "feature_influence": torch.stack(inner)}


def _gradients(answer: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    if not answer.requires_grad:  # a linear head alone reads no neighbor
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(answer, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _asked(logits: Tensor, class_index: int | Tensor | None) -> Tensor:
    """The class of each query [Q]."""
    Q, C = logits.shape
    if class_index is None:
        return logits.argmax(-1)
    classes = torch.as_tensor(class_index, device=logits.device)
    if classes.shape not in ((), (Q,)) or (classes < 0).any() or (classes >= C).any():
        raise ValueError(
            f"class_index must be one class or one for each of the {Q} queries, 0 to {C - 1}; got"
            f" {classes.tolist() if classes.numel() <= 8 else tuple(classes.shape)}."
        )
    return classes.expand(Q)


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Without dropout and with gradients, whatever the caller had."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
