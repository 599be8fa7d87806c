"""The gradient-flow report on three models that no loss curve tells apart, as one picture, and the temperature sweep.

    python benchmarks/gradient_flow.py --data FOLDER --backbone FOLDER_OR_HUB_NAME

The default; the same with edge weights that carry no gradient, as in code that builds its edges from indices; and
tau = 1 with each image among its own neighbours. Untrained heads, 256 images of which about half are labelled.
"""

import argparse
from pathlib import Path

import torch
from transformers import default_data_collator, set_seed

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.analysis.arms import ablate
from modeling_bpgcn.analysis.gradient_flow import gradient_flow
from modeling_bpgcn.analysis.gradient_flow_plot import plot_gradient_flow, plot_temperature_sweep
from modeling_bpgcn.analysis.temperature_sweep import temperature_sweep
from modeling_bpgcn.training.building import build_processor
from modeling_bpgcn.training.data import DataArguments, load_image_data
from modeling_bpgcn.training.images import image_transform

CASES = {
    "default": ("full", {}),
    "detached weights": ("detached", {}),
    "tau = 1, self in the softmax": ("full", {"ranking_temperature": 1.0, "ranking_exclude_self": False}),
}


def main() -> None:
    """Measure, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with one sub-folder of images a class")
    parser.add_argument("--backbone", required=True, help="pretrained backbone: a folder or a Hub name")
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--labels_per_class", type=int, default=8)
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("runs/gradient_flow"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.backbone_revision = options.backbone_config = None

    data = load_image_data(
        DataArguments(options.data, labels_per_class=options.labels_per_class, max_images=options.num_images)
    )
    processor, _ = build_processor(options, options.image_size)
    rows = data.train.with_transform(image_transform(processor))
    batch = default_data_collator([rows[i] for i in range(len(rows))])

    flows = {}
    for name, (arm, config) in CASES.items():
        set_seed(0)
        model = BPGCNForImageClassification.from_backbone_pretrained(
            options.backbone, num_labels=len(data.label_names), **config
        )
        flows[name] = gradient_flow(ablate(model, arm), batch)
        print(f"{name}\n{flows[name].table()}\n")
        if name == "default":
            sweep = temperature_sweep(model, batch, torch.logspace(-4.5, 1.5, 25).tolist())
            plot_temperature_sweep(sweep, options.output / "temperature_sweep.png")
    plot_gradient_flow(flows, options.output / "gradient_flow.png")
    print(f"Pictures in {options.output}")


if __name__ == "__main__":
    main()
