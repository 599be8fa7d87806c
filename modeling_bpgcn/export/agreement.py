"""How far an exported model's answers are from those of the model itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from ..ranking import similarity
from .files import Runner

TOLERANCE = 1e-4
TIE = 1e-5  # relative to the largest similarity: rounding decides which of two such neighbours comes first


@dataclass(frozen=True)
class Agreement:
    """Of `images` answers: `logits`, the largest absolute difference; `same_class`, the images of the same best class;
    `ties`, the images whose neighbours differ where rounding decides, which `logits` leaves out; `other_neighbors`,
    those whose neighbours differ where it does not."""

    images: int
    logits: float
    same_class: int
    ties: int
    other_neighbors: int

    @property
    def agrees(self) -> bool:
        """Whether all neighbours are the model's but for ties, and the log-probabilities are within `TOLERANCE`."""
        return self.other_neighbors == 0 and self.logits <= TOLERANCE and self.ties < self.images


@torch.inference_mode()
def compare(model: BPGCNForImageClassification, run: Runner, pixel_values: Tensor, batch_size: int = 32) -> Agreement:
    """Compare `run`, of `run_file` or a program, with the model's answers to images [B, channels, height, width]."""
    parts = [_compare_batch(model, run(batch), batch) for batch in pixel_values.split(batch_size)]
    difference, same_class, tied, other = (torch.cat(column) for column in zip(*parts, strict=True))
    logits = difference[~tied].max().item() if not tied.all() else 0.0
    return Agreement(len(pixel_values), logits, int(same_class.sum()), int(tied.sum()), int(other.sum()))


def _compare_batch(model, answers: dict[str, Tensor], pixel_values: Tensor) -> tuple[Tensor, ...]:
    """For each image: the difference of the logits, and whether the best class is the same, there are ties, and the
    neighbours are others."""
    expected, device = model(pixel_values=pixel_values), pixel_values.device
    logits, indices = answers["logits"].to(device), answers["neighbor_indices"].to(device)
    scores = similarity(expected.features, model.support_bank.features.float(), model.config.ranking_metric)
    # in their order by similarity: relaxations that weigh by other than the scores have another
    own, theirs = (scores.gather(1, rows).sort(-1).values for rows in (expected.neighbor_indices, indices))
    moved = (indices.sort(-1).values != expected.neighbor_indices.sort(-1).values).any(-1)
    near = (own - theirs).abs().amax(-1) <= TIE * scores.abs().amax()
    difference = (logits - expected.logits).abs().amax(-1)
    same_class = logits.argmax(-1) == expected.logits.argmax(-1)
    return difference, same_class, moved & near, moved & ~near
