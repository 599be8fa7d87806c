"""The memory of scope `memory`: features of earlier batches, as further nodes of the graph (a cross-batch memory, Wang
et al. 2020)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY_FILE = "feature_memory.safetensors"


class FeatureMemory:
    """A queue of the latest detached features with their classes and ids, one row an image, the newest it has.

    Args:
        size: rows it holds; the oldest go first.
        warmup_steps: so many first steps fill it only, as features still move fast.
    """

    def __init__(self, size: int, warmup_steps: int = 0):
        self.size, self.warmup_steps = size, warmup_steps
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows["node_ids"]) if self._rows else 0

    def others(self, node_ids: Tensor, step: int) -> dict[str, Tensor] | None:
        """The rows of images that are not in the batch `node_ids` [B]: `features` [Q, D], `labels` [Q], `node_ids` [Q];
        None where there are none, or in the warm-up."""
        if not len(self) or step < self.warmup_steps:
            return None
        kept = ~torch.isin(self._rows["node_ids"], node_ids)
        return {name: self._rows[name][kept] for name in ("features", "labels", "node_ids")} if kept.any() else None

    def push(self, features: Tensor, labels: Tensor, node_ids: Tensor, step: int) -> None:
        """Keep a batch [B, D]; of an image that was there the old row goes."""
        new = {"features": features.detach(), "labels": labels, "node_ids": node_ids}
        new["step"] = torch.full_like(node_ids, step)
        if self._rows:
            kept = ~torch.isin(self._rows["node_ids"], node_ids)
            new = {name: torch.cat([self._rows[name][kept], rows]) for name, rows in new.items()}
        self._rows = {name: rows[-self.size :] for name, rows in new.items()}

    def extend(self, nodes: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """A batch (`features`, `labels`, `node_ids`) with the rows of `others` after its own; then keep the batch."""
        context = self.others(nodes["node_ids"], step)
        self.push(**nodes, step=step)
        return nodes if context is None else {name: torch.cat([nodes[name], context[name]]) for name in nodes}

    @torch.no_grad()
    def staleness(self, features: Tensor, node_ids: Tensor, step: int) -> dict[str, Tensor]:
        """What the logs say: rows held, their mean age in steps, and where images of the batch are held, how far (1 -
        cosine) their features have moved since."""
        if not len(self):
            return {"memory_rows": torch.tensor(0.0)}
        held = self._rows
        values = {"memory_rows": torch.tensor(float(len(self))), "memory_age": (step - held["step"]).float().mean()}
        order = node_ids.argsort()
        place = torch.searchsorted(node_ids[order], held["node_ids"]).clamp_max(len(order) - 1)
        rows = order[place]
        again = node_ids[rows] == held["node_ids"]
        if again.any():
            now, then = features[rows[again]].float(), held["features"][again].float()
            values["memory_drift"] = (1 - F.cosine_similarity(now, then)).mean()
        return values

    def save(self, folder: str | Path) -> None:
        """Write the rows into a checkpoint, so that a resumed run goes on with the same graph."""
        rows = {name: tensor.contiguous() for name, tensor in self._rows.items()}
        save_file(rows, Path(folder) / MEMORY_FILE)

    def load(self, folder: str | Path, device: torch.device) -> None:
        """Read what `save` wrote."""
        rows = load_file(Path(folder) / MEMORY_FILE)  # knows no cpu:0, the device of one of several processes
        self._rows = {name: tensor.to(device) for name, tensor in rows.items()}
