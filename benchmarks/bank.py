"""Support banks of many images: what a query costs, and what an index finds.

    python benchmarks/bank.py exact                          # 1,000, 10,000 and 100,000 images; a minute on 2 cores
    python benchmarks/bank.py faiss --rows 1000000           # 6 GiB; some 20 minutes on one core
    python benchmarks/bank.py faiss --rows 10000 --indexes IVF64,SQ8 HNSW32,SQ8

`exact` answers one image of 224 pixels with a ViT-S/14 backbone of random weights, from banks of synthetic features:
the time of the whole answer over that of the backbone alone, medians of interleaved rounds. `faiss` ranks synthetic
features of 384 dimensions as hard as a backbone's, see `class_features`, for queries of the same classes that are not
in the bank: the share of the 10 exact neighbours that the model finds through each index, which proposes 4 candidates a
neighbour for the model to rank by the stored features, and the time of a query over that of exact search.
"""

import argparse
import re
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
from modeling_bpgcn.search.faiss_search import FLAT_BELOW, default_factory, default_probes

WIDTH, CLASSES, NEIGHBORS, QUERIES = 384, 100, 10, 500
VISITS = ((16, 64, 128, None, 256), (64, 128, 256, 512))  # cells (None: FaissSearch's own choice), efSearch of HNSW


def small_model(bank_dtype: str, **fields) -> BPGCNForImageClassification:
    """ViT-S/14 with random weights."""
    backbone = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    config = BPGCNConfig(
        backbone_config=backbone, num_labels=CLASSES, num_neighbors=NEIGHBORS, bank_dtype=bank_dtype, **fields
    )
    return BPGCNForImageClassification(config).eval()


def class_features(count: int, seed: int, within: float = 0.8, decay: float = 1.1) -> torch.Tensor:
    """Features [count, D] in place of a backbone's: wide classes, and principal components whose variances fall as a
    power of their rank.

    Frozen CLS features of a ViT-Ti/16 on photographs of 17 kinds of flowers and of 6 kinds of trash have 0.74 and 0.92
    of their variance within the classes, and `local_dimension` 19 and 22; 2,000 of these here have 0.8 and about 30.
    """
    scale = torch.arange(1.0, WIDTH + 1) ** (-decay / 2)
    scale /= scale.norm()
    centers = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(0)) * scale * (1 - within) ** 0.5
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator).mul_(scale * within**0.5)
    which = torch.randint(len(centers), (count,), generator=generator)
    for part, rows in zip(features.split(65536), which.split(65536), strict=True):
        part += centers[rows]
    return features


def local_dimension(features: torch.Tensor, neighbors: int = 20) -> float:
    """Median over images of the intrinsic dimension about them, from the distances of their nearest neighbours on the
    sphere (Levina and Bickel, "Maximum Likelihood Estimation of Intrinsic Dimension", 2004)."""
    units = torch.nn.functional.normalize(features, dim=-1)
    nearest = torch.cdist(units, units).topk(neighbors + 1, largest=False).values[:, 1:]  # the first is the image
    return (-1 / (nearest[:, :-1] / nearest[:, -1:]).log().mean(1)).median().item()


def fill(model: BPGCNForImageClassification, features: torch.Tensor) -> None:
    """Rows with random states: the graph of all images would take longer than all that is measured here."""
    M, bank = len(features), model.support_bank
    states = [features] * bank.shares_features
    states += [torch.randn(M, bank.get_buffer(name).shape[1]) for name in bank.state_names]
    propagated = torch.rand(M, CLASSES)
    bank.fill(features, torch.arange(M) % CLASSES, torch.arange(M), torch.ones(M), propagated, states)


@torch.inference_mode()
def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call."""
    start = clock()
    run()
    return clock() - start


def exact(options) -> None:
    """Time of an answer over the backbone's, by size of the bank."""
    model, image = small_model(options.bank_dtype), torch.randn(1, 3, 224, 224)
    print("| images in the bank | backbone, ms | whole answer, ms | ratio |", "| ---: | ---: | ---: | ---: |", sep="\n")
    for M in options.rows or (1_000, 10_000, 100_000):
        fill(model, class_features(M, seed=M))
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
    """Recall against latency, by index and by how much of it a query visits."""
    model = small_model(options.bank_dtype, head="label_propagation", propagation_mix=1.0)
    for M in options.rows or (1_000_000,):
        features, query = class_features(M, seed=1), class_features(QUERIES, seed=2)
        print(f"{M:,} images, local dimension {local_dimension(features[:2000]):.0f} among 2,000 of them\n")
        fill(model, features)
        del features
        model.use_search(None)
        expected, (exact_alone, exact_batch) = rank(model, query), latencies(model, query)
        print("| index | built in, s | visited | recall@10 | alone, ms | of exact | in hundreds, ms | of exact |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        print(f"| exact | - | all | 1.000 | {exact_alone:.2f} | 1.000 | {exact_batch:.2f} | 1.000 |", flush=True)
        for factory in options.indexes or (None, f"IVF{cells(M)},Flat", f"IVF{cells(M)},PQ384x4fs", "HNSW32,SQ8"):
            search = FaissSearch(factory)
            model.use_search(search)
            start = time.process_time()
            rank(model, query[:1])
            name, built = factory or f"{default_factory(M)} (default)", time.process_time() - start
            for visits in options.visits or VISITS["HNSW" in name]:
                search.num_probes = search.ef_search = visits
                found = rank(model, query)
                recall = (found[:, :, None] == expected[:, None]).any(1).float().mean().item()
                alone, batch = latencies(model, query)
                ratios = f"{alone:.2f} | {alone / exact_alone:.3f} | {batch:.2f} | {batch / exact_batch:.3f}"
                visited = visits or f"default ({default_probes(cells(M))})"
                print(f"| {name} | {built:.0f} | {visited} | {recall:.3f} | {ratios} |", flush=True)


def cells(size: int) -> int:
    """Of the inverted file that `FaissSearch` takes for so many points."""
    return int(re.match(r"IVF(\d+)", default_factory(max(size, FLAT_BELOW)))[1])


def rank(model: BPGCNForImageClassification, query: torch.Tensor) -> torch.Tensor:
    """Rows [N, k] of the neighbours."""
    with torch.inference_mode():
        return model.bpgcn.rank_in_bank(query).indices


def latencies(model: BPGCNForImageClassification, query: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of CPU time of a query that comes alone, and of one in a hundred; medians."""
    medians = []
    for size in (1, 100):
        parts = query[: 50 * size].split(size)
        taken = [seconds(lambda part=part: rank(model, part), time.process_time) for part in parts]
        medians.append(1000 * statistics.median(taken) / size)
    return tuple(medians)


def main() -> None:
    """Print one table a claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=["exact", "faiss"])
    parser.add_argument("--rows", type=int, nargs="+", help="Images in the bank; of each claim its own unless given.")
    parser.add_argument("--bank_dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--indexes", nargs="+", help="FAISS factory strings; FaissSearch's choice and others by default."
    )
    parser.add_argument("--visits", type=int, nargs="+", help="Cells of an inverted file, or HNSW's efSearch.")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, width {WIDTH}, k = {NEIGHBORS}\n")
    {"exact": exact, "faiss": faiss}[options.claim](options)


if __name__ == "__main__":
    main()
