"""What a run leaves behind for people: a table, pictures, a model card and what to try next."""

import json
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from ..analysis.plots import QueryNeighbors, plot_neighbors
from .data import DataArguments, ImageData
from .images import to_rgb
from .model_card import write_model_card
from .run_folder import RECIPE_FILE
from .thumbnails import open_thumbnail, write_thumbnails
from .trainer import BPGCNTrainer

COLUMNS = {
    "accuracy": ("accuracy", 100),
    "macro_f1": ("macro-F1", 100),
    "ece": ("ECE", 100),
    "neighbor_homophily": ("homophily", 100),
}
NUM_PICTURED = 6
MAX_THUMBNAILS = 10_000  # support images; of more, some 5 kB each, no pictures are kept


def own_results(metrics: dict[str, float], prefix: str = "test_") -> list[dict]:
    """Rows for what the model answers: from the bank, and transductively where that was asked for."""
    kinds = {"": "BPGCN, from the support bank", "transductive_": "BPGCN, transductive"}
    rows = []
    for kind, method in kinds.items():
        if f"{prefix}{kind}accuracy" in metrics:
            values = {name: metrics[f"{prefix}{kind}{name}"] for name in COLUMNS if f"{prefix}{kind}{name}" in metrics}
            rows.append({"method": method, **values})
    return rows


def format_table(results: list[dict]) -> str:
    """Results as a table for the terminal, in percent."""
    names = [name for name in COLUMNS if any(name in row for row in results)]
    lines = [["", *(COLUMNS[name][0] for name in names)]]
    for row in results:
        cells = (f"{row[name] * COLUMNS[name][1]:.1f}" if name in row else "-" for name in names)
        lines.append([row["method"], *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


@torch.no_grad()
def draw_neighbors(trainer: BPGCNTrainer, data: ImageData, transform, path: Path) -> None:
    """A picture of test images beside the support images that their answers rest on: wrong answers first, as they tell
    more, then one of each class."""
    model, bank = trainer.bpgcn.eval(), trainer.bpgcn.support_bank
    rows = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0)).tolist()[:128]
    queries = data.test.with_transform(transform)
    batch = trainer.data_collator([queries[row] for row in rows])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    answers = model(pixel_values=batch["pixel_values"], node_ids=batch["node_ids"])
    picked = _pick(answers.logits.argmax(-1), batch["labels"])
    place = {node: row for row, node in enumerate(data.train["node_id"])}
    drawn = []
    for i in picked:
        neighbors = answers.neighbor_indices[i].tolist()
        images = [data.train[place[int(bank.ids[n])]]["image"] for n in neighbors]
        answer = int(answers.logits[i].argmax())
        drawn.append(
            QueryNeighbors(
                image=to_rgb(data.test[rows[i]]["image"]),
                label=int(batch["labels"][i]),
                prediction=answer,
                probability=float(answers.logits[i, answer].exp()),
                neighbor_images=[to_rgb(image) for image in images],
                neighbor_classes=[int(bank.classes[n]) for n in neighbors],
                neighbor_weights=answers.neighbor_weights[i].tolist(),
            )
        )
    plot_neighbors(drawn, path, data.label_names)


def _pick(answers: Tensor, labels: Tensor) -> list[int]:
    wrong = (answers != labels).nonzero()[:, 0].tolist()[: NUM_PICTURED // 3]
    seen, right = set(), []
    for i in (answers == labels).nonzero()[:, 0].tolist():
        if int(labels[i]) not in seen:
            seen.add(int(labels[i]))
            right.append(i)
    return (wrong + right)[:NUM_PICTURED]


def keep_thumbnails(ids: list[int], data: ImageData, folder: Path) -> None:
    """Write thumbnails of the support images of these ids beside the model, unless they are more than
    `MAX_THUMBNAILS`."""
    if len(ids) > MAX_THUMBNAILS:
        return
    files = data.train.with_format("arrow")  # encoded
    place = {node: row for row, node in enumerate(data.train["node_id"])}
    write_thumbnails(folder, ids, (open_thumbnail(files[place[id_]]["image"][0].as_py()) for id_ in ids))


def write_report(
    trainer: BPGCNTrainer,
    data: ImageData,
    data_arguments: DataArguments,
    results: list[dict],
    transform,
    settings: dict,
    backbone: str | None,
) -> None:
    """Write results.json, neighbors.png, thumbnails, an example image and the model card, and print the table and what
    is next."""
    folder = Path(trainer.args.output_dir)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    draw_neighbors(trainer, data, transform, folder / "neighbors.png")
    keep_thumbnails(trainer.bpgcn.support_bank.ids.tolist(), data, folder)
    to_rgb(data.test[0]["image"]).save(folder / "example.png")
    labeled = sum(label >= 0 for label in data.train["label"])
    graph = (
        "they are also the unlabelled nodes of the training graph" if data.test_in_graph else "never seen in training"
    )
    dataset = data_arguments.dataset
    local = dataset == "digits" or Path(dataset).expanduser().exists()
    facts = {
        "name": Path(dataset).name if local else dataset,
        "id": None if local else dataset,
        "split": data_arguments.test_split or (data_arguments.train_split if data.test_in_graph else None),
        "protocol": f"{len(data.test)} test images, {graph}; {labeled} of {len(data.train)} training images labelled.",
        "split for training": data_arguments.train_split,
        "training images": len(data.train),
        "of these labelled": f"{labeled} ({100 * labeled / len(data.train):.3g} %)",
        "validation images": None if data.validation is None else len(data.validation),
        "test images": len(data.test),
        "seed of the splits": data_arguments.split_seed,
    }
    pictures = {"Training curves": "training_curves.png", "Test images and their neighbours": "neighbors.png"}
    write_model_card(
        folder / "README.md",
        model_name=trainer.hub_model_id or trainer.args.hub_model_id or str(folder),
        label_names=data.label_names,
        data=facts,
        results=sorted(results, key=lambda row: bool(row.get("baseline"))),
        settings=settings,
        pictures={caption: name for caption, name in pictures.items() if (folder / name).is_file()},
        base_model=None if backbone is None or Path(backbone).exists() else backbone,
    )
    print(f"\n{format_table(results)}\n\n{facts['protocol']}\n\n{_what_next(folder, data_arguments)}", flush=True)


def _what_next(folder: Path, data_arguments: DataArguments) -> str:
    model, image = repr(str(folder)), repr(str(folder / "example.png"))
    call = f"print(pipeline('image-classification', {model})({image}))"
    ask = f"import modeling_bpgcn; from transformers import pipeline; {call}"
    recipe, fewer_folder = folder / RECIPE_FILE, folder.with_name(f"{folder.name}-fewer-labels")
    if data_arguments.labeled_fraction is not None:
        fewer = f"--labeled_fraction {data_arguments.labeled_fraction / 2:g}"
    else:
        fewer = f"--labels_per_class {max(1, (data_arguments.labels_per_class or 10) // 2)}"
    return f"""\
Model            {folder}
Training curves  {folder / "training_curves.png"}
Neighbours       {folder / "neighbors.png"}
Model card       {folder / "README.md"}

Next:
  classify an image
    .venv/bin/python -c {_quoted(ask)}
  drop images on it in a browser, and see what its answers rest on
    .venv/bin/python -m modeling_bpgcn app {quote(str(folder))}
  train with fewer labels
    .venv/bin/accelerate launch train.py {quote(str(recipe))} {fewer} --output_dir {quote(str(fewer_folder))}
  look at the logs in a browser
    .venv/bin/tensorboard --logdir {quote(str(folder))}"""


def _quoted(code: str) -> str:
    # double quotes read better around code that has single ones, where the shell changes nothing inside them
    return quote(code) if any(character in code for character in '"$`\\!') else f'"{code}"'
