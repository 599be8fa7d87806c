"""BPGCN: pixels -> features -> ranking -> graph -> head -> loss, one backward pass through all of it."""

import inspect
import math

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging

from .bank_editing import SupportBankMixin
from .bank_search import rank_bank
from .configuration_bpgcn import BPGCNConfig
from .graph import RankingGraph, drop_edges
from .heads import LabelPropagation
from .image_features import check_features, check_pixels, pool_tokens, run_last_blocks
from .label_embedding import build_head, classes_to_read, run_head
from .objectives import check_classes, head_loss, known_classes, objective
from .pretrained import BPGCNImageClassifierOutput, BPGCNModelOutput, BPGCNPreTrainedModel, RankingTemperature
from .ranking import Ranking, soft_topk
from .support_bank import SupportBank, join_bank

logger = logging.get_logger(__name__)

SUPPORTS = ("bank", "batch", "transductive", "none")


class BPGCNModel(BPGCNPreTrainedModel):
    """Images to features, and features to their nearest neighbours with differentiable weights."""

    _keys_to_ignore_on_load_unexpected = (r"^head\.",)
    prefix_blocks = 0  # how many blocks `hidden_states` have passed already

    def __init__(self, config: BPGCNConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self._takes_any_size = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self.ranking_temperature = RankingTemperature(config)
        self.support_bank = SupportBank(config)
        self.post_init()
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze what never gets a gradient here: DDP waits for every gradient it was promised."""
        for name, parameter in self.backbone.named_parameters():
            if name.endswith("mask_token") or name.startswith("pooler."):
                parameter.requires_grad_(False)

    def get_image_features(self, pixel_values: Tensor | None = None, hidden_states: Tensor | None = None) -> Tensor:
        """Pooled features [B, D] of images [B, channels, height, width], or of the hidden states [B, T, D] that the
        first `prefix_blocks` blocks made of them earlier."""
        if hidden_states is None:
            check_pixels(pixel_values, self.config.backbone_config)
            options = {"interpolate_pos_encoding": True} if self._takes_any_size else {}
            tokens = self.backbone(pixel_values.to(self.backbone.dtype), **options).last_hidden_state
        elif self.prefix_blocks == 0:
            raise ValueError("hidden_states need prefix_blocks, the number of blocks that made them: it is 0.")
        else:
            cls_only = self.config.pooling == "cls"
            tokens = run_last_blocks(self.backbone, hidden_states, self.prefix_blocks, cls_only)
        return pool_tokens(tokens, self.config.pooling, self.config.backbone_config)

    def embed(
        self, pixel_values: Tensor | None, features: Tensor | None, hidden_states: Tensor | None = None
    ) -> Tensor:
        """Features [B, D] of a batch, however it came; raises a `ValueError` that names rows that are not finite."""
        if sum(given is not None for given in (pixel_values, features, hidden_states)) != 1:
            raise ValueError("Pass either pixel_values or features (or hidden_states, of a prefix cache).")
        features = self.get_image_features(pixel_values, hidden_states) if features is None else features
        if not torch.compiler.is_compiling():
            check_features(features)
        return features

    def rank(self, query: Tensor, query_ids=None, key: Tensor | None = None, key_ids=None) -> Ranking:
        """`soft_topk` with the config's options: query [N, D] among the keys [M, D], or among themselves."""
        self._say_if_few(query.shape[0] - self.config.ranking_exclude_self if key is None else key.shape[0])
        return soft_topk(query, key, query_ids=query_ids, key_ids=key_ids, **self.rank_options())

    def rank_context(self, nodes: Tensor, ids: Tensor | None, num_context: int) -> Ranking:
        """Rank the last `num_context` of the nodes [N, D] for every node, as a bank is; indices are the nodes' rows."""
        first = len(nodes) - num_context
        ids = torch.arange(len(nodes), device=nodes.device) if ids is None else ids
        ranking = self.rank(nodes, ids, nodes[first:], ids[first:])
        return ranking._replace(indices=ranking.indices + first)

    def _say_if_few(self, candidates: int) -> None:
        if candidates < self.config.num_neighbors:
            logger.warning_once(
                f"num_neighbors={self.config.num_neighbors} is more than the {candidates} candidates of this graph:"
                f" {candidates} are used. Use larger batches or lower num_neighbors."
            )

    def rank_options(self) -> dict:
        """The config's options of `soft_topk`, with the temperature as it is now."""
        config = self.config
        # answers are not drawn by lot
        drawn = config.ranking_relaxation == "gumbel" and not self.training
        return {
            "num_neighbors": config.num_neighbors,
            "temperature": self.ranking_temperature(),
            "metric": config.ranking_metric,
            "relaxation": "gumbel_mean" if drawn else config.ranking_relaxation,
            "normalization": config.ranking_normalization,
            "exclude_self": config.ranking_exclude_self,
        }

    def rank_in_bank(self, query: Tensor, query_ids: Tensor | None = None, num_neighbors: int | None = None) -> Ranking:
        """Rank the support bank for each query; with ids, a query that the bank holds is not its own neighbour."""
        bank, options = self.support_bank, self.rank_options()
        if bank.size == 0:
            raise ValueError(
                "This model has no support bank to answer from. Build it with model.build_support_bank(dataset, ...),"
                " or pass support='batch' to let the images of the batch be each other's neighbours."
            )
        if num_neighbors is None:
            self._say_if_few(bank.size)
        else:
            options["num_neighbors"] = num_neighbors
        return rank_bank(bank, query, query_ids, options)

    def resolve_support(self, support: str | None) -> str:
        """The named support, or the default: the batch in training, else the bank."""
        support = support or ("batch" if self.training else "bank")
        if support not in SUPPORTS:
            raise ValueError(f"support={support!r} is unknown: choose one of {', '.join(SUPPORTS)}.")
        return support

    def forward(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        node_ids: Tensor | None = None,
        support: str | None = None,
        hidden_states: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BPGCNModelOutput | tuple:
        """Images [B, channels, height, width], features [B, D] or hidden states [B, T, D] -> features and ranking.
        `support`, `node_ids` and `hidden_states` as in `BPGCNForImageClassification.forward`."""
        features = self.embed(pixel_values, features, hidden_states)
        support = self.resolve_support(support)
        if support == "none":
            ranking = Ranking(None, None)
        elif support == "bank":
            ranking = self.rank_in_bank(features, node_ids)
        elif support == "batch":
            ranking = self.rank(features, node_ids)
        else:
            nodes, ids, _, rows = join_bank(self.support_bank, features, node_ids)
            ranking = Ranking(*(part[rows] for part in self.rank(nodes, ids)))
        output = BPGCNModelOutput(features=features, neighbor_indices=ranking.indices, neighbor_weights=ranking.weights)
        return output if return_dict is not False else output.to_tuple()


class BPGCNForImageClassification(SupportBankMixin, BPGCNPreTrainedModel):
    """BPGCN with a graph head, its objective, and answers from the support bank."""

    def __init__(self, config: BPGCNConfig):
        super().__init__(config)
        self.bpgcn = BPGCNModel(config)
        self.head = build_head(config)
        self.label_propagation = LabelPropagation(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, channels, height, width]."""
        return self.bpgcn.get_image_features(pixel_values)

    def _graph(self, ranking: Ranking, support_degree: Tensor | None = None, num_queries: int = 0) -> RankingGraph:
        config = self.config
        return RankingGraph.from_ranking(
            ranking,
            symmetrization=config.graph_symmetrization,
            normalization=config.graph_normalization,
            self_weight=config.self_weight,
            self_loop=config.graph_self_loop,
            support_degree=support_degree,
            num_queries=num_queries,
        )

    def _label_graph(
        self, ranking: Ranking, support_degree: Tensor | None = None, num_queries: int = 0
    ) -> RankingGraph:
        # no self-loops: a node's own class is no evidence for itself
        return RankingGraph.from_ranking(
            ranking,
            symmetrization=self.config.graph_symmetrization,
            normalization=self.config.graph_normalization,
            self_weight=0.0,
            support_degree=support_degree,
            num_queries=num_queries,
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
        node_ids: Tensor | None = None,
        support_classes: Tensor | None = None,
        support: str | None = None,
        train_backbone: bool = True,
        output_path_features: bool = False,
        hidden_states: Tensor | None = None,
        ranking: Ranking | None = None,
        num_context: int = 0,
        support_apart: bool = False,
        return_dict: bool | None = None,
    ) -> BPGCNImageClassifierOutput | tuple:
        r"""
        Args:
            pixel_values: [B, channels, height, width] images, or
            features: [B, D] what the backbone made of them earlier, or
            hidden_states: [B, T, D] what the backbone's first `prefix_blocks` blocks made of them earlier.
            labels: [B] int64 classes, -100 unknown. On the batch graph they give the objective of `objectives.py`, else
                the NLL of the answer; no answer sees them, but for those shown in training to a `label_embedding`.
            node_ids: [B] int64 names of the images: none is its own neighbour, nor is its copy in the bank.
            support_classes: [B] int64 classes that the batch graph may see (-100 unknown), for label propagation.
            support: who the neighbours are. `bank`: the support images, the default outside training. `batch`: the
                images of this batch, the default in training. `transductive`: both, as one graph. `none`: nobody, and
                only the features come back.
            train_backbone: off, the backbone runs without gradient and only the head learns.
            output_path_features: return the features as two tensors, one for each path of the gradient.
            ranking: of the batch graph, computed elsewhere from these features.
            num_context: so many last nodes of the batch graph are context: neighbours whose classes (in `labels`) are
                always revealed, and of which no loss is asked.
            support_apart: the context is all that is ranked, as a bank is: the other nodes are nobody's neighbours, and
                none of their classes is revealed.
        """
        with torch.set_grad_enabled(train_backbone and torch.is_grad_enabled()):
            features = self.bpgcn.embed(pixel_values, features, hidden_states)
        check_classes(self.config.num_labels, labels=labels, support_classes=support_classes)
        support = self.bpgcn.resolve_support(support)
        if support == "none":
            return BPGCNImageClassifierOutput(features=features)
        rows, reveal_ratio = None, 0.0 if support_apart else self.config.reveal_ratio
        if support == "transductive":
            features, node_ids, support_classes, rows = join_bank(self.support_bank, features, node_ids)
        # two views of one tensor, so that the gradient of each path can be told apart
        ranked, messages = features.view_as(features), features.view_as(features).to(self.dtype)
        if support == "bank":
            ranking = self.bpgcn.rank_in_bank(ranked, node_ids)
            edges, degree, states, propagated = self.support_bank.read(ranking)
            graph, label_graph, read = self._graph(edges, degree), self._label_graph(edges, degree), None
            z = self.label_propagation.read(label_graph, propagated)
        else:
            if support_apart:
                ranking = self.bpgcn.rank_context(ranked, node_ids, num_context)
            elif ranking is None:
                ranking = self.bpgcn.rank(ranked, node_ids)
            drops = self.training and self.config.edge_dropout > 0
            edges = drop_edges(ranking, self.config.edge_dropout) if drops else ranking
            num_queries = len(features) - num_context if support_apart else 0
            graph = self._graph(edges, None, num_queries)
            label_graph = self._label_graph(edges, None, num_queries)
            states, z, read = None, None, None
            if self.config.label_embedding:
                read = classes_to_read(labels, support_classes, self.training, reveal_ratio, num_context)
            if support_classes is not None:
                known = known_classes(support_classes, self.config.num_labels, ranking.weights.dtype)
                z, _ = self.label_propagation(label_graph, known)
        head_logits = None
        if self.head is not None:
            known = None if read is None else known_classes(read, self.config.num_labels, messages.dtype)
            scores, _ = run_head(self.head, messages, graph, states, known)
            head_logits = torch.log_softmax(scores.to(ranking.weights.dtype), dim=-1)
        logits = self.label_propagation.mix(head_logits, z)
        if logits is None:  # label propagation alone, on a batch whose classes nobody gave
            logits = ranking.weights.new_full(
                (len(features), self.config.num_labels), -math.log(self.config.num_labels)
            )
        if rows is not None:
            logits, features, ranking = logits[rows], features[rows], Ranking(*(part[rows] for part in ranking))
        loss, parts = None, None
        if labels is not None and support == "batch":
            tau = self.bpgcn.ranking_temperature()
            propagation = self.label_propagation
            given = labels, head_logits, propagation, label_graph, ranked, node_ids, tau
            loss, parts = objective(self.config, *given, num_context, reveal_ratio, read)
        elif labels is not None:
            loss = head_loss(logits, labels)
        output = BPGCNImageClassifierOutput(
            loss=loss,
            logits=logits,
            features=features,
            neighbor_indices=ranking.indices,
            neighbor_weights=ranking.weights,
            loss_parts=parts,
            path_features=(ranked, messages) if output_path_features else None,
        )
        return output if return_dict is not False else output.to_tuple()


BPGCNConfig.register_for_auto_class()
BPGCNModel.register_for_auto_class("AutoModel")
BPGCNForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["BPGCNConfig", "BPGCNForImageClassification", "BPGCNModel"]
