"""Rows of all processes as one tensor, with the gradient that belongs to it."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

# what both gloo and NCCL exchange
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MAX_DIMS = 6


def gather_rows(x: Tensor) -> Tensor:
    """The rows [n, ...] of all processes in the order of their ranks: [N, ...], the same everywhere.

    Every process must call it, each with any number of rows, also none. The gradient is the adjoint: the backward pass
    sums the gradients of all processes, so it is a collective too, and gives each the part of its own rows. If all
    compute the same loss L of the gathered rows, each has `world size` times the gradient of L there, and the mean
    over the processes that DDP takes is dL/dparameters. Without other processes `x` itself comes back.

    Raises:
        ValueError: on every process, if the rows differ in shape or dtype, or ask for a gradient on some only.
        RuntimeError: for a gradient of the gradient, of which there is none.
    """
    sizes = gather_sizes(x)
    return x if len(sizes) == 1 else _GatherRows.apply(x, sizes)


def touch(model) -> Tensor | None:
    """0 with a gradient of 0 for every parameter, where the exchange between processes waits for each of them."""
    if not isinstance(model, DistributedDataParallel):
        return None
    return sum(p.flatten()[:0].sum() for p in model.parameters() if p.requires_grad)


def gather_sizes(x: Tensor) -> list[int]:
    """How many rows [n, ...] each process has, by rank; one number without other processes.

    Raises:
        ValueError: as in `gather_rows`, which calls it: processes that differ say so instead of waiting for ever.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [len(x)]
    header = torch.full((3 + MAX_DIMS,), -1, dtype=torch.int64)
    if x.dtype in DTYPES and 1 <= x.ndim <= MAX_DIMS:
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        header[: 3 + x.ndim] = torch.tensor([DTYPES.index(x.dtype), wants_gradient, x.ndim, *x.shape])
    header = header.to(x.device)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size())]
    dist.all_gather(headers, header)
    headers = torch.stack(headers).tolist()
    sizes = [header.pop(3) for header in headers]
    if any(header != headers[0] for header in headers) or headers[0][0] < 0:
        said = "; ".join(f"process {rank} {_describe(header)}" for rank, header in enumerate(headers))
        raise ValueError(
            "All processes must gather rows of one shape and dtype, with a gradient or without: " + said + "."
        )
    return sizes


def _describe(header: list[int]) -> str:
    dtype, wants_gradient, ndim, *width = header
    if dtype < 0:
        return f"has a tensor of no dimension, more than {MAX_DIMS}, or an unknown dtype"
    shape = ", ".join(["rows", *map(str, width[: ndim - 1])])
    return f"has {str(DTYPES[dtype]).removeprefix('torch.')} [{shape}]{' with a gradient' * wants_gradient}"


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x, sizes):
        # the back ends exchange equal sizes only
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        if padded.numel():
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.sizes = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # sums in half precision would round at every process
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()].to(grad.dtype), None
