"""Influence: does removing the support images that the analysis names change an answer more than removing others?

    python benchmarks/influence.py                                     # scikit-learn's digits, offline
    python benchmarks/influence.py --data FOLDER --backbone FOLDER     # a sub-folder per class; the recipe of flowers17
    python benchmarks/influence.py --model runs/flowers17              # a run that is there: its recipe and its bank

Five support images are removed for each query, the bank is rebuilt without them, and the class that was answered is
asked again: how far its log-probability moved, and whether another class now wins. Differences are paired by query,
with a 95 % bootstrap interval. `in turn` removes one image, rebuilds, and asks again for the most influential.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.analysis.bootstrap import paired_bootstrap
from modeling_bpgcn.analysis.influence import label_influence, removal_influence
from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.building import build_model, build_processor
from modeling_bpgcn.training.callbacks import CurvesCallback
from modeling_bpgcn.training.data import load_image_data
from modeling_bpgcn.training.images import image_transform
from modeling_bpgcn.training.run_folder import RECIPE_FILE
from modeling_bpgcn.training.trainer import BPGCNTrainer

ROOT = Path(__file__).parents[1]
DRAWS = 4  # of each random choice per query, whose mean stands for it
REFERENCE = "random neighbors"


class Bench:
    """Queries, their answers, and what becomes of these without some support images."""

    def __init__(self, model: BPGCNForImageClassification, features: Tensor, ids: Tensor):
        self.model, self.features, self.ids = model, features, ids
        bank = model.support_bank
        self.rows = bank.features, bank.classes, bank.ids
        model.set_support_bank(*self.rows)  # what is compared is rebuilt, too
        with torch.no_grad():
            answers = model(features=features, node_ids=ids)
        self.neighbors, self.weights = answers.neighbor_indices, answers.neighbor_weights
        self.log_probability, self.classes = answers.logits.max(-1)

    def remove(self, gone: Tensor) -> Tensor:
        """Rebuild the bank without some rows; the rows that are left."""
        kept = torch.ones(len(self.rows[0]), dtype=torch.bool)
        kept[gone] = False
        self.model.set_support_bank(*(part[kept] for part in self.rows))
        return kept.nonzero()[:, 0]

    @torch.no_grad()
    def changes(self, gone: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Change of log p_c of some queries when rows are gone, and whether another class wins."""
        self.remove(gone)
        logits = self.model(features=self.features[queries], node_ids=self.ids[queries]).logits
        changed = logits.gather(1, self.classes[queries, None])[:, 0] - self.log_probability[queries]
        return changed, logits.argmax(-1) != self.classes[queries]

    def scores(self, query: int) -> Tensor:
        """`removal_influence` [M] on the bank as it stands."""
        one = slice(query, query + 1)
        options = {"features": self.features[one], "node_ids": self.ids[one], "class_index": self.classes[one]}
        return removal_influence(self.model, **options)[0]

    def pick_in_turn(self, query: int, count: int) -> Tensor:
        """The most influential image, then the most influential of a bank without it, and so on."""
        gone = torch.empty(0, dtype=torch.long)
        for _ in range(count):
            left = self.remove(gone)
            gone = torch.cat([gone, left[self.scores(query).argmin()][None]])
        return gone


def trained_model(arguments: tuple, data, processor) -> BPGCNForImageClassification:
    """Train a recipe, without its baselines and checkpoints, and fill the bank."""
    training = arguments[2]
    transform = image_transform(processor)
    trainer = BPGCNTrainer(
        build_model(arguments[0], training, data.label_names),
        training,
        train_dataset=data.train.with_transform(image_transform(processor, arguments[1].augmentation)),
        support_dataset=data.train.with_transform(transform),
        processing_class=processor,
    )
    trainer.remove_callback(CurvesCallback)
    trainer.train()
    trainer.build_support_bank()
    return trainer.bpgcn


def prepare(options) -> Bench:
    """The model, trained or loaded, with its bank, and the features of some test images."""
    recipe = ROOT / "configuration" / ("flowers17.yaml" if options.data else "digits.yaml")
    recipe = Path(options.model) / RECIPE_FILE if options.model else Path(options.recipe or recipe)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "dataset": options.data}
        settings |= {"backbone": options.backbone, "max_steps": options.steps}
        given = [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]
        arguments = parse_arguments([str(recipe), *given])
        set_seed(arguments[2].seed)
        processor, patch_size = build_processor(arguments[0], arguments[1].image_size)
        data = load_image_data(arguments[1], minimum_size=patch_size)
        if options.model:
            model = BPGCNForImageClassification.from_pretrained(options.model)
        else:
            model = trained_model(arguments, data, processor)
    model = model.eval().cpu()
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: options.queries].tolist()
    test = data.test.with_transform(image_transform(processor))
    images = [test[row] for row in rows]
    with torch.no_grad():
        parts = (images[start : start + 64] for start in range(0, len(images), 64))
        features = [model.get_image_features(torch.stack([row["pixel_values"] for row in part])) for part in parts]
    bench = Bench(model, torch.cat(features), torch.tensor([row["node_ids"] for row in images]))
    labels = torch.tensor([row["labels"] for row in images])
    classes = bench.rows[1]
    print(
        f"{Path(arguments[1].dataset).name}: {len(labels)} queries, {len(classes)} support images of which"
        f" {int((classes >= 0).sum())} labelled, k = {bench.neighbors.shape[1]}, accuracy"
        f" {(bench.classes == labels).float().mean():.3f}, median p {bench.log_probability.exp().median():.3f}"
    )
    return bench


def choices(bench: Bench, count: int) -> tuple[dict[str, Callable[[int], Tensor]], Tensor]:
    """How to choose the images to remove for a query, and the scores [Q, M] of single removals."""
    asked = {"features": bench.features, "node_ids": bench.ids}
    scores = removal_influence(bench.model, **asked, class_index=bench.classes)
    labels = label_influence(bench.model, **asked) * (bench.rows[1] == bench.classes[:, None])
    draw = torch.Generator().manual_seed(0)
    ways = {
        "most influential, in turn": lambda i: bench.pick_in_turn(i, count),
        "most influential": lambda i: scores[i].argsort()[:count],
        "most influential neighbors": lambda i: bench.neighbors[i, scores[i, bench.neighbors[i]].argsort()[:count]],
        "largest label coefficients": lambda i: labels[i].argsort(descending=True)[:count],
        "heaviest neighbors": lambda i: bench.neighbors[i, :count],
        REFERENCE: lambda i: bench.neighbors[i, torch.randperm(bench.neighbors.shape[1], generator=draw)[:count]],
        "random support images": lambda i: torch.randperm(len(bench.rows[0]), generator=draw)[:count],
    }
    return ways, scores


def measure(bench: Bench, way: str, pick: Callable[[int], Tensor]) -> Tensor:
    """|change of log p_c| and share of flips of each query [2, Q]."""
    rows = []
    for i in range(len(bench.classes)):
        draws = [bench.changes(pick(i), torch.tensor([i])) for _ in range(DRAWS if way.startswith("random") else 1)]
        changed, flipped = (torch.cat(part).float() for part in zip(*draws, strict=True))
        rows.append(torch.stack([changed.abs().mean(), flipped.mean()]))
    return torch.stack(rows, dim=1)


def interval(difference: Tensor) -> str:
    """Mean of paired differences [Q] and its 95 % bootstrap interval."""
    found = paired_bootstrap([difference.numpy()], folds=[0], seeds=[0])
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of two vectors."""
    return torch.corrcoef(torch.stack([part.argsort().argsort().double() for part in (first, second)]))[0, 1].item()


def single_removals(bench: Bench, scores: Tensor) -> None:
    """Print how predicted and real changes rank when one neighbor is removed, for all neighbors of all queries."""
    real = torch.zeros_like(scores)
    for image in bench.neighbors.unique():
        readers = (bench.neighbors == image).any(-1).nonzero()[:, 0]
        real[readers, image] = bench.changes(image, readers)[0]
    real, predicted = real.gather(1, bench.neighbors), scores.gather(1, bench.neighbors)  # [Q, k]
    for name, guess in {"influence": predicted, "- weight": -bench.weights}.items():
        within = sum(map(rank_correlation, guess, real)) / len(real)
        pooled = rank_correlation(guess.flatten(), real.flatten())
        print(f"One neighbor removed: rank correlation with {name} {pooled:.2f}, within a query {within:.2f}")


def main() -> None:
    """Print one table and the rank correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="default: configuration/flowers17.yaml with --data, else digits.yaml")
    parser.add_argument("--data", help="folder of images, one sub-folder a class")
    parser.add_argument("--backbone", help="pretrained backbone: a folder or a Hub name")
    parser.add_argument("--model", help="folder of a run: its recipe, weights and bank are taken")
    parser.add_argument("--steps", type=int, help="train so many steps instead of the recipe's")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--count", type=int, default=5, help="images to remove for a query")
    options = parser.parse_args()
    logging.set_verbosity_error()
    bench = prepare(options)
    ways, scores = choices(bench, options.count)
    found = {way: measure(bench, way, pick) for way, pick in ways.items()}
    width = max(map(len, found))
    print(
        f"\n| {options.count} removed {'':{width - 10}}| mean abs. change of log p | flipped | more than {REFERENCE} |"
    )
    print("| --- | ---: | ---: | ---: |")
    for way, (change, flipped) in found.items():
        more = "-" if way == REFERENCE else interval(change - found[REFERENCE][0])
        print(f"| {way:{width}} | {change.mean():.4f} | {100 * flipped.mean():.1f} % | {more} |", flush=True)
    print()
    single_removals(bench, scores)


if __name__ == "__main__":
    main()
