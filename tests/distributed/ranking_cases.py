"""What the tests of the sharded rankings rank, made alike in every process and in the one that compares."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

K = 5
SHARDS = {
    "even": {2: (12, 12), 3: (12, 12, 12)},
    "uneven": {2: (21, 3), 3: (3, 17, 9)},  # one is smaller than k
    "empty": {2: (0, 19), 3: (10, 0, 11)},
    "few": {2: (1, 2), 3: (1, 0, 2)},  # fewer candidates than k
    "power": {2: (11, 5), 3: (7, 1, 8)},  # 16 rows: their mean is exact
}
LOSS_SEED = 3


class Case(NamedTuple):
    """One ranking.

    `function`: `rows` or `ring`; `shards`: a key of SHARDS; `ids`: `rows` (none are given), `pairs` (each twice,
    anywhere) or `crowded` (most rows share one, and have fewer candidates than k); `data`: `normal` or `ties`.
    """

    function: str
    shards: str
    metric: str = "cosine"
    relaxation: str = "softmax"
    normalization: str = "selected"
    exclude_self: bool = True
    ids: str = "rows"
    data: str = "normal"
    backend: str = "auto"

    def features(self, world: int) -> Tensor:
        """[N, 16] float64. `ties`: corners of a cube, whose scores are exact in any order of summation."""
        generator = torch.Generator().manual_seed(11)
        N = sum(SHARDS[self.shards][world])
        if self.data == "ties":
            return torch.randint(0, 2, (N, 16), generator=generator).double() * 2 - 1
        return torch.randn(N, 16, generator=generator, dtype=torch.float64) + 0.5

    def node_ids(self, world: int) -> Tensor | None:
        """[N] int64 or none."""
        N = sum(SHARDS[self.shards][world])
        if self.ids == "rows":
            return None
        if self.ids == "pairs":
            return torch.randperm(N, generator=torch.Generator().manual_seed(5)) // 2
        return torch.where(torch.arange(N) % 6 == 0, torch.arange(N), 10**9)

    def temperature(self) -> Tensor:
        """A leaf, in units of the scores."""
        value = 0.2 if self.metric == "cosine" else 6.0
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    def options(self) -> dict:
        """Those of `soft_topk` but the temperature."""
        options = {name: getattr(self, name) for name in ("metric", "relaxation", "normalization", "exclude_self")}
        return options | {"num_neighbors": K} | ({} if self.function == "ring" else {"backend": self.backend})


def loss(weights: Tensor) -> Tensor:
    """A scalar of the weights [N, k], to which each contributes with a factor of its own."""
    generator = torch.Generator().manual_seed(LOSS_SEED)
    return (weights * torch.randn(weights.shape, generator=generator, dtype=torch.float64)).sum()


def _cases() -> list[Case]:
    cases = []
    ring = (("softmax", "selected"), ("straight_through", "selected"), ("threshold", "selected"))
    ring += (("softmax", "all"), ("straight_through", "all"))
    grid = product(("even", "uneven", "empty"), ("cosine", "euclidean"), ring, (True, False))
    for shards, metric, (relaxation, normalization), exclude_self in grid:
        for function in ("rows", "ring"):
            cases.append(Case(function, shards, metric, relaxation, normalization, exclude_self))
            if exclude_self:
                cases += [cases[-1]._replace(ids=ids) for ids in ("pairs", "crowded")]
            cases.append(Case(function, "power", metric, relaxation, normalization, exclude_self, data="ties"))
            cases.append(Case(function, "few", metric, relaxation, normalization, exclude_self))
    for relaxation, normalization in product(
        ("threshold", "lapsum", "entmax", "sparsemax", "gumbel", "gumbel_mean"), ("selected", "all")
    ):
        cases.append(Case("rows", "uneven", relaxation=relaxation, normalization=normalization))
        cases.append(Case("rows", "empty", relaxation=relaxation, normalization=normalization, ids="pairs"))
    for normalization in ("selected", "all"):
        cases.append(Case("rows", "uneven", normalization=normalization, ids="pairs", backend="tiled"))
    return list(dict.fromkeys(cases))


CASES = _cases()
