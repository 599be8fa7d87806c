"""Where the gradient arrives in a model on a batch of images, and whether its ranking trains."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedConfig, default_data_collator

from ..analysis.gradient_flow import gradient_flow
from ..analysis.gradient_flow_plot import plot_gradient_flow, plot_temperature_sweep
from ..analysis.temperature_sweep import temperature_sweep
from ..configuration_bpgcn import BPGCNConfig
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.data import DataArguments, load_image_data
from ..training.images import build_image_processor, image_transform
from ..training.model_arguments import ModelArguments
from ..training.sampler import MixedBatchSampler

FLOW_PICTURE, SWEEP_PICTURE = "gradient_flow.png", "temperature_sweep.png"
TEMPERATURES = np.logspace(-4, 1, 31).tolist()
DATA_FIELDS = [f for f in dataclasses.fields(DataArguments) if f.name not in ("dataset", "augmentation")]
# what may differ from the checkpoint without new weights
CONFIG_FIELDS = [
    f
    for f in dataclasses.fields(ModelArguments)
    if f.name.startswith(("ranking_", "graph_", "propagation_"))
    or f.name.endswith("_loss_weight")
    or f.name in ("num_neighbors", "self_weight", "reveal_ratio")
]


def _option_group(name: str, title: str, entries: list) -> type:
    """A dataclass of (name, type, field), as the parser takes them, under a title of their own."""
    return dataclasses.make_dataclass(name, entries, namespace={"_argument_group_name": title})


def _like(entry: dataclasses.Field, default) -> dataclasses.Field:
    return dataclasses.field(default=default, metadata=entry.metadata)


DataOptions = _option_group(
    "DataOptions", "the images, as in training", [(f.name, f.type, _like(f, f.default)) for f in DATA_FIELDS]
)
ConfigOptions = _option_group(
    "ConfigOptions",
    "instead of the model's own config",
    [(f.name, f.type | None, _like(f, None)) for f in CONFIG_FIELDS],
)


def main(arguments: list[str] | None = None) -> None:
    """Print the gradient's way as a table and save its picture, with `--temperature_sweep` another.

    Raises:
        SystemExit: after saying what is wrong with the options, the model or the data.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        model, batch = load_model_and_batch(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    flow = gradient_flow(model, batch, seed=options.seed)
    labeled = int((batch["labels"] >= 0).sum())
    print(f"{options.model} on {len(batch['labels'])} images of {options.data}, {labeled} labeled\n\n{flow.table()}\n")
    folder = Path(options.output_dir)
    plot_gradient_flow({Path(options.model).name: flow}, folder / FLOW_PICTURE)
    print(f"saved {folder / FLOW_PICTURE}")
    if options.temperature_sweep:
        sweep = temperature_sweep(model, batch, TEMPERATURES, seed=options.seed)
        plot_temperature_sweep(sweep, folder / SWEEP_PICTURE)
        print(f"saved {folder / SWEEP_PICTURE}")


def _parser() -> HfArgumentParser:
    program = "python -m modeling_bpgcn inspect"
    usage = f"{program} MODEL DATA [--option value ...]"
    parser = HfArgumentParser((DataOptions, ConfigOptions), prog=program, usage=usage, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub name of a BPGCN model.")
    [data] = (f for f in dataclasses.fields(DataArguments) if f.name == "dataset")
    parser.add_argument("data", metavar="DATA", help=data.metadata["help"])
    parser.add_argument("--output_dir", default=".", help="Folder of the pictures.")
    parser.add_argument("--temperature_sweep", action="store_true", help="Also draw the gradient over the temperature.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images of the graph.")
    parser.add_argument(
        "--labeled_batch_fraction", type=float, help="Share of labeled images in it; as they come unless given."
    )
    parser.add_argument("--seed", type=int, default=0, help="Draws the images of the graph and the revealed labels.")
    return parser


def load_model_and_batch(options: Namespace) -> tuple[BPGCNForImageClassification, dict[str, Tensor]]:
    """The model on the best device, with the config that the options ask for, and the batch of images for it.

    Raises:
        OSError: there is no such model or data.
        ValueError: the model is none of BPGCN, or does not fit the data; or as `load_image_data`.
    """
    kind = PreTrainedConfig.get_config_dict(options.model)[0].get("model_type")
    if kind != BPGCNConfig.model_type:
        raise ValueError(
            f"MODEL {options.model} is of type {kind}, not bpgcn: name what train.py has saved, or give a backbone a"
            " head with BPGCNForImageClassification.from_backbone_pretrained(...).save_pretrained(FOLDER)."
        )
    changes = {f.name: getattr(options, f.name) for f in CONFIG_FIELDS}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = BPGCNConfig.from_pretrained(options.model, **changes)
    config.check()
    patch_size = getattr(config.backbone_config, "patch_size", 1)
    processor = build_image_processor(options.model, options.image_size, patch_size)
    data_options = {f.name: getattr(options, f.name) for f in DATA_FIELDS}
    data = load_image_data(DataArguments(dataset=options.data, **data_options), minimum_size=patch_size)
    if len(data.label_names) != config.num_labels:
        raise ValueError(
            f"MODEL {options.model} knows {config.num_labels} classes, but DATA {options.data} has"
            f" {len(data.label_names)}: name the data that the model was trained on."
        )
    sampler = MixedBatchSampler(
        data.train["label"][:], options.batch_size, options.labeled_batch_fraction, seed=options.seed
    )
    rows = data.train.with_transform(image_transform(processor)).__getitems__(next(iter(sampler)))
    model = BPGCNForImageClassification.from_pretrained(options.model, config=config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), default_data_collator(rows)
