"""The ranking graph: sparse weighted edges from each image to its neighbours, normalised, and what flows over them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .relaxations import Ranking
from .sparse_ops import neighbor_sum, scatter_sum

try:
    import torch_scatter
except ImportError:
    torch_scatter = None

EPS = 1e-12


@dataclass(frozen=True)
class RankingGraph:
    r"""Edges from N target nodes to M source nodes (for a training graph both are the same nodes).

        propagate(H)_i = c_i H_i + sum_j P_ij M_j        M = H unless given

    Regular graphs keep the N x k layout of the ranking: `source` [N, k], `edge_weight` [N, k], `target` None.
    Irregular ones are lists of edges: `source` [E], `target` [E], `edge_weight` [E]; an edge may occur twice, the
    weights then add up. `self_weight` [N, 1] is c; `degree` [N] the row sums of A, without self-loops. `ranked` [N, k]
    says that the list is that of a ranking, i -> ranked_ij in order, followed by the same edges the other way round.
    """

    source: Tensor
    edge_weight: Tensor
    self_weight: Tensor
    degree: Tensor
    target: Tensor | None = None
    backend: str = "native"
    ranked: Tensor | None = None

    @classmethod
    def from_ranking(
        cls,
        ranking: Ranking,
        *,
        symmetrization: str = "none",
        normalization: str = "row",
        self_weight: float | Tensor = 0.5,
        self_loop: str = "share",
        support_degree: Tensor | None = None,
        backend: str = "native",
        num_queries: int = 0,
    ) -> "RankingGraph":
        r"""Build the graph of a ranking [N, k].

        Args:
            symmetrization: `none` keeps i -> j; `mean` is (A + A^T) / 2; `mutual` keeps (a_ij + a_ji) / 2 where each is
                among the other's neighbours.
            normalization: `row` D^-1 A; `symmetric` D^-1/2 A D^-1/2 (Kipf and Welling 2017); `none` A. A node of
                degree 0 has D^-1 = 0.
            self_weight: c with `share`: P' = c I + (1 - c) P. A node without an edge keeps all of itself.
            self_loop: `unit` adds I to A before the normalisation instead (the renormalisation trick).
            support_degree: [M] degrees of the source nodes when they are not the targets (a query at a fixed bank):
                the graph is then directed, since the rows of the bank do not change.
            backend: `native` or `scatter` (torch-scatter), for the sums of irregular graphs.
            num_queries: so many first nodes read and are not read: symmetrisation adds no edge back from them.
        """
        bipartite = support_degree is not None
        if bipartite or symmetrization == "none":
            graph = cls._regular(ranking.indices, ranking.weights)
        elif symmetrization == "mutual":
            graph = cls._regular(ranking.indices, _mutual_weights(ranking))
        elif symmetrization == "mean":
            graph = cls._mean(ranking, backend, num_queries)
        else:
            raise ValueError(f"symmetrization={symmetrization!r} is unknown: choose none, mean or mutual.")
        if self_loop not in ("share", "unit"):
            raise ValueError(f"self_loop={self_loop!r} is unknown: choose share or unit.")
        graph = graph._normalized(normalization, 1.0 if self_loop == "unit" else 0.0, support_degree)
        return graph if self_loop == "unit" else graph._shared(self_weight)

    @classmethod
    def _regular(cls, indices: Tensor, weights: Tensor) -> "RankingGraph":
        degree = weights.sum(-1)
        return cls(indices, weights, torch.zeros_like(degree)[:, None], degree)

    @classmethod
    def _mean(cls, ranking: Ranking, backend: str, num_queries: int) -> "RankingGraph":
        N, k = ranking.indices.shape
        rows = torch.arange(N, device=ranking.indices.device).repeat_interleave(k)
        columns, weights = ranking.indices.flatten(), ranking.weights.flatten() / 2
        source, target = torch.cat([columns, rows]), torch.cat([rows, columns])
        back = weights if num_queries == 0 else weights.masked_fill(rows < num_queries, 0.0)
        edge_weight = torch.cat([weights, back])
        degree = segment_sum(edge_weight, target, N, backend)
        own = torch.zeros_like(degree)[:, None]
        return cls(source, edge_weight, own, degree, target, backend, ranking.indices)

    def _normalized(self, normalization: str, loop: float, support_degree: Tensor | None) -> "RankingGraph":
        total = self.degree + loop
        if normalization == "none":
            edge, own = self.edge_weight, torch.full_like(total, loop)
        elif normalization == "row":
            inverse = _inverse_power(total, 1.0)
            edge, own = self.edge_weight * self._per_edge(inverse), loop * inverse
        elif normalization == "symmetric":
            root = _inverse_power(total, 0.5)
            sources = root if support_degree is None else _inverse_power(support_degree.to(root.dtype) + loop, 0.5)
            edge, own = self.edge_weight * self._per_edge(root) * sources[self.source], loop * root.square()
        else:
            raise ValueError(f"normalization={normalization!r} is unknown: choose row, symmetric or none.")
        return replace(self, edge_weight=edge, self_weight=own[:, None])

    def _shared(self, self_weight: float | Tensor) -> "RankingGraph":
        isolated = self.degree <= EPS
        own = torch.where(isolated, 1.0, torch.zeros_like(self.degree) + self_weight)[:, None]
        return replace(self, edge_weight=self.edge_weight * (1 - self_weight), self_weight=own)

    @property
    def num_nodes(self) -> int:
        """N, the target nodes."""
        return self.degree.shape[0]

    def _per_edge(self, per_target: Tensor) -> Tensor:
        return per_target[:, None] if self.target is None else per_target[self.target]

    def propagate(self, state: Tensor, messages: Tensor | None = None) -> Tensor:
        """One step: own state [N, D], messages [M, D] (`state` unless given) -> [N, D] in the state's dtype."""
        dtype = self.edge_weight.dtype
        own = state.to(dtype)
        messages = own if messages is None else messages.to(dtype)
        return (self.self_weight * own + self._neighbor_sum(messages)).to(state.dtype)

    def _neighbor_sum(self, messages: Tensor) -> Tensor:
        if self.ranked is not None and self.ranked.shape[1] > 0 and self.backend == "native":
            there, back = (part.view_as(self.ranked) for part in self.edge_weight.chunk(2))
            sums = neighbor_sum(self.ranked, there, messages), scatter_sum(self.ranked, back, messages, self.num_nodes)
            return sums[0] + sums[1]
        if self.target is not None:
            return segment_sum(
                self.edge_weight[:, None] * messages[self.source], self.target, self.num_nodes, self.backend
            )
        if self.source.shape[1] == 0:
            return messages.new_zeros(self.num_nodes, messages.shape[1])
        return neighbor_sum(self.source, self.edge_weight, messages)

    def attention(self, target_score: Tensor, source_score: Tensor, own_score: Tensor, slope: float) -> "RankingGraph":
        r"""The graph with attention weights: alpha_ij proportional to P_ij exp(LeakyReLU(target_score_i +
        source_score_j)), the node itself (c_ii, own_score_i) included; each row sums to 1 (Velickovic et al. 2018, with
        log P_ij as the prior of the logits). Scores: [N], [M] and [N]."""
        edge = F.leaky_relu(self._per_edge(target_score) + source_score[self.source], slope)
        edge = edge.masked_fill(self.edge_weight <= 0, -torch.inf) + self.edge_weight.clamp_min(EPS).log()
        own = F.leaky_relu(target_score + own_score, slope).masked_fill(self.self_weight[:, 0] <= 0, -torch.inf)
        own = own + self.self_weight[:, 0].clamp_min(EPS).log()
        with torch.no_grad():
            highest = torch.maximum(self._edge_max(edge), own)
            highest = torch.where(highest.isfinite(), highest, 0.0)
        edge, own = torch.exp(edge - self._per_edge(highest)), torch.exp(own - highest)
        total = (self._edge_sum(edge) + own).clamp_min(EPS)
        return replace(self, edge_weight=edge / self._per_edge(total), self_weight=(own / total)[:, None])

    def _edge_sum(self, values: Tensor) -> Tensor:
        return values.sum(-1) if self.target is None else segment_sum(values, self.target, self.num_nodes, self.backend)

    def _edge_max(self, values: Tensor) -> Tensor:
        lowest = torch.full_like(self.degree, -torch.inf)
        if self.target is None:
            return torch.cat([values, lowest[:, None]], dim=-1).amax(-1)
        return lowest.scatter_reduce(0, self.target, values, "amax")

    def dense(self) -> Tensor:
        """The propagation matrix [N, N] of a graph whose targets are its sources: what `propagate` multiplies with."""
        N = self.num_nodes
        target = self.target
        if target is None:
            target = torch.arange(N, device=self.source.device).repeat_interleave(self.source.shape[1])
        matrix = torch.diag(self.self_weight[:, 0])
        return matrix.index_put((target, self.source.flatten()), self.edge_weight.flatten(), accumulate=True)


def drop_edges(ranking: Ranking, rate: float) -> Ranking:
    """A ranking [N, k] without a random share `rate` of its edges, whose weights are 0 (DropEdge, Rong et al. 2020);
    what is left of a row is scaled to the row's sum. A row that loses every edge has none."""
    # drawn on the CPU: the same for every process and device
    kept = (torch.rand(ranking.weights.shape) >= rate).to(ranking.weights.device)
    weights = ranking.weights * kept
    scale = ranking.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp_min(EPS)
    return ranking._replace(weights=weights * scale)


def _inverse_power(degree: Tensor, power: float) -> Tensor:
    # clamp before the power: the gradient of 0 ** -0.5 is NaN even where masked afterwards
    return torch.where(degree > EPS, degree.clamp_min(EPS) ** -power, 0.0)


def _mutual_weights(ranking: Ranking) -> Tensor:
    # back[i, j, l]: the l-th neighbour of i's j-th neighbour is i
    N = ranking.indices.shape[0]
    back = ranking.indices[ranking.indices] == torch.arange(N, device=ranking.indices.device)[:, None, None]
    reverse = (ranking.weights[ranking.indices] * back).sum(-1)
    return torch.where(back.any(-1), (ranking.weights + reverse) / 2, 0.0)


def segment_sum(values: Tensor, index: Tensor, size: int, backend: str = "native") -> Tensor:
    """out[index[e]] += values[e]: values [E, ...], index [E] -> [size, ...]; `scatter` needs torch-scatter."""
    if backend == "native":
        return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)
    if backend == "scatter":
        if torch_scatter is None:
            raise ImportError("backend='scatter' needs torch-scatter: pip install torch-scatter --no-build-isolation.")
        return torch_scatter.scatter_add(values, index, dim=0, dim_size=size)
    raise ValueError(f"backend={backend!r} is unknown: choose native or scatter.")
