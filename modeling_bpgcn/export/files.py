"""Exported models as files, with what their users need to know in the metadata, and how they are run again."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ..modeling_bpgcn import BPGCNForImageClassification
from .program import export_program

INSTALL = "pip install 'bpgcn[onnx]'"
METADATA_FILE = "metadata.json"
LARGEST_SINGLE_FILE = 2**31 - 2**27  # protobuf ends at 2 GiB, and the graph needs room too
Runner = Callable[[Tensor], dict[str, Tensor]]


def export_onnx(
    model: BPGCNForImageClassification,
    path: str | os.PathLike,
    image_size: int | tuple[int, int],
    *,
    bank: str = "constant",
    image_processor: BaseImageProcessor | None = None,
    opset: int | None = None,
) -> Path:
    """Write the answer of `export_program` as an ONNX file, and return its path.

    The inputs are `pixel_values` [batch, channels, height, width] float32 and, with `bank="input"`, those of
    `bank_inputs`; the outputs `logits`, `neighbor_indices` and `neighbor_weights`. Of support images of equal
    similarity the first are taken, as in the model. Weights of more than 2 GB lie in `path` + ".data".

    Args:
        model, image_size, bank: as in `export_program`.
        image_processor: whose settings go into the file's metadata, beside `class_names` and the others of `metadata`.
        opset: version of ONNX's operators, torch's recommendation unless given.

    Raises:
        ImportError: without onnx and onnxscript.
        ValueError, TypeError: as in `export_program`.
    """
    require("onnx", "onnxscript")
    program, path = export_program(model, image_size, bank=bank), Path(path)
    names = ["logits", "neighbor_indices", "neighbor_weights"]
    with _quiet():
        onnx = torch.onnx.export(
            program,
            output_names=names,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    onnx.model.metadata_props.update(metadata(model, bank, image_processor))
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx.save(path, external_data=weights > LARGEST_SINGLE_FILE)
    return path


def save_program(
    model: BPGCNForImageClassification,
    path: str | os.PathLike,
    image_size: int | tuple[int, int],
    *,
    bank: str = "constant",
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    """Write the program of `export_program` as a .pt2 file for `torch.export.load`, and return its path.

    The metadata are the extra file `metadata.json`: `torch.export.load(path, extra_files={"metadata.json": ""})` fills
    it in. The program runs where the model was while it was exported, on the CPU or a GPU.

    The graph in such a file is JSON and its weights are bytes, but `torch.export.load` (torch 2.13) unpickles whatever
    an archive marks as pickled: load files of people you trust alone. An ONNX file holds no code of Python.

    Raises:
        ValueError, TypeError: as in `export_program`.
    """
    program, path = export_program(model, image_size, bank=bank), Path(path)
    extra = {METADATA_FILE: json.dumps(metadata(model, bank, image_processor))}
    torch.export.save(program, path, extra_files=extra)
    return path


def metadata(
    model: BPGCNForImageClassification, bank: str, image_processor: BaseImageProcessor | None = None
) -> dict[str, str]:
    """`model_type`, `bank` (constant or input) and, as JSON, `class_names` in the order of the logits,
    `image_processor` (the settings that make pixel values of an image) and `bank_fingerprint` (what made the features
    of the bank)."""
    names = model.config.id2label
    about = {
        "model_type": model.config.model_type,
        "bank": bank,
        "class_names": json.dumps([str(names[number]) for number in range(model.config.num_labels)]),
    }
    if image_processor is not None:
        about["image_processor"] = json.dumps(json.loads(image_processor.to_json_string()))
    if bank == "constant" and model.support_bank.fingerprint is not None:
        about["bank_fingerprint"] = json.dumps(model.support_bank.fingerprint)
    return about


def run_file(
    path: str | os.PathLike, support: dict[str, Tensor] | None = None, num_threads: int | None = None
) -> Runner:
    """A function that answers pixel values [B, channels, height, width] by an exported file: by onnxruntime on the CPU
    (.onnx) or by torch (.pt2). `support` are the inputs of the bank where it is one, `num_threads` are onnxruntime's.

    Raises:
        ImportError: without onnxruntime, for an ONNX file.
    """
    support = support or {}
    if Path(path).suffix == ".onnx":
        require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0  # 0: as many as there are cores
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        rows = {name: value.cpu().numpy() for name, value in support.items()}

        def run(pixel_values: Tensor) -> dict[str, Tensor]:
            outputs = session.run(names, {"pixel_values": pixel_values.cpu().numpy()} | rows)
            return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}

        return run
    module = torch.export.load(path).module()
    return torch.inference_mode()(lambda pixel_values: module(pixel_values, **support))


def _stable_sort(x, stable=True, dim=-1, descending=False):
    """`torch.sort`, for which torch 2.13 has no ONNX: TopK takes the first of equals, of which its definition is."""
    from onnxscript import opset18 as op

    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending))


def require(*packages: str) -> None:
    """Raise an ImportError that says how to install the first of the packages that is missing."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(f"ONNX files need {package}: {INSTALL}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch 2.13's exporter says of itself: that torchvision is not there, and a name it has outlived."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
