"""Soft top-k: forward, backward and memory of our back ends and of what else one would use, against one matrix product.

    python benchmarks/ranking.py                     # N = 2048, 8192; D = 384; a few minutes on 2 cores
    python benchmarks/ranking.py --sizes 16384 --contenders tiled-all seed
    python benchmarks/ranking.py --device cuda

Each contender runs in a fresh process. Times are the best of some rounds, in units of one N x N x D product measured in
the same process between the rounds; memory is the peak beyond inputs and outputs.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn.ranking import soft_topk

NEIGHBORS, TEMPERATURE = 10, 0.05


def ours(backend: str, normalization: str) -> Callable:
    """`soft_topk` with a back end."""

    def run(features):
        options = {"num_neighbors": NEIGHBORS, "temperature": TEMPERATURE, "normalization": normalization}
        return soft_topk(features, backend=backend, **options).weights

    return run


def seed(features):
    """The note's formula, line by line."""
    unit = F.normalize(features, p=2, dim=1)
    similarity = unit @ unit.T
    soft_weights = F.softmax(similarity / TEMPERATURE, dim=1)
    _, rankings = torch.topk(similarity, k=NEIGHBORS)
    return soft_weights.gather(1, rankings)


def row_blocks(features):
    """The formula for selected scores in blocks of rows under checkpointing: what one writes first to save memory."""
    unit = F.normalize(features, dim=1)

    def block(rows):
        similarity = rows @ unit.T
        best = similarity.topk(NEIGHBORS).values
        return torch.exp(best / TEMPERATURE - torch.logsumexp(similarity / TEMPERATURE, dim=1, keepdim=True))

    parts = [torch.utils.checkpoint.checkpoint(block, rows, use_reentrant=False) for rows in unit.split(1024)]
    return torch.cat(parts)


def attention(features):
    """Fused attention of the features on themselves: the softmax over all, no ranking (marked *). The kernel keeps the
    log-sum-exp to itself; the attended features stand for its gradient."""
    unit = F.normalize(features, dim=1)[None, None]
    return F.scaled_dot_product_attention(unit, unit, unit, scale=1 / TEMPERATURE)[0, 0]


def flex(features):
    """FlexAttention, compiled: the log-sum-exp alone, no ranking (marked *). On a CPU it has neither that output nor a
    backward pass: there it attends to a few columns, which takes the same softmax and little beside."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled, options = torch.compile(flex_attention, dynamic=False), {"scale": 1 / TEMPERATURE}
    unit = F.normalize(features, dim=1)[None, None]
    if features.is_cuda:
        return compiled(unit, unit, unit, return_aux=AuxRequest(lse=True), **options)[1].lse[0, 0]
    unit = unit.detach()
    return compiled(unit, unit, unit[..., :16].contiguous(), **options)[0, 0]


def indices_only(features):
    """PyG's knn_graph and a gather: a fixed graph, whose weights are computed on the edges alone (marked *)."""
    from torch_geometric.nn import knn_graph

    with torch.no_grad():
        source, target = knn_graph(features, k=NEIGHBORS, cosine=True)
    unit = F.normalize(features, dim=1)
    scores = (unit[source] * unit[target]).sum(-1).view(-1, NEIGHBORS)
    return torch.softmax(scores / TEMPERATURE, dim=1)


def keops(features):
    """KeOps: its lazy argKmin and log-sum-exp, then the selected scores."""
    from pykeops.torch import LazyTensor

    unit = F.normalize(features, dim=1)
    scores = (LazyTensor(unit[:, None, :].contiguous()) | LazyTensor(unit[None, :, :].contiguous())) / TEMPERATURE
    indices = (-scores).argKmin(NEIGHBORS, dim=1)
    best = (unit[:, None, :] * unit[indices]).sum(-1) / TEMPERATURE
    return torch.exp(best - scores.logsumexp(dim=1).view(-1, 1))


CONTENDERS = {
    "seed": seed,
    "row blocks": row_blocks,
    "dense-all": ours("dense", "all"),
    "tiled-all": ours("tiled", "all"),
    "dense-selected": ours("dense", "selected"),
    "tiled-selected": ours("tiled", "selected"),
    "SDPA *": attention,
    "flex_attention *": flex,
    "PyG knn_graph *": indices_only,
    "KeOps": keops,
}


def measure(name: str, N: int, D: int, device: str, rounds: int) -> dict:
    """One contender in this process. What has no backward pass is timed forward only."""
    torch.manual_seed(0)
    features = torch.randn(N, D, device=device, requires_grad=True)
    run = CONTENDERS[name]
    small = torch.randn(64, D, device=device, requires_grad=True)
    differentiable = run(small).requires_grad
    if differentiable:
        run(small).sum().backward()
    gradient = None
    before, best = peak_bytes(device), {}
    product = float("inf")
    for round_ in range(rounds):
        start = now(device)
        weights = run(features)
        times = {"forward": now(device) - start}
        if differentiable:
            gradient = torch.ones_like(weights) if gradient is None else gradient
            features.grad = None
            middle = now(device)
            weights.backward(gradient)
            times["backward"] = now(device) - middle
            times["total"] = times["forward"] + times["backward"]
        best = {key: min(best.get(key, value), value) for key, value in times.items()}
        if round_ == 0:
            outputs = (weights.numel() * 2 + features.numel()) * 4
            memory = peak_bytes(device) - before - outputs
        del weights
        product = min(product, time_product(features.detach(), device))
    return {key: value / product for key, value in best.items()} | {"product": product, "memory": memory}


def time_product(features: torch.Tensor, device: str) -> float:
    """Seconds of one N x N x D product, in row blocks so that the result takes no memory."""
    total = 0.0
    for rows in features.split(2048):
        start = now(device)
        rows @ features.T
        total += now(device) - start
    return total


def now(device: str) -> float:
    """Seconds, with the device's queue empty."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The most memory this process has held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print one table a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[384])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, N, D = options.one
        print(json.dumps(measure(name, int(N), int(D), options.device, options.rounds)))
        return
    threads = torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {options.device}, {threads} threads, float32, k = {NEIGHBORS}, tau = {TEMPERATURE}"
    )
    for D in options.widths:
        for N in options.sizes:
            print(
                f"\nN = {N}, D = {D}\n\n| | forward | backward | both | memory, MiB |",
                "| --- | ---: | ---: | ---: | ---: |",
                sep="\n",
            )
            for name in options.contenders:
                print(row(name, N, D, options), flush=True)


def row(name: str, N: int, D: int, options) -> str:
    """A line of the table, from a fresh process."""
    command = [sys.executable, __file__, "--one", name, str(N), str(D), "--device", options.device]
    done = subprocess.run([*command, "--rounds", str(options.rounds)], capture_output=True, text=True)
    if done.returncode:
        reasons = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE) or ["failed"]
        return f"| {name} | {reasons[-1][:80]} | | | |"
    got = json.loads(done.stdout.splitlines()[-1])
    times = " | ".join(f"{got[key]:.2f}" if key in got else "-" for key in ("forward", "backward", "total"))
    # a compiler before it may have taken more than the run
    memory = f"{got['memory'] / 2**20:.0f}" if got["memory"] > 0 else "-"
    return f"| {name} | {times} | {memory} |"


if __name__ == "__main__":
    main()
