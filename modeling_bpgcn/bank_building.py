"""Support images to a support bank: embed a data set, row by row."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging


@torch.no_grad()
def embed_images(
    model: nn.Module,
    dataset: Iterable,
    *,
    image_processor=None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed every image of `dataset` with `model` in evaluation mode: features [N, D], classes [N] and ids [N], on the
    model's device. What `set_support_bank`, `add_support` and `evaluate_retrieval` take.

    Args:
        dataset: rows with `pixel_values` (and `labels`, `node_ids`), or a data set with an image column and an
            `image_processor`; a missing or -100 class is unknown, a missing id is the row's number.
        image_processor: makes `pixel_values` of a PIL image.
        progress: show a bar.

    Raises:
        ValueError: for no row at all, or rows without an image.
    """

    def rows(examples: list[dict]) -> dict[str, Tensor]:
        if "pixel_values" in examples[0]:
            pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in examples])
        elif image_processor is not None and image_column in examples[0]:
            images = [row[image_column].convert("RGB") for row in examples]
            pixels = image_processor(images, return_tensors="pt")["pixel_values"]
        else:
            raise ValueError(
                f"A support image needs 'pixel_values', or a column {image_column!r} and an image_processor; its"
                f" columns are {sorted(examples[0])}."
            )
        classes = [row.get("labels", row.get(label_column)) for row in examples]
        ids = [row.get("node_ids", -1) for row in examples]
        known = torch.tensor([-100 if c is None else int(c) for c in classes])
        return {"pixels": pixels, "classes": known, "ids": torch.tensor([int(i) for i in ids])}

    training = model.training
    model.eval()
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=rows)
    columns = {"features": [], "classes": [], "ids": []}
    for batch in logging.tqdm(loader, desc="Embedding the images", disable=not progress):
        columns["features"].append(model.get_image_features(batch["pixels"].to(model.device)))
        columns["classes"].append(batch["classes"])
        columns["ids"].append(batch["ids"])
    model.train(training)
    if not columns["features"]:
        raise ValueError("The support data set is empty: a bank needs at least one image.")
    features, classes, ids = (torch.cat(column) for column in columns.values())
    ids = torch.where(ids < 0, torch.arange(len(ids)), ids)
    return features, classes.to(features.device), ids.to(features.device)
