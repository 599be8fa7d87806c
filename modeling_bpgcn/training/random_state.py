"""Random numbers of a training step: as they are, put back, and those of the graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]


def get_random_state(device: torch.device) -> State:
    """Of the CPU, and of the device if it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: State, device: torch.device) -> None:
    """Go on from what `get_random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def seeded(key: Sequence[int], device: torch.device) -> Iterator[None]:
    """Within, random numbers depend on the key alone; afterwards they go on as without it."""
    state = np.random.SeedSequence(tuple(key)).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(state[0]))
        yield
