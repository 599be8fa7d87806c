"""What the logs of training say beside the loss: the ranking's quality, and how much gradient each path carries."""

import torch
from torch import Tensor


class StepStatistics:
    """Means over the steps since the last log."""

    def __init__(self):
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """One step's value."""
        self._values.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32).detach())

    def update(self, values: dict[str, Tensor]) -> None:
        """One step's values."""
        for name, value in values.items():
            self.add(name, value)

    def take(self) -> dict[str, float]:
        """The mean of each value, which are then forgotten."""
        means = {name: torch.stack(values).mean().item() for name, values in self._values.items()}
        self._values.clear()
        return means

    @torch.no_grad()
    def add_ranking(self, indices: Tensor, weights: Tensor, labels: Tensor, asked: int) -> None:
        """The effective number of neighbours (perplexity of a row's weights) and the share of neighbours of the same
        class, where both are known, of the first `asked` rows of [N, k] neighbours among N classes."""
        weights, neighbors = weights[:asked], labels[indices[:asked]]
        share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        self.add("effective_neighbors", torch.special.entr(share).sum(-1).exp().mean())
        own = labels[:asked, None]
        same = (neighbors == own)[(own >= 0) & (neighbors >= 0)].float()
        if len(same):
            self.add("homophily", same.mean())

    def watch_paths(self, module, args, outputs) -> None:
        """A forward hook: records the gradient's norm on each path, from the ranking and from the messages."""
        if outputs.path_features is None:
            return
        for name, path in zip(("ranking", "feature"), outputs.path_features, strict=True):
            if path.requires_grad:
                path.register_hook(self._norm_recorder(f"{name}_gradient_norm"))

    def _norm_recorder(self, name: str):
        def record(gradient: Tensor) -> None:
            self.add(name, gradient.norm())

        return record
