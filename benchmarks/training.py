"""Training: step time, images per second and peak memory of the scopes of the graph, and of what else one would use.

    python benchmarks/training.py                    # all tables, about 25 minutes on 2 cores
    python benchmarks/training.py --tables step prefix
    python benchmarks/training.py --tables full --sizes 512 1024

The backbone is a DINOv2 of ViT-Ti's size (width 192, 12 blocks, patch 16) on images of 112 pixels, which are made when
they are read. Each row is measured in fresh processes, some rounds of them in turn; times are the best step of all
rounds, from the end of one step to the end of the next; memory is the peak beyond what was held before training.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import datasets
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification
from modeling_bpgcn.training.arguments import BPGCNTrainingArguments
from modeling_bpgcn.training.callbacks import CurvesCallback
from modeling_bpgcn.training.images import build_image_processor, image_transform
from modeling_bpgcn.training.trainer import BPGCNTrainer

ROOT = Path(__file__).parents[1]
CLASSES, SIDE = 17, 112
VIT_TINY = {"hidden_size": 192, "num_attention_heads": 3, "patch_size": 16, "image_size": SIDE}


class Images(Dataset):
    """Images of random pixels, made when they are read, one in ten with its class."""

    def __init__(self, count: int, with_ids: bool = True):
        self.count, self.with_ids = count, with_ids

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        if not self.with_ids:
            return {"pixel_values": pixels, "labels": index % CLASSES}
        return {"pixel_values": pixels, "labels": -100 if index % 10 else index // 10 % CLASSES, "node_ids": index}


def encoded_images(count: int) -> datasets.Dataset:
    """The same as JPEG files in a data set, decoded and normalized when they are read, as `train.py` has them."""
    rows = [Images(count)[index] for index in range(count)]
    images = [PIL.Image.fromarray((row["pixel_values"] * 255).byte().permute(1, 2, 0).numpy()) for row in rows]
    files = [BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "JPEG")
    columns = {
        "image": [{"bytes": file.getvalue(), "path": None} for file in files],
        "label": [row["labels"] for row in rows],
        "node_id": [row["node_ids"] for row in rows],
    }
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return data.with_transform(image_transform(build_image_processor(None, SIDE, 16)))


class Stopwatch(TrainerCallback):
    """The time from the end of each step to the end of the next."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def best(self) -> float:
        """Seconds of the fastest step but the first."""
        return min(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(case: dict) -> dict:
    """Train a few steps of one case in this process."""
    case = dict(case)
    images, steps, kind = case.pop("images"), case.pop("steps", 4), case.pop("kind", "bpgcn")
    config, encoded = case.pop("config", {}), case.pop("encoded", False)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": steps,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            **case,
        }
        if "prefix_cache" in common:
            common["prefix_cache"] = f"{folder}/{common['prefix_cache']}"
        set_seed(0)
        backbone = Dinov2Config(**VIT_TINY, num_labels=CLASSES)
        if kind == "stock":
            arguments = TrainingArguments(**common)
            trainer = Trainer(Dinov2ForImageClassification(backbone), arguments, train_dataset=Images(images, False))
        else:
            model = BPGCNForImageClassification(BPGCNConfig(backbone_config=backbone, num_labels=CLASSES, **config))
            data = encoded_images(images) if encoded else Images(images)
            trainer = BPGCNTrainer(
                model,
                BPGCNTrainingArguments(**common),
                train_dataset=data,
                train_classes=[-100 if i % 10 else i // 10 % CLASSES for i in range(images)],
            )
            trainer.remove_callback(CurvesCallback)
        watch = Stopwatch()
        trainer.add_callback(watch)
        before = peak_mib()
        trainer.train()
        result = {"seconds": watch.best(), "mib": peak_mib() - before}
        if trainer.accelerator.num_processes > 1:
            trainer.accelerator.end_training()
        return result if trainer.is_world_process_zero() else {}


def run_frozen_pyg(case: dict) -> dict:
    """The usual pipeline: features once, neighbours once, then steps of PyG's GCN on the fixed graph."""
    from torch_geometric.nn import GCNConv

    set_seed(0)
    count, model = (
        case["images"],
        BPGCNForImageClassification(BPGCNConfig(backbone_config=Dinov2Config(**VIT_TINY), num_labels=CLASSES)),
    )
    model.eval()
    before, start = peak_mib(), time.perf_counter()
    with torch.no_grad():
        chunks = torch.arange(count).split(64)
        pixels = (torch.stack([Images(count)[int(i)]["pixel_values"] for i in chunk]) for chunk in chunks)
        features = torch.cat([model.get_image_features(chunk) for chunk in pixels])
        neighbors = model.bpgcn.rank(features).indices
    edges = torch.stack([neighbors.flatten(), torch.arange(count).repeat_interleave(neighbors.shape[1])])
    once = time.perf_counter() - start
    first, second = GCNConv(192, 256), GCNConv(256, CLASSES)
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()])
    labels, seconds = torch.arange(count) % CLASSES, []
    for _ in range(5):
        start = time.perf_counter()
        logits = second(torch.relu(first(features, edges)), edges)
        torch.nn.functional.cross_entropy(logits[::10], labels[::10]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "mib": peak_mib() - before, "once": once}


def measure(case: dict, processes: int = 1) -> dict:
    """Run one case in fresh processes."""
    command = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        launcher = Path(sys.executable).with_name("accelerate")
        command = [
            str(launcher),
            "launch",
            "--config_file",
            str(ROOT / "configuration/accelerate/two_cpu_processes.yaml"),
        ]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
        command += ["--num_cpu_threads_per_process", str(max(torch.get_num_threads() // processes, 1))]
    command += [str(Path(__file__).resolve()), "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    rows = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not rows:
        raise RuntimeError(f"{case} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return rows[0]


def table(title: str, cases: dict[str, tuple[dict, int]], rounds: int, reference: str | None = None) -> dict[str, dict]:
    """Measure the cases in turn, some rounds of them, and print one table with ratios to the `reference` row."""
    found: dict[str, dict] = {}
    for _ in range(rounds):
        for name, (case, processes) in cases.items():
            new = measure(case, processes)
            old = found.setdefault(name, new)
            found[name] = {key: min(value, old[key]) for key, value in new.items()}
    width = max(map(len, cases))
    print(f"\n{title}\n\n| {'':{width}} | step, s | ratio | images/s | peak, MiB |\n|-|-|-|-|-|", flush=True)
    for name, row in found.items():
        ratio = f"{row['seconds'] / found[reference]['seconds']:.2f}" if reference else "-"
        case = cases[name][0]
        per_step = case["images"] if case.get("graph_scope") == "full" or "rows" not in case else case["rows"]
        speed = per_step / row["seconds"]
        once = f" (+ {row['once']:.1f} s once)" if "once" in row else ""
        print(f"| {name:{width}} | {row['seconds']:.3f}{once} | {ratio} | {speed:.0f} | {row['mib']:.0f} |", flush=True)
    return found


def step_table(options) -> None:
    """A step of 64 images: the stock classifier, and ours with the batch as the graph."""
    common = {"images": 256, "per_device_train_batch_size": 64, "rows": 64, "steps": 6}
    cases = {
        "stock Dinov2ForImageClassification": ({**common, "kind": "stock"}, 1),
        "batch": (common, 1),
        "batch, chunks of 16": ({**common, "gradient_cache_chunk_size": 16}, 1),
        "memory of 4096": ({**common, "graph_scope": "memory", "memory_size": 4096}, 1),
        "batch, last 3 blocks": ({**common, "trainable_blocks": 3}, 1),
    }
    table("A step of 64 images", cases, options.rounds, "stock Dinov2ForImageClassification")


def full_table(options) -> None:
    """The graph of all images: against all activations at once, and memory against their number."""

    def full(count, chunk):
        return {"images": count, "graph_scope": "full", "per_device_train_batch_size": chunk, "steps": 2}

    count = options.sizes[0]
    plain = {"images": count, "per_device_train_batch_size": count, "rows": count, "steps": 3}
    cases = {"one shot": (plain, 1), "one shot, the seed's objective": ({**plain, "config": SEED}, 1)}
    for chunk in options.chunks:
        cases[f"full, chunks of {chunk}"] = ({**full(count, chunk), "steps": 3}, 1)
    table(f"{count} images as one graph", cases, options.rounds, "one shot")
    chunk = options.chunks[0]
    cases = {f"N = {size}": (full(size, chunk), 1) for size in options.sizes}
    table(f"All images as one graph, chunks of {chunk}", cases, 1)


def process_table(options) -> None:
    """The same global batch on one process and on two, which share the cores."""
    cases = {}
    for name, scope in {
        "batch of 64": {"images": 256, "rows": 64, "per_device_train_batch_size": 64},
        "full, N = 512": {"images": 512, "graph_scope": "full", "per_device_train_batch_size": 64},
    }.items():
        cases[f"{name}, 1 process"] = ({**scope, "steps": 3}, 1)
        half = {**scope, "steps": 3, "per_device_train_batch_size": scope["per_device_train_batch_size"] // 2}
        cases[f"{name}, 2 processes"] = (half, 2)
    two = {"images": 512, "graph_scope": "full", "per_device_train_batch_size": 32, "steps": 3}
    cases["full, N = 512, 2 processes, rows"] = ({**two, "ranking_shards": "rows"}, 2)
    cases["full, N = 512, 2 processes, ring"] = ({**two, "ranking_shards": "ring"}, 2)
    table("One process and two, on the same cores", cases, options.rounds)


def prefix_table(options) -> None:
    """The last 3 of 12 blocks train: with the output of the first 9 from disk, and without."""
    scopes = {
        "batch of 64": {"images": 256, "per_device_train_batch_size": 64, "rows": 64, "steps": 6},
        "full, N = 256": {"images": 256, "per_device_train_batch_size": 64, "graph_scope": "full", "steps": 3},
    }
    for name, scope in scopes.items():
        common = {**scope, "trainable_blocks": 3, "encoded": True}
        cases = {name: (common, 1), f"{name}, prefix cached": ({**common, "prefix_cache": "prefix"}, 1)}
        table("The last 3 of 12 blocks train", cases, options.rounds, name)


def peer_table(options) -> None:
    """N = 512 images as one graph, and the usual pipeline on frozen features."""
    full = {"images": 512, "graph_scope": "full", "per_device_train_batch_size": 64, "steps": 3}
    cases = {
        "frozen features, PyG GCN": ({"images": 512, "kind": "pyg", "rows": 512}, 1),
        "full, last 3 blocks": ({**full, "trainable_blocks": 3}, 1),
        "full": (full, 1),
    }
    table("The usual pipeline beside it", cases, options.rounds)


SEED = {
    "ranking_normalization": "all",
    "ranking_exclude_self": False,
    "graph_normalization": "symmetric",
    "head_loss_weight": 1.0,
    "propagation_loss_weight": 0.0,
    "consistency_loss_weight": 0.0,
    "propagation_consistency_loss_weight": 0.0,
}
TABLES = {
    "step": step_table,
    "full": full_table,
    "prefix": prefix_table,
    "processes": process_table,
    "peers": peer_table,
}


def main() -> None:
    """Print the tables asked for, or measure one case for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = {name: value for name, value in json.loads(options.case).items() if name != "rows"}
        result = run_frozen_pyg(case) if case.get("kind") == "pyg" else run(case)
        if result:  # of several processes the first one reports
            print("RESULT " + json.dumps(result), flush=True)
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.get_num_interop_threads()} between ops"
    )
    for name in options.tables:
        TABLES[name](options)


if __name__ == "__main__":
    main()
