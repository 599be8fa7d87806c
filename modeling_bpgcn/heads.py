"""Heads: features [N, D] and the ranking graph -> class scores [N, C].

Every head but `LabelPropagation` is called as `head(features, graph, support=None) -> (scores, states)`. `states` are
the tensors whose rows the graph's edges read, one per propagation step. A query that is attached to a support bank
reads the bank's rows instead: pass them as `support`, in the same order. `state_sizes(config)` are their widths;
`first_state_is_features` says that the first of them is the features themselves, which need not be stored again.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bpgcn import BPGCNConfig
from .graph import RankingGraph

States = list[Tensor]


def _row(support: States | None, step: int) -> Tensor | None:
    return None if support is None else support[step]


def _widths(config: BPGCNConfig) -> list[int]:
    """D, hidden, ..., hidden, C."""
    hidden = [config.head_hidden_size] * (config.head_num_layers - 1)
    return [config.feature_size, *hidden, config.num_labels]


class GCNHead(nn.Module):
    """X <- ReLU((P X) W + b), the last layer without ReLU (Kipf and Welling 2017, equation 2)."""

    first_state_is_features = True

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        widths = _widths(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.layers = nn.ModuleList(nn.Linear(d, e) for d, e in itertools.pairwise(widths))

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        return _widths(config)[:-1]

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        x, states = features, []
        for step, layer in enumerate(self.layers):
            x = self.dropout(x if step == 0 else F.relu(x))
            states.append(x)
            x = layer(graph.propagate(x, _row(support, step)))
        return x, states


class SGCHead(nn.Module):
    """(P^L X) W + b (Wu et al. 2019), L = `head_num_layers`."""

    first_state_is_features = True

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.steps = config.head_num_layers
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.feature_size, config.num_labels)

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        return [config.feature_size] * config.head_num_layers

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        x, states = features, []
        for step in range(self.steps):
            states.append(x)
            x = graph.propagate(x, _row(support, step))
        return self.linear(self.dropout(x)), states


class APPNPHead(nn.Module):
    """Z <- (1 - alpha) P Z + alpha MLP(X), K times (Gasteiger et al. 2019, equation 7)."""

    first_state_is_features = False

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        widths = _widths(config)
        self.steps, self.alpha = config.head_propagation_steps, config.head_teleport
        self.dropout = nn.Dropout(config.head_dropout)
        self.layers = nn.ModuleList(nn.Linear(d, e) for d, e in itertools.pairwise(widths))

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        return [config.num_labels] * config.head_propagation_steps

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        x = features
        for step, layer in enumerate(self.layers):
            x = layer(self.dropout(x if step == 0 else F.relu(x)))
        z, states = x, []
        for step in range(self.steps):
            states.append(z)
            z = (1 - self.alpha) * graph.propagate(z, _row(support, step)) + self.alpha * x
        return z, states


class GATLayer(nn.Module):
    """Multi-head attention over a node and its neighbours (Velickovic et al. 2018); the edge weights enter the
    attention logits as log P_ij. Heads are concatenated, or averaged in the last layer."""

    def __init__(self, in_size: int, out_size: int, num_heads: int, concatenate: bool, negative_slope: float = 0.2):
        super().__init__()
        self.num_heads, self.concatenate, self.negative_slope = num_heads, concatenate, negative_slope
        self.linear = nn.Linear(in_size, num_heads * out_size, bias=False)
        self.source_attention = nn.Parameter(torch.empty(num_heads, out_size))
        self.target_attention = nn.Parameter(torch.empty(num_heads, out_size))
        self.bias = nn.Parameter(torch.empty(num_heads * out_size if concatenate else out_size))

    def forward(self, x: Tensor, graph: RankingGraph, support: Tensor | None = None) -> tuple[Tensor, Tensor]:
        own = self.linear(x)
        outputs = []
        for head, (z, m) in enumerate(
            zip(self._split(own), self._split(own if support is None else support), strict=True)
        ):
            source, target = self.source_attention[head].to(m.dtype), self.target_attention[head]
            attention = graph.attention(z @ target, m @ source, z @ source.to(z.dtype), self.negative_slope)
            outputs.append(attention.propagate(z, m))
        y = torch.cat(outputs, dim=-1) if self.concatenate else torch.stack(outputs).mean(0)
        return y + self.bias, own

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.num_heads, dim=-1)


class GATHead(nn.Module):
    """Layers of attention with ELU between them. `head_hidden_size` is split over `head_num_attention_heads`."""

    first_state_is_features = False

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        widths, heads = _widths(config), config.head_num_attention_heads
        self.dropout = nn.Dropout(config.head_dropout)
        last = len(widths) - 2
        self.layers = nn.ModuleList(
            GATLayer(d, e if i == last else e // heads, heads, concatenate=i != last)
            for i, (d, e) in enumerate(itertools.pairwise(widths))
        )

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        hidden = [config.head_hidden_size] * (config.head_num_layers - 1)
        return [*hidden, config.head_num_attention_heads * config.num_labels]

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        x, states = features, []
        for step, layer in enumerate(self.layers):
            x = self.dropout(x if step == 0 else F.elu(x))
            x, state = layer(x, graph, _row(support, step))
            states.append(state)
        return x, states


class ARMALayer(nn.Module):
    """X_t+1 = ReLU(P X_t W + X_0 V + b) of K parallel stacks, after the propagation: [1 or K, N, d] -> [K, N, H]."""

    def __init__(self, num_stacks: int, in_size: int, feature_size: int, out_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_stacks, in_size, out_size))
        self.root_weight = nn.Parameter(torch.empty(num_stacks, feature_size, out_size))
        self.bias = nn.Parameter(torch.empty(num_stacks, 1, out_size))

    def forward(self, propagated: Tensor, features: Tensor) -> Tensor:
        return F.relu(propagated @ self.weight + features @ self.root_weight + self.bias)


class ARMAHead(nn.Module):
    """K stacks of T `ARMALayer`s, averaged, then a linear layer (Bianchi et al. 2021, equation 9)."""

    first_state_is_features = True

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        K, T, D, H = config.head_num_stacks, config.head_num_layers, config.feature_size, config.head_hidden_size
        self.dropout = nn.Dropout(config.head_dropout)
        self.layers = nn.ModuleList(ARMALayer(K, D if t == 0 else H, D, H) for t in range(T))
        self.linear = nn.Linear(H, config.num_labels)

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        return [config.feature_size] + [config.head_num_stacks * config.head_hidden_size] * (config.head_num_layers - 1)

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        x, states = self.filter(features, graph, support)
        return self.linear(self.dropout(x)), states

    def filter(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        """The ARMA filter itself: [N, D] -> [N, H] and its states."""
        stacks, states = features[None], []  # [1 or K, N, D or H]
        for step, layer in enumerate(self.layers):
            state = torch.cat(tuple(stacks), dim=-1)  # [N, D] or [N, K * H]
            states.append(state)
            propagated = graph.propagate(state, _row(support, step))
            stacks = layer(torch.stack(propagated.chunk(len(stacks), dim=-1)), self.dropout(features))
        return stacks.mean(0), states


class LinearHead(nn.Module):
    """X W + b: the ablation, which reads no neighbour."""

    first_state_is_features = True

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear = nn.Linear(config.feature_size, config.num_labels)

    @staticmethod
    def state_sizes(config: BPGCNConfig) -> list[int]:
        return [config.feature_size]

    def forward(self, features: Tensor, graph: RankingGraph, support: States | None = None):
        return self.linear(self.dropout(features)), [features]


class LabelPropagation(nn.Module):
    """Z <- alpha P Z + (1 - alpha) Y (Zhou et al. 2004), without parameters.

    `propagation_steps` times from Z = Y, or the fixed point (1 - alpha) (I - alpha P)^-1 Y when they are 0.
    """

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.steps, self.alpha = config.propagation_steps, config.propagation_alpha
        self.share = config.propagation_mix

    def forward(self, graph: RankingGraph, known: Tensor) -> tuple[Tensor, Tensor]:
        """known [N, C], a row of zeros where the class is unknown -> Z [N, C] and what the last step read [N, C]."""
        if self.steps == 0:
            system = torch.eye(graph.num_nodes, dtype=known.dtype, device=known.device) - self.alpha * graph.dense()
            z = (1 - self.alpha) * torch.linalg.solve(system, known)
            return z, z
        z = known
        for _ in range(self.steps):
            read = z
            z = self.alpha * graph.propagate(read) + (1 - self.alpha) * known
        return z, read

    def read(self, graph: RankingGraph, support: Tensor) -> Tensor:
        """Z [N, C] of queries of unknown class, from the rows [M, C] that the last step of a support set read."""
        return self.alpha * graph.propagate(support.new_zeros(graph.num_nodes, support.shape[1]), support)

    @staticmethod
    def log_probabilities(z: Tensor, smoothing: float = 1e-4) -> Tensor:
        """log of the normalised Z + smoothing: finite where no label arrives."""
        z = z + smoothing
        return z.log() - z.sum(-1, keepdim=True).log()

    def mix(self, head_logits: Tensor | None, z: Tensor | None) -> Tensor | None:
        """log of (1 - m) head + m propagated labels [N, C], m = `propagation_mix`; either alone where the other is
        None, and the head's where no label arrives."""
        if z is None or (self.share == 0 and head_logits is not None):
            return head_logits
        propagated = self.log_probabilities(z)
        if head_logits is None:
            return propagated
        if self.share < 1:
            propagated = torch.logaddexp(head_logits + math.log1p(-self.share), propagated + math.log(self.share))
        return torch.where(z.sum(-1, keepdim=True) > 0, propagated, head_logits)


HEADS = {
    "gcn": GCNHead,
    "sgc": SGCHead,
    "appnp": APPNPHead,
    "gat": GATHead,
    "arma": ARMAHead,
    "linear": LinearHead,
}
