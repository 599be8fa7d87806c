"""Exact gradients of a graph whose images do not fit in memory: they are embedded twice, a chunk at a time (Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup")."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .random_state import State, get_random_state, set_random_state


class WholeSet:
    """A loader of one batch an epoch: all images of this process, as chunks that are read when they are needed."""

    def __init__(self, chunks: DataLoader):
        self.chunks = chunks
        self.dataset = chunks.dataset

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, DataLoader]]:
        yield {"chunks": self.chunks}


def split_rows(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """A batch that is in memory as chunks of at most `size` rows; views, no copies."""
    parts = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


class GradientCache:
    """Features without their activations, and the backward pass that computes these again.

    `embed` holds features [N, D] of all chunks as one leaf; once the graph's backward pass has filled its gradient,
    `backward` embeds each chunk again, under the same random numbers, and carries its rows on to the parameters. The
    gradients are those of one pass over all chunks, to rounding; it costs one more forward pass of the backbone.

    Args:
        chunks: batches of `labels`, `node_ids` and what the backbone reads; they must be the same when read again.
        embed: features [n, D] of such a batch.
        progress: wraps the chunks with a bar that says what is done.
    """

    def __init__(
        self,
        chunks: Collection[dict[str, Tensor]],
        embed: Callable[[dict[str, Tensor]], Tensor],
        progress: Callable[[Collection, str], Collection] = lambda chunks, description: chunks,
    ):
        self.chunks, self._embed, self._progress = chunks, embed, progress
        self._noise: list[State] = []

    @torch.no_grad()
    def embed(self, device: torch.device, trains: bool) -> dict[str, Tensor]:
        """`features` (a leaf that asks for its gradient if the backbone trains), `labels` and `node_ids` of all."""
        parts = []
        for chunk in self._progress(self.chunks, "Embedding"):
            self._noise.append(get_random_state(device))
            parts.append((self._embed(chunk), chunk["labels"].to(device), chunk["node_ids"].to(device)))
        features, labels, node_ids = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"features": features.requires_grad_(trains), "labels": labels, "node_ids": node_ids}

    def backward(
        self,
        gradient: Tensor,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
        rest: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """Add the parameters' gradients under that of the features [N, D].

        Args:
            gradient: of the features that `embed` returned.
            no_sync: keeps processes from exchanging gradients; all chunks but the last run in it.
            rest: a tensor of value 0 that depends on the parameters whose gradients are there already, so that the
                exchange, which waits for every parameter, takes them along with the last chunk.
        """
        device = gradient.device
        after = get_random_state(device)
        done = 0
        for number, chunk in enumerate(self._progress(self.chunks, "Gradients")):
            last = number == len(self._noise) - 1
            set_random_state(self._noise[number], device)
            with nullcontext() if last else no_sync():
                features = self._embed(chunk)
                outputs = [(features, gradient[done : done + len(features)])]
                touched = rest() if last else None
                if touched is not None:
                    outputs.append((touched, None))
                torch.autograd.backward(*zip(*outputs, strict=True))
            done += len(features)
        set_random_state(after, device)
