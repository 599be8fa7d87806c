"""Support banks of many images: what a query costs, and what an index finds.

    python benchmarks/bank.py exact                          # 1,000, 10,000 and 100,000 images; a minute on 2 cores
    python benchmarks/bank.py faiss                          # 1,000,000 images, 6 GiB; some 10 minutes on 2 cores
    python benchmarks/bank.py faiss --sizes 10000 --factory IVF64,SQ8

`exact` answers one image of 224 pixels with a ViT-S/14 backbone of random weights, from banks of synthetic features:
the time of the whole answer over that of the backbone alone, medians of interleaved rounds. `faiss` ranks features of
384 dimensions that lie around centres (as images of classes and sorts do), for queries drawn from the same centres but
not in the bank: the share of the 10 exact neighbours that the model finds through the index, and the time of a query.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Dinov2Config

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification
from modeling_bpgcn.search import FaissSearch
from modeling_bpgcn.search.faiss_search import default_factory

WIDTH, CLASSES, NEIGHBORS, QUERIES = 384, 100, 10, 500


def small_model(bank_dtype: str, **fields) -> BPGCNForImageClassification:
    """ViT-S/14 with random weights."""
    backbone = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    config = BPGCNConfig(
        backbone_config=backbone, num_labels=CLASSES, num_neighbors=NEIGHBORS, bank_dtype=bank_dtype, **fields
    )
    return BPGCNForImageClassification(config).eval()


def clustered(count: int, centers: torch.Tensor, spread: float, seed: int) -> torch.Tensor:
    """Features [count, D] around centres [C, D], in place of a backbone's."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, centers.shape[1], generator=generator).mul_(spread)
    which = torch.randint(len(centers), (count,), generator=generator)
    for part, rows in zip(features.split(65536), which.split(65536), strict=True):
        part += centers[rows]
    return features


def fill(model: BPGCNForImageClassification, features: torch.Tensor) -> None:
    """Rows with random states: the graph of all images would take longer than all that is measured here."""
    M, bank = len(features), model.support_bank
    states = [features] * bank.shares_features
    states += [torch.randn(M, bank.get_buffer(name).shape[1]) for name in bank.state_names]
    propagated = torch.rand(M, CLASSES)
    bank.fill(features, torch.arange(M) % CLASSES, torch.arange(M), torch.ones(M), propagated, states)


@torch.inference_mode()
def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def exact(options) -> None:
    """Time of an answer over the backbone's, by size of the bank."""
    model, image = small_model(options.bank_dtype), torch.randn(1, 3, 224, 224)
    print("| images in the bank | backbone, ms | whole answer, ms | ratio |", "| ---: | ---: | ---: | ---: |", sep="\n")
    for M in options.sizes or (1_000, 10_000, 100_000):
        fill(model, clustered(M, torch.randn(max(10, M // 100), WIDTH), 0.5, seed=M))
        runs = {"backbone": lambda: model.get_image_features(image), "answer": lambda: model(image)}
        times = {name: [] for name in runs}
        for round_ in range(options.rounds + 2):
            for name, run in runs.items():
                taken = seconds(run)
                if round_ > 1:  # the first prepare the keys and warm up
                    times[name].append(1000 * taken)
        backbone, answer = (statistics.median(times[name]) for name in ("backbone", "answer"))
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        print(f"| {M:,} | {backbone:.1f} | {answer:.1f} | {ratio:.2f} |", flush=True)


def faiss(options) -> None:
    """Recall against latency, by cells visited."""
    model = small_model(options.bank_dtype, head="label_propagation", propagation_mix=1.0)
    for M in options.sizes or (1_000_000,):
        centers = torch.randn(max(10, M // 100), WIDTH, generator=torch.Generator().manual_seed(0))
        fill(model, clustered(M, centers, options.spread, seed=1))
        query = clustered(QUERIES, centers, options.spread, seed=2)
        model.use_search(None)
        expected = rank(model, query)
        exact_alone, exact_batch = latencies(model, query)
        search = FaissSearch(options.factory)
        model.use_search(search)
        start = time.perf_counter()
        rank(model, query[:1])
        built = time.perf_counter() - start
        print(f"\n{M:,} images, {options.factory or default_factory(M)}, built in {built:.0f} s\n")
        print("| cells visited | recall@10 | ms per query, alone | ms per query, in hundreds |")
        print("| ---: | ---: | ---: | ---: |")
        for search.num_probes in options.probes:
            found = rank(model, query)
            recall = (found[:, :, None] == expected[:, None]).any(1).float().mean().item()
            alone, batch = latencies(model, query)
            print(f"| {search.num_probes} | {recall:.4f} | {alone:.2f} | {batch:.2f} |", flush=True)
        print(f"| all, exact | 1.0000 | {exact_alone:.2f} | {exact_batch:.2f} |", flush=True)


def rank(model: BPGCNForImageClassification, query: torch.Tensor) -> torch.Tensor:
    """Rows [N, k] of the neighbours."""
    with torch.inference_mode():
        return model.bpgcn.rank_in_bank(query).indices


def latencies(model: BPGCNForImageClassification, query: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of a query that comes alone, and of one in a hundred; medians."""
    medians = []
    for size in (1, 100):
        parts = query[: 30 * size].split(size)
        taken = [seconds(lambda part=part: rank(model, part)) for part in parts]
        medians.append(1000 * statistics.median(taken) / size)
    return tuple(medians)


def main() -> None:
    """Print one table a claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=["exact", "faiss"])
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--bank_dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--factory", help="of the FAISS index; FaissSearch's choice unless given")
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--spread", type=float, default=0.5, help="of the features around their centres")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, width {WIDTH}, k = {NEIGHBORS}\n")
    {"exact": exact, "faiss": faiss}[options.claim](options)


if __name__ == "__main__":
    main()
