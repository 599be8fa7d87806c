"""The support bank: what inductive answers stand on. One row per support image, stored in the checkpoint."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bank_search import BankIndex, CandidateSearch
from .configuration_bpgcn import BPGCNConfig
from .heads import HEADS
from .ranking import PreparedKeys
from .relaxations import Ranking

BANK_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class BankRows(NamedTuple):
    """The rows of a bank that a ranking reads: the ranking among these rows, and their `degree` [R], `states`
    [R, ...] and `propagated` [R, C]."""

    ranking: Ranking
    degree: Tensor
    states: list[Tensor]
    propagated: Tensor


class SupportBank(nn.Module):
    """M support images as buffers of M rows; an empty bank has buffers too, of no row, so that a state says so.

    `features` [M, D]; `classes` [M] int64, -100 unknown; `ids` [M] int64; `degree` [M] in the support graph;
    `propagated` [M, C], the label distribution that a neighbour reads; `state_0` ... [M, ...], the rows that each
    propagation step of the head reads (the first is left out where it is the features).

    `fingerprint` says which backbone and image processor made the features (see `bank_file.py`), None where nobody
    knows; `index` proposes the candidates of a search, None for the exact one.
    """

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.dtype = BANK_DTYPES[config.bank_dtype]
        head = HEADS.get(config.head)
        sizes = [] if head is None else head.state_sizes(config)
        self.shares_features = head is not None and head.first_state_is_features and not config.label_embedding
        self.state_names = [f"state_{i}" for i in range(len(sizes) - self.shares_features)]
        widths = dict(zip(self.state_names, sizes[self.shares_features :], strict=True))
        self._shapes = {"features": (config.feature_size,), "propagated": (config.num_labels,), "degree": ()}
        self._shapes |= {"classes": (), "ids": ()} | {name: (width,) for name, width in widths.items()}
        for name in self._shapes:
            self.register_buffer(name, self._allocate(name, config.bank_size))
        self.fingerprint = config.bank_fingerprint
        self.index: BankIndex | None = None
        self._prepared: tuple | None = None

    @property
    def size(self) -> int:
        """M, 0 while empty. (peft's `modules_to_save` wrapper passes attributes on, but not `len`.)"""
        return self.features.shape[0]

    def __len__(self) -> int:
        return self.size

    def _allocate(self, name: str, size: int) -> Tensor:
        dtype = torch.long if name in ("classes", "ids") else self.dtype
        return torch.zeros(size, *self._shapes[name], dtype=dtype)

    @property
    def states(self) -> list[Tensor]:
        """The rows each propagation step of the head reads, in order."""
        shared = [self.features] if self.shares_features else []
        return shared + [getattr(self, name) for name in self.state_names]

    def rounded(self, features: Tensor) -> Tensor:
        """Features as they come back from the bank, in their own dtype."""
        return features.to(self.dtype).to(features.dtype)

    def fill(
        self,
        features: Tensor,
        classes: Tensor,
        ids: Tensor,
        degree: Tensor,
        propagated: Tensor,
        states: list,
        fingerprint: dict[str, str] | None = None,
    ) -> None:
        """Replace the bank's rows."""
        rows = {"features": features, "classes": classes, "ids": ids, "degree": degree, "propagated": propagated}
        rows |= dict(zip(self.state_names, states[self.shares_features :], strict=True))
        for name, value in rows.items():
            dtype = torch.long if name in ("classes", "ids") else self.dtype
            setattr(self, name, value.detach().to(dtype))
        self.fingerprint = fingerprint

    def clear(self) -> None:
        """Drop every row, as a step of training makes them stale."""
        for name in self._shapes:
            setattr(self, name, getattr(self, name).new_empty(0, *self._shapes[name]))
        self.fingerprint = self._prepared = None

    def attach(self, search: CandidateSearch | None) -> None:
        """Let `search` propose the candidates of each query, or search exactly (None)."""
        self.index = None if search is None else BankIndex(search)

    def keys(self, metric: str, dtype: torch.dtype = torch.float32) -> PreparedKeys:
        """The features ready for ranking, in float64 for such queries and else in float32; kept until they change."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        features = self.features
        version = 0 if features.is_inference() else features._version
        held = self._prepared
        if held is None or held[0] is not features or held[1:4] != (version, metric, dtype):
            # the keys outlive an inference mode that the first query may come in
            with torch.inference_mode(False), torch.no_grad():
                held = features, version, metric, dtype, PreparedKeys.prepare(features.to(dtype), metric)
            self._prepared = held
        return held[4]

    def read(self, ranking: Ranking) -> BankRows:
        """What the edges of a ranking [N, k] of the bank's rows read: no more than N k rows are touched. They come in
        float32 from a bank in float16, which is how it stores, not how answers are computed."""
        rows = slice(None)
        if ranking.indices.numel() < self.size:
            rows = ranking.indices.flatten()
            among = torch.arange(rows.numel(), device=rows.device).view_as(ranking.indices)
            ranking = Ranking(among, ranking.weights)
        dtype = torch.promote_types(self.features.dtype, torch.float32)
        degree, propagated, *states = (x[rows].to(dtype) for x in (self.degree, self.propagated, *self.states))
        return BankRows(ranking, degree, states, propagated)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # the checkpoint decides the size: a resumed run or a best model may hold another bank than this one, or none
        for name in self._shapes:
            stored, held = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == held.shape[1:]:
                setattr(self, name, held.new_empty(stored.shape))
                self.fingerprint = None  # that of another bank
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def join_bank(bank: SupportBank, features: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bank and a batch of queries [B, D] as one set of nodes: features, ids, classes, and the queries' rows [B].

    The bank's rows come first, then the queries that it does not hold; one that it holds by id takes its row there.
    """
    size = bank.size
    if size == 0:
        raise ValueError("support='transductive' needs a support bank: call model.build_support_bank(dataset, ...).")
    if ids is None:
        ids = bank.ids.max() + 1 + torch.arange(features.shape[0], device=features.device)
    order = bank.ids.argsort()
    place = torch.searchsorted(bank.ids[order], ids).clamp_max(size - 1)
    position = order[place]
    held = bank.ids[position] == ids
    rows = torch.where(held, position, size + (~held).cumsum(0) - 1)
    joined = bank.features.to(features.dtype).index_copy(0, position[held], features[held])
    classes = torch.cat([bank.classes, torch.full_like(ids[~held], -100)])
    return torch.cat([joined, features[~held]]), torch.cat([bank.ids, ids[~held]]), classes, rows
