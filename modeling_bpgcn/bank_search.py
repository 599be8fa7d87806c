"""Neighbours of queries in the support bank: exact over all rows, or over the candidates that an index proposes."""

import math
from typing import Protocol

import torch
from torch import Tensor

from .ranking import LOCAL, PreparedKeys, inner_product_form, soft_topk, weigh
from .relaxations import Ranking
from .sparse_ops import edge_dot

SCORES_AT_ONCE = 2**26  # bounds the memory of relaxations that hold a row's scores: 256 MiB in float32
CANDIDATES_PER_NEIGHBOR = 4


class CandidateSearch(Protocol):
    """An index over the bank's points, attached with `model.use_search`: it proposes rows, the model ranks them.

    Points are unit vectors for `cosine` and centred features for `euclidean`: nearest by Euclidean distance is most
    similar for both.
    """

    def build(self, points: Tensor) -> None:
        """Index float32 points [M, D]; called again when the bank's rows have changed."""

    def search(self, query: Tensor, count: int) -> Tensor:
        """Rows [N, count] int64 of points near the queries [N, D], in any order, none twice; -1 for none."""


class BankIndex:
    """A `CandidateSearch` and the keys that it was built from, so that it follows the bank."""

    def __init__(self, search: CandidateSearch):
        self.search = search
        self._built_from: Tensor | None = None

    def candidates(self, keys: PreparedKeys, query: Tensor, count: int) -> Tensor:
        """Rows [N, count] near queries [N, D'] in inner-product form."""
        if self._built_from is not keys.vectors:
            self.search.build(keys.vectors[:, : keys.width].float())
            self._built_from = keys.vectors
        # that form doubles a query for `euclidean`
        points = query[:, : keys.width] if keys.center is None else query[:, : keys.width] / 2
        return self.search.search(points.detach().float(), count).to(query.device)


def rank_bank(bank, query: Tensor, query_ids: Tensor | None, options: dict) -> Ranking:
    """Rank the rows of `bank` for each query [N, D]; with ids [N], a row of the query's own id is no candidate.

    Args:
        options: those of `soft_topk`, whose values this has. A bank with an index gives its exact weights over the best
            of the index's candidates; a query for which these are too few is ranked over all rows.

    Raises:
        ValueError: for an index with a ranking that needs the scores of all rows.
    """
    compiling = torch.compiler.is_compiling()
    key = bank.features if compiling else bank.keys(options["metric"], query.dtype)
    if bank.index is not None and not compiling:
        return _rank_candidates(bank, key, query, query_ids, options)
    return _rank_all(bank, key, query, query_ids, options)


def _rank_all(bank, key: Tensor | PreparedKeys, query: Tensor, query_ids: Tensor | None, options: dict) -> Ranking:
    key_ids = None if query_ids is None else bank.ids
    rows = max(1, SCORES_AT_ONCE // bank.size)
    if len(query) <= rows:
        return soft_topk(query, key, query_ids=query_ids, key_ids=key_ids, **options)
    ids = [None] * -(-len(query) // rows) if query_ids is None else query_ids.split(rows)
    parts = (
        soft_topk(part, key, query_ids=own, key_ids=key_ids, **options)
        for part, own in zip(query.split(rows), ids, strict=True)
    )
    return Ranking(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_indexable(options: dict) -> None:
    """Raise a ValueError where the ranking's options of `soft_topk` need more than the best candidates."""
    if options["normalization"] == "all" or options["relaxation"] not in LOCAL:
        raise ValueError(
            f"ranking_normalization={options['normalization']!r} with ranking_relaxation={options['relaxation']!r}"
            " needs the scores of all support images, which an index does not visit: search exactly with"
            " model.use_search(None), or use a model with ranking_normalization='selected' and one of"
            f" {', '.join(LOCAL)}."
        )


def _rank_candidates(bank, keys: PreparedKeys, query: Tensor, query_ids: Tensor | None, options: dict) -> Ranking:
    check_indexable(options)
    k = min(options["num_neighbors"], bank.size)
    kept = min(k + LOCAL[options["relaxation"]], bank.size)
    with torch.autocast(query.device.type, enabled=False):
        vectors, key, _ = inner_product_form(query.to(keys.vectors.dtype), keys, options["metric"])
        # in the order of the rows, so that of equal scores the first are taken
        rows = bank.index.candidates(keys, vectors, min(CANDIDATES_PER_NEIGHBOR * kept, bank.size)).sort(-1).values
        valid = rows >= 0
        rows = rows.clamp_min(0)
        if query_ids is not None and options["exclude_self"]:
            valid = valid & (bank.ids[rows] != query_ids[:, None])
        scores = edge_dot(rows, vectors, key)
        order = scores.masked_fill(~valid, -math.inf).sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        logits = scores.gather(1, order) / options["temperature"]
        valid = valid.gather(1, order)
        ranking = weigh(rows.gather(1, order), valid, logits, None, k, options["relaxation"])
    short = (~valid.all(-1)).nonzero()[:, 0]
    if not len(short):
        return ranking
    exact = _rank_all(bank, keys, query[short], None if query_ids is None else query_ids[short], options)
    return Ranking(*(a.index_copy(0, short, b) for a, b in zip(ranking, exact, strict=True)))
