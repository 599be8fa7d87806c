"""Exported models against PyTorch: agreement of the answers, latency, and the size of the files.

    python benchmarks/export.py --model MODEL --data IMAGES      # some minutes on 2 cores

MODEL is a folder or Hub name of a trained model, IMAGES a folder with one sub-folder of images per class (or a data set
on the Hub), of which images spread over the test split are taken. Each file answers all of them, in batches of 16, and
is compared with the model. Latency is that of one call on tensors in memory, on one thread, as a share of the model's
own: medians of rounds in which all contenders take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn.commands.evaluate import load_labeled_images
from modeling_bpgcn.commands.image_files import ImageReader
from modeling_bpgcn.commands.model_options import load_model
from modeling_bpgcn.export import bank_inputs, compare, export_onnx, save_program
from modeling_bpgcn.export.files import run_file

# name: (how it is exported, the file's suffix, the bank)
CONTENDERS = {
    "onnx, constant bank": (export_onnx, ".onnx", "constant"),
    "onnx, bank as input": (export_onnx, ".onnx", "input"),
    "torch_export, constant bank": (save_program, ".pt2", "constant"),
    "torch_export, bank as input": (save_program, ".pt2", "input"),
}
BATCH_SIZES = (1, 16)


def read_pixels(options: argparse.Namespace, model, processor) -> Tensor:
    """Pixel values [B, C, H, W] of images spread over the test split."""
    data = load_labeled_images(options, model)
    step = max(1, len(data.files) // options.images)
    files, names = data.files[::step][: options.images], data.names[::step][: options.images]
    reader = ImageReader(files, names, processor, model.device, batch_size=16, num_workers=0, disable_tqdm=True)
    return torch.cat([batch.pixel_values for batch in reader])


def latencies(runs: dict[str, Callable[[Tensor], object]], pixels: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a call, after one to warm up."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(pixels)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", help="default: test, else validation, else the only one")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.set_defaults(revision=None, device="cpu", dataset_config=None, image_column=None, label_column=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(options)
    pixels = read_pixels(options, model, processor)
    runs = {"model": torch.inference_mode()(lambda pixel_values: model(pixel_values=pixel_values))}
    agreement, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (export, suffix, bank) in CONTENDERS.items():
            path = export(model, Path(folder, name).with_suffix(suffix), tuple(pixels.shape[-2:]), bank=bank)
            runs[name] = run_file(path, bank_inputs(model) if bank == "input" else None, num_threads=1)
            agreement[name] = compare(model, runs[name], pixels, batch_size=16)
            sizes[name] = path.stat().st_size / 2**20
        times = {size: latencies(runs, pixels[:size], options.rounds) for size in BATCH_SIZES}

    print(f"{len(pixels)} images of {tuple(pixels.shape[-2:])} pixels, {model.support_bank.size} support images, one")
    print(f"thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}\n")
    print("| | max abs difference of log-probabilities | same class | ties | other neighbors", end=" ")
    print("".join(f"| latency, batch {size} " for size in BATCH_SIZES) + "| MiB |")
    print("| --- " + "| ---: " * (5 + len(BATCH_SIZES)) + "|")
    for name, found in agreement.items():
        ratios = "".join(f"| {times[size][name] / times[size]['model']:.2f} " for size in BATCH_SIZES)
        counts = f"| {found.same_class} | {found.ties} | {found.other_neighbors} "
        print(f"| {name} | {found.logits:.1e} {counts}{ratios}| {sizes[name]:.1f} |")


if __name__ == "__main__":
    main()
