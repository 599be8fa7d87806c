"""A model as an ONNX file or a program of torch.export, with its support bank, checked against the model itself."""

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch import Tensor
from transformers import BaseImageProcessor

# safetensors, by way of the package that depends on it
from transformers.modeling_utils import safe_save_file

from ..bank_file import FILE_NAME
from ..export import BANKS, Agreement, bank_inputs, compare, export_onnx, run_file, save_program
from ..export.agreement import TOLERANCE
from ..export.files import require
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.images import build_image_processor, check_image_size, output_size
from .image_files import ImageReader, find_images
from .model_options import add_model_options, at_least, load_model, reader_options
from .support_files import read_support_files, write_support_files

MODEL_FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
SYNTHETIC_IMAGES = 8
MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    """Export, compare the answers, and print what was written.

    Raises:
        SystemExit: 1 where the file does not answer as the model does, or after naming images of --check that could not
            be read; 2 after saying what is wrong with the options or the model, or which package is missing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    path = folder / MODEL_FILES[options.format]
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not options.overwrite:
            raise ValueError(f"--output {folder} is not an empty folder: name another, or pass --overwrite.")
        if options.opset is not None and options.format != "onnx":
            raise ValueError(f"--opset {options.opset} is of ONNX files: leave it out, or pass --format onnx.")
        if options.format == "onnx":
            require("onnx", "onnxscript", "onnxruntime")
        model, processor = load_model(options)
        processor = _write_processor(folder, options.image_size, processor, model)
        image_size, about = output_size(processor), {"bank": options.bank, "image_processor": processor}
        if options.format == "onnx":
            export_onnx(model, path, image_size, opset=options.opset, **about)
        else:
            save_program(model, path, image_size, **about)
        support = bank_inputs(model) if options.bank == "input" else {}
        files = [path, *_write_beside(folder, options, model, support)]
        run = run_file(path, support)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    paths = [file.path for file in find_images(options.check)]
    rows = [{"path": path, "bytes": None} for path in paths]
    reader = ImageReader(rows, paths, processor, model.device, **reader_options(options))
    images = _read(reader) if paths else _synthetic(model, image_size)
    if images is not None:
        agreement = compare(model, run, images, options.batch_size)
        print(_table(files, agreement, "given" if paths else "synthetic"))
        if not agreement.agrees:
            raise SystemExit(1)
    reader.finish()


def _parser() -> ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_bpgcn export", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--output", metavar="FOLDER", required=True, help="Where the files are written.")
    parser.add_argument("--overwrite", action="store_true", help="Write into a folder that is not empty.")
    parser.add_argument("--format", choices=tuple(MODEL_FILES), default="onnx", help="Default: onnx.")
    parser.add_argument(
        "--bank",
        choices=BANKS,
        default="constant",
        help="The support bank as a part of the model, or as inputs of it that each call gives, written to"
        f" {FILE_NAME}. Default: constant.",
    )
    parser.add_argument(
        "--image_size",
        type=at_least(1),
        metavar="N",
        help="Side of the images, whatever that of the bank's was. Default: that of the image processor.",
    )
    parser.add_argument("--opset", type=at_least(1), help="Version of ONNX's operators. Default: that of torch.")
    parser.add_argument(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGES",
        help=f"Folders or files to compare the answers on. Default: {SYNTHETIC_IMAGES} images of noise.",
    )
    return parser


def _write_processor(
    folder: Path, image_size: int | None, processor: BaseImageProcessor, model: BPGCNForImageClassification
) -> BaseImageProcessor:
    """Write the settings that images for the exported model are to be prepared with, and return their processor."""
    patch = getattr(model.config.backbone_config, "patch_size", 1)
    if image_size is not None:
        check_image_size(image_size, patch)
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    if image_size is not None:
        processor = build_image_processor(str(folder), image_size, patch)
        processor.save_pretrained(folder)
    return processor


def _write_beside(
    folder: Path, options: Namespace, model: BPGCNForImageClassification, support: dict[str, Tensor]
) -> list[Path]:
    """Write the configuration, the files of the support images and the bank where it is an input -> the bank's file."""
    model.config.to_json_file(folder / "config.json")  # `save_pretrained` would add code that nothing here runs
    write_support_files(folder, model, read_support_files(model, options.model, options.revision))
    if not support:
        return []
    path = folder / FILE_NAME
    safe_save_file({name: value.contiguous() for name, value in support.items()}, path)
    return [path]


def _read(reader: ImageReader) -> Tensor | None:
    """The pixel values [B, C, H, W] of all images that can be read."""
    batches = [batch.pixel_values for batch in reader if batch.rows]
    return torch.cat(batches) if batches else None


def _synthetic(model: BPGCNForImageClassification, image_size: tuple[int, int]) -> Tensor:
    """Noise around a colour of each image, [B, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    channels = model.config.backbone_config.num_channels
    colours = torch.randn(SYNTHETIC_IMAGES, channels, 1, 1, generator=generator)
    return (colours + torch.randn(SYNTHETIC_IMAGES, channels, *image_size, generator=generator)).to(model.device)


def _table(files: list[Path], agreement: Agreement, images: str) -> str:
    width = max(len(file.name) for file in files)
    lines = [f"{'file'.ljust(width)}  {'MiB':>8}  max |delta| of log-probabilities"]
    deltas = [f"{agreement.logits:.1e}"] + [""] * (len(files) - 1)
    for file, delta in zip(files, deltas, strict=True):
        lines.append(f"{file.name.ljust(width)}  {file.stat().st_size / MIB:>8.2f}  {delta}".rstrip())
    same = f"{agreement.same_class} of {agreement.images} {images} images get the model's class"
    lines += ["", f"{same}; allowed are {TOLERANCE:.0e} and neighbors that differ by rounding: {agreement.ties}"]
    if agreement.other_neighbors:
        lines.append(f"{agreement.other_neighbors} images have other neighbors than the model gives them")
    if not agreement.agrees:
        lines.append("The exported model does not answer as MODEL does.")
    return "\n".join(lines)
