"""Backbone, search in the support bank and head as one traced program, without Python between them."""

import copy
import inspect
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..graph import RankingGraph
from ..modeling_bpgcn import BPGCNForImageClassification
from ..ranking import LOCAL, WITH_TOTAL, PreparedKeys, rank_logits, similarity, weigh
from ..relaxations import Ranking

BANKS = ("constant", "input")
TRACEABLE_ATTENTION = ("eager", "sdpa")
MORE_THAN_NEIGHBORS = 2  # images in a bank of free size: no branch of the ranking then depends on it


def export_program(
    model: BPGCNForImageClassification, image_size: int | tuple[int, int], *, bank: str = "constant"
) -> ExportedProgram:
    """Trace the inductive answer of a model: pixel values -> {`logits`, `neighbor_indices`, `neighbor_weights`}.

    `program.module()(pixel_values)` or, with the bank as an input, `program.module()(pixel_values, **bank_inputs(...))`
    gives a dict of logits [B, C] (log-probabilities), neighbor_indices [B, k] int64 (rows of the bank) and
    neighbor_weights [B, k]: what `model(pixel_values)` answers, to rounding. Of support images of equal similarity it
    may take others than the model, which takes the first. Values that are not finite raise no error here but give
    answers that are not finite. It is meant for inference: no gradient is tested.

    Args:
        model: in evaluation mode and float32; it shares its weights with the program. An index that was attached with
            `use_search` is not exported: the search is exact.
        image_size: height and width in pixels, or one number for both; fixed, as the position embeddings of the
            backbone are interpolated while it is traced. The batch size is free.
        bank: `constant` makes the model's bank a part of the program, its features twice: as they are, and in float32
            as the search wants them. `input` takes the tensors of `bank_inputs` with each call, of k + 2 images or
            more; the search then prepares all of them in each call.

    Raises:
        ValueError: for a model, or an option of it, that cannot be exported, with the remedy.
        TypeError: for another class of model.
    """
    _check_exportable(model, bank)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    weight = next(model.bpgcn.backbone.parameters())
    pixel_values = weight.new_zeros(2, model.config.backbone_config.num_channels, height, width)
    support, sizes = {}, {"pixel_values": {0: Dim("batch", min=1)}}
    if bank == "input":
        least = model.config.num_neighbors + MORE_THAN_NEIGHBORS
        support = {name: value.new_zeros(least + 3, *value.shape[1:]) for name, value in bank_inputs(model).items()}
        sizes |= {name: {0: Dim("support", min=least)} for name in support}
    with torch.no_grad():
        answer = AnswerFromBank(model, bank, list(sizes)).eval()
        return torch.export.export(answer, (pixel_values,), support, dynamic_shapes=sizes)


def bank_inputs(model: BPGCNForImageClassification) -> dict[str, Tensor]:
    """The model's bank as a program takes it that has it as an input, each tensor of M rows in `bank_dtype`:
    `support_features` [M, D], `support_degree` [M], `support_propagated` [M, C] and `support_state_0` ... [M, ...]."""
    bank = model.support_bank
    names = ["features", "degree", "propagated", *bank.state_names]
    return {f"support_{name}": getattr(bank, name).detach() for name in names}


class PlainGraph(RankingGraph):
    """A regular graph whose sum over neighbours is a gather and a product, which every runtime has."""

    @classmethod
    def of(cls, graph: RankingGraph) -> "PlainGraph":
        """The same edges."""
        return cls(**{field.name: getattr(graph, field.name) for field in fields(graph)})

    def _neighbor_sum(self, messages: Tensor) -> Tensor:
        return (self.edge_weight[:, None] @ messages[self.source])[:, 0]


class AnswerFromBank(nn.Module):
    """The answer from the bank as `BPGCNForImageClassification.forward` computes it, without what depends on the data:
    checks, tiles, and the choice whether to read some rows or all. `inputs` names the arguments, pixel values first."""

    def __init__(self, model: BPGCNForImageClassification, bank: str, inputs: list[str]):
        super().__init__()
        self.model = _without_bank(model)
        self.states = [f"support_{name}" for name in model.support_bank.state_names]
        if model.support_bank.shares_features:
            self.states.insert(0, "support_features")
        self.constant = bank == "constant"
        # the most neighbours that there can be
        self.most = model.support_bank.size if self.constant else model.config.num_neighbors + MORE_THAN_NEIGHBORS
        if self.constant:
            rows = bank_inputs(model)
            keys = self._keys(rows["support_features"])
            for name, value in (rows | {"key_vectors": keys.vectors, "key_center": keys.center}).items():
                self.register_buffer(name, value)

        def forward(pixel_values, **support):
            return self.answer(pixel_values, support)

        # torch.export names inputs by the signature, and has no dynamic sizes for **support (torch 2.13)
        named = (inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in inputs)
        forward.__signature__ = inspect.Signature(list(named))
        self.forward = forward

    def answer(self, pixel_values: Tensor, support: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images [B, channels, height, width] and the bank, unless it is constant -> the answer of `export_program`."""
        if self.constant:
            support = self._buffers
            keys = PreparedKeys(self.key_vectors, self.key_center, self.support_features.shape[1])
        else:
            keys = self._keys(support["support_features"])
        features = self.model.get_image_features(pixel_values)
        ranking = self.rank(features, keys)
        logits = self.read(features, ranking, support)
        return {"logits": logits, "neighbor_indices": ranking.indices, "neighbor_weights": ranking.weights}

    def _keys(self, features: Tensor) -> PreparedKeys:
        return PreparedKeys.prepare(features.float(), self.model.config.ranking_metric)

    def rank(self, features: Tensor, keys: PreparedKeys) -> Ranking:
        """The bank's rows for features [B, D], as `soft_topk` ranks them: by the best scores alone where they will do,
        as a runtime finds some faster than it sorts all."""
        options = self.model.bpgcn.rank_options()
        relaxation, normalization = options["relaxation"], options["normalization"]
        logits = similarity(features, keys, options["metric"]) / options["temperature"]  # [B, M]
        k, total = min(options["num_neighbors"], self.most), normalization == "all"
        if relaxation not in (WITH_TOTAL if total else LOCAL):
            return rank_logits(logits, k, relaxation, normalization)
        best, indices = logits.topk(k if total else min(k + LOCAL[relaxation], self.most))
        mass = logits.logsumexp(-1) if total else None
        return weigh(indices, torch.ones_like(indices, dtype=torch.bool), best, mass, k, relaxation)

    def read(self, features: Tensor, ranking: Ranking, support: dict[str, Tensor]) -> Tensor:
        """Log-probabilities [B, C] of features [B, D] and their neighbours, whose rows alone are read."""
        model, rows = self.model, ranking.indices.flatten()
        edges = Ranking(torch.arange(rows.shape[0], device=rows.device).view_as(ranking.indices), ranking.weights)
        names = ("support_degree", "support_propagated", *self.states)
        degree, propagated, *states = (support[name][rows].float() for name in names)
        z = model.label_propagation.read(PlainGraph.of(model._label_graph(edges, degree)), propagated)
        if model.head is None:
            return model.label_propagation.mix(None, z)
        graph = PlainGraph.of(model._graph(edges, degree))
        scores, _ = model.head(features, graph, states)
        return model.label_propagation.mix(torch.log_softmax(scores, dim=-1), z)


def _without_bank(model: BPGCNForImageClassification) -> BPGCNForImageClassification:
    """The model on the same weights, without its bank, which would become a part of the program as it is."""
    model, base = copy.copy(model), copy.copy(model.bpgcn)
    base._modules = {name: module for name, module in base._modules.items() if name != "support_bank"}
    model._modules = model._modules | {"bpgcn": base}
    return model


def _check_exportable(model: BPGCNForImageClassification, bank: str) -> None:
    if not isinstance(model, BPGCNForImageClassification):
        raise TypeError(
            f"model is a {type(model).__name__}, not a BPGCNForImageClassification of this package: load it with"
            " BPGCNForImageClassification.from_pretrained, and merge the adapters of a PeftModel by merge_and_unload()."
        )
    if bank not in BANKS:
        raise ValueError(f"bank={bank!r} is unknown: choose one of {', '.join(BANKS)}.")
    if model.training:
        raise ValueError("model is in training mode, where dropout is drawn: call model.eval() first.")
    if other := {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}:
        raise ValueError(
            f"model has parameters in {', '.join(sorted(other))}: export it in float32, after model.float()."
        )
    attention = model.bpgcn.backbone.config._attn_implementation
    if attention not in TRACEABLE_ATTENTION:
        raise ValueError(
            f"attn_implementation={attention!r} cannot be exported: load the model with attn_implementation='sdpa'."
        )
    if bank == "constant" and model.support_bank.size == 0:
        raise ValueError(
            "The model has no support bank that could be a constant: build it with model.build_support_bank(dataset,"
            " ...), or pass bank='input' and a bank with each call."
        )
    if model.config.ranking_relaxation == "gumbel":
        raise ValueError(
            "ranking_relaxation='gumbel' cannot be exported, as its answers average over draws of torch's generator:"
            " set model.config.ranking_relaxation = 'softmax', which ranks without noise, build the bank again, and"
            " evaluate."
        )
