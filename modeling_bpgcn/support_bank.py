"""The support bank: what inductive answers stand on. One row per support image, stored in the checkpoint."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from .configuration_bpgcn import BPGCNConfig
from .heads import HEADS

BANK_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class SupportBank(nn.Module):
    """M support images as buffers of M rows; an empty bank has buffers too, of no row, so that a state says so.

    `features` [M, D]; `classes` [M] int64, -100 unknown; `ids` [M] int64; `degree` [M] in the support graph;
    `propagated` [M, C], the label distribution that a neighbour reads; `state_0` ... [M, ...], the rows that each
    propagation step of the head reads (the first is left out where it is the features).
    """

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.dtype = BANK_DTYPES[config.bank_dtype]
        head = HEADS.get(config.head)
        sizes = [] if head is None else head.state_sizes(config)
        self.shares_features = head is not None and head.first_state_is_features
        self.state_names = [f"state_{i}" for i in range(len(sizes) - self.shares_features)]
        widths = dict(zip(self.state_names, sizes[self.shares_features :], strict=True))
        self._shapes = {"features": (config.feature_size,), "propagated": (config.num_labels,), "degree": ()}
        self._shapes |= {"classes": (), "ids": ()} | {name: (width,) for name, width in widths.items()}
        for name in self._shapes:
            self.register_buffer(name, self._allocate(name, config.bank_size))

    @property
    def size(self) -> int:
        """M, 0 while empty. (peft's `modules_to_save` wrapper passes attributes on, but not `len`.)"""
        return self.features.shape[0]

    def __len__(self) -> int:
        return self.size

    def _allocate(self, name: str, size: int) -> Tensor:
        dtype = torch.long if name in ("classes", "ids") else self.dtype
        return torch.zeros(size, *self._shapes[name], dtype=dtype)

    @property
    def states(self) -> list[Tensor]:
        """The rows each propagation step of the head reads, in order."""
        shared = [self.features] if self.shares_features else []
        return shared + [getattr(self, name) for name in self.state_names]

    def fill(self, features: Tensor, classes: Tensor, ids: Tensor, degree: Tensor, propagated: Tensor, states: list):
        """Replace the bank's rows."""
        rows = {"features": features, "classes": classes, "ids": ids, "degree": degree, "propagated": propagated}
        rows |= dict(zip(self.state_names, states[self.shares_features :], strict=True))
        for name, value in rows.items():
            dtype = torch.long if name in ("classes", "ids") else self.dtype
            setattr(self, name, value.detach().to(dtype))

    def clear(self) -> None:
        """Drop every row, as a step of training makes them stale."""
        for name in self._shapes:
            setattr(self, name, getattr(self, name).new_empty(0, *self._shapes[name]))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # the checkpoint decides the size: a resumed run or a best model may hold another bank than this one, or none
        for name in self._shapes:
            stored, held = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == held.shape[1:]:
                setattr(self, name, held.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def join_bank(bank: SupportBank, features: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bank and a batch of queries [B, D] as one set of nodes: features, ids, classes, and the queries' rows [B].

    The bank's rows come first, then the queries that it does not hold; one that it holds by id takes its row there.
    """
    size = bank.size
    if size == 0:
        raise ValueError("support='transductive' needs a support bank: call model.build_support_bank(dataset, ...).")
    if ids is None:
        ids = bank.ids.max() + 1 + torch.arange(features.shape[0], device=features.device)
    order = bank.ids.argsort()
    place = torch.searchsorted(bank.ids[order], ids).clamp_max(size - 1)
    position = order[place]
    held = bank.ids[position] == ids
    rows = torch.where(held, position, size + (~held).cumsum(0) - 1)
    joined = bank.features.to(features.dtype).index_copy(0, position[held], features[held])
    classes = torch.cat([bank.classes, torch.full_like(ids[~held], -100)])
    return torch.cat([joined, features[~held]]), torch.cat([bank.ids, ids[~held]]), classes, rows


@torch.no_grad()
def build_support_bank(
    model: nn.Module,
    dataset: Iterable,
    *,
    image_processor=None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> None:
    """Embed every image of `dataset` with `model` and fill the model's bank with them.

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
    for batch in logging.tqdm(loader, desc="Building the support bank", disable=not progress):
        columns["features"].append(model.get_image_features(batch["pixels"].to(model.device)))
        columns["classes"].append(batch["classes"])
        columns["ids"].append(batch["ids"])
    model.train(training)
    if not columns["features"]:
        raise ValueError("The support data set is empty: a bank needs at least one image.")
    features, classes, ids = (torch.cat(column) for column in columns.values())
    ids = torch.where(ids < 0, torch.arange(len(ids)), ids)
    model.set_support_bank(features, classes.to(features.device), ids.to(features.device))
