"""Prediction: images per second of `predict` on a folder of JPEGs, against the bare backbone on tensors in memory.

    python benchmarks/predict.py                     # 1000 images of 224 pixels, some minutes on 2 cores
    python benchmarks/predict.py --images 64 --rounds 1 --depth 2

The model is a DINOv2 of ViT-S/14's size with random weights, a GCN head and a bank of 1000 images. The images are
photographs of noise, made here. `predict` counts from the first file that a worker opens to the last line written:
finding, decoding, preprocessing, backbone, search in the bank, head and JSON lines; not the loading of the model. Both
run in turn, some rounds of them, and the best counts; CPU time is that of all processes and cannot be hidden by cores
that idle.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn import BPGCNConfig, BPGCNForImageClassification
from modeling_bpgcn.commands.image_files import ImageReader, find_images
from modeling_bpgcn.commands.model_options import DEFAULT_WORKERS
from modeling_bpgcn.commands.predict import predict

CLASSES, WIDTH = 17, 384


def build_model(size: int, depth: int, bank: int) -> tuple[BPGCNForImageClassification, BitImageProcessorPil]:
    """ViT-S/14's size, in evaluation mode, and the image processor of DINOv2 for images of `size` pixels."""
    set_seed(0)
    backbone = Dinov2Config(
        hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=depth, patch_size=14, image_size=size
    )
    model = BPGCNForImageClassification(BPGCNConfig(backbone_config=backbone, num_labels=CLASSES)).eval()
    model.set_support_bank(torch.randn(bank, WIDTH), torch.randint(CLASSES, (bank,)))
    square = {"height": size, "width": size}
    return model, BitImageProcessorPil(size={"shortest_edge": size}, crop_size=square)


def write_photographs(folder: Path, count: int, size: int, broken: int) -> list[Path]:
    """JPEGs of coarse noise under fine noise, `broken` of them cut in half; the broken ones."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(pixels + random.integers(-16, 17, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=90)
    cut = [folder / f"{number:05}.jpg" for number in random.choice(count, broken, replace=False)]
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return cut


@torch.inference_mode()
def run_backbone(model: BPGCNForImageClassification, pixels: torch.Tensor, count: int, batch_size: int) -> None:
    """`count` images, which are the same batch again and again."""
    for start in range(0, count, batch_size):
        model.bpgcn.backbone(pixels[: min(batch_size, count - start)]).last_hidden_state[:, 0].cpu()


def run_predict(model, processor, folder: Path, options: argparse.Namespace) -> list[dict]:
    """What the command does after the model is loaded; the answers as they were written."""
    paths = [file.path for file in find_images([str(folder)])]
    reader = ImageReader(
        [{"path": path, "bytes": None} for path in paths],
        paths,
        processor,
        model.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        disable_tqdm=False,
    )
    with (folder.parent / "answers.jsonl").open("w") as output, contextlib.redirect_stderr(io.StringIO()):
        for answers in predict(model, reader, top_k=1, neighbors=3, files={}):
            output.writelines(f"{json.dumps(answer)}\n" for answer in answers)
            output.flush()
    return [json.loads(line) for line in (folder.parent / "answers.jsonl").read_text().splitlines()]


def measured(run: Callable) -> tuple[float, float, object]:
    """Seconds of the wall and of all processors, and what `run` returns."""
    before, start = os.times(), time.perf_counter()
    result = run()
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[:4]) - sum(before[:4]), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--broken", type=int, default=3)
    parser.add_argument("--size", type=int, default=224, help="side of the images, a multiple of 14")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the backbone")
    parser.add_argument("--bank", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=DEFAULT_WORKERS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    model, processor = build_model(options.size, options.depth, options.bank)
    model.to(options.device)
    readable = options.images - options.broken
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "photographs")
        folder.mkdir()
        broken = write_photographs(folder, options.images, options.size, options.broken)
        pixels = torch.randn(options.batch_size, 3, options.size, options.size, device=options.device)
        run_backbone(model, pixels, options.batch_size, options.batch_size)
        times = {"bare backbone": [], "predict": []}
        for _ in range(options.rounds):
            times["bare backbone"].append(
                measured(lambda: run_backbone(model, pixels, readable, options.batch_size))[:2]
            )
            *spent, answers = measured(lambda: run_predict(model, processor, folder, options))
            times["predict"].append(spent)
            named = {answer["file"] for answer in answers if "error" in answer}
            if len(answers) != options.images or named != set(map(str, broken)):
                raise SystemExit(f"{len(answers)} answers, and {sorted(named)} named instead of {sorted(broken)}")

    print(f"{options.images} JPEGs of {options.size} pixels, {options.broken} of them broken and named; batches of")
    print(f"{options.batch_size}, {options.num_workers} workers, {torch.get_num_threads()} threads, {options.device};")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n")
    best = {name: (min(wall for wall, _ in runs), min(cpu for _, cpu in runs)) for name, runs in times.items()}
    print(f"{'':<14}{'seconds':>9}{'images/s':>10}{'throughput':>12}{'CPU s':>8}{'of CPU':>8}")
    bare = best["bare backbone"]
    for name, (wall, cpu) in best.items():
        print(f"{name:<14}{wall:>9.1f}{readable / wall:>10.1f}{bare[0] / wall:>12.3f}{cpu:>8.1f}{bare[1] / cpu:>8.3f}")


if __name__ == "__main__":
    main()
