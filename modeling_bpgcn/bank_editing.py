"""A model's support bank as its user handles it: fill, add, remove, relabel, merge, save and load, without training.

Every edit computes the graph of all rows anew, so that the bank is the one that would have been built from the edited
rows: M^2 D operations for M images of width D, a minute for 100,000 of width 384 on 2 cores.
"""

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from .bank_building import embed_images
from .bank_file import (
    backbone_fingerprint,
    check_fingerprint,
    processor_fingerprint,
    read_bank,
    states_digest,
    write_bank,
)
from .bank_ids import check_unique, find_rows, free_ids, held_ids, some, whole_numbers
from .label_embedding import run_head
from .objectives import check_classes, known_classes
from .support_bank import SupportBank

logger = logging.get_logger(__name__)


class SupportBankMixin:
    """The bank of `BPGCNForImageClassification`, whose ranking, graphs and head it is made with."""

    @property
    def support_bank(self) -> SupportBank:
        """What inductive answers stand on."""
        return self.bpgcn.support_bank

    def build_support_bank(self, dataset, *, image_processor=None, **options) -> None:
        """Embed the support images and store what answers read, see `bank_building.embed_images`."""
        rows = embed_images(self, dataset, image_processor=image_processor, **options)
        self.set_support_bank(*rows, image_processor=image_processor)

    def set_support_bank(
        self, features: Tensor, classes: Tensor, ids: Tensor | None = None, *, image_processor=None
    ) -> None:
        """Fill the bank from features [M, D] of this model's backbone and classes [M] (-100 unknown): one graph of all
        support images.

        Args:
            ids: [M] int64 names of the images, their row numbers unless given; images of one id are copies.
            image_processor: what made the pixels, so that the bank remembers it.
        """
        self._fill_bank(features, classes, ids, self._fingerprint(image_processor))

    def add_support(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        *,
        classes: Tensor | list[int] | int,
        ids: Tensor | list[int] | int | None = None,
        image_processor=None,
        ignore_mismatch: bool = False,
    ) -> Tensor:
        """Add images [n, channels, height, width], or their features [n, D], to the bank; returns their ids [n].

        Args:
            classes: [n], -100 where unknown.
            ids: [n], none of them in the bank; the next free ones unless given.
            image_processor: what made the pixels; settings other than those of the bank's images are an error.
            ignore_mismatch: add them even if another backbone or image processor made the bank.

        Raises:
            ValueError: for ids that are taken or given twice, unknown classes, features of another width, or a bank
                that another backbone or image processor made.
        """
        bank, features = self.support_bank, self._embed_rows(pixel_values, features)
        classes, ids = whole_numbers(classes, "classes", features), free_ids(ids, features, bank.ids)
        current = self._fingerprint(image_processor)
        if bank.size and not ignore_mismatch:
            check_fingerprint(bank.fingerprint, current, "The support bank")
        self._append_to_bank(features, classes, ids, current)
        return ids

    def remove_support(self, ids: Tensor | list[int] | int) -> None:
        """Take the images of these ids out of the bank, every copy of them; the last one leaves an empty bank.

        Raises:
            ValueError: for ids that the bank does not hold.
        """
        bank = self.support_bank
        kept = ~torch.isin(bank.ids, held_ids(ids, bank.ids))
        self._fill_bank(self._bank_features()[kept], bank.classes[kept], bank.ids[kept], bank.fingerprint)

    def relabel_support(self, ids: Tensor | list[int] | int, classes: Tensor | list[int] | int) -> None:
        """Give the images of these ids [n] other classes [n], -100 for unknown.

        Raises:
            ValueError: for ids that the bank does not hold or that are given twice, and for unknown classes.
        """
        bank = self.support_bank
        ids = held_ids(ids, bank.ids)
        classes = whole_numbers(classes, "classes", ids)
        check_unique(ids)
        place, named = find_rows(bank.ids, ids)
        relabelled = torch.where(named, classes[place], bank.classes)
        self._fill_bank(self._bank_features(), relabelled, bank.ids, bank.fingerprint)

    def merge_support_bank(self, other: SupportBank | str | os.PathLike, *, ignore_mismatch: bool = False) -> None:
        """Add the rows of another bank: another model's `support_bank`, or a file of `save_support_bank`.

        An id that both hold must name the same image: feature and class are compared, and it is kept once.

        Raises:
            ValueError: for ids that name different images, unknown classes, or a bank that another backbone or image
                processor made (unless `ignore_mismatch`).
        """
        bank, what = self.support_bank, "The other bank"
        if isinstance(other, str | os.PathLike):
            rows, metadata = read_bank(other)
            features, classes, ids = (rows[name] for name in ("features", "classes", "ids"))
            fingerprint, what = metadata["fingerprint"], f"The support bank in {other}"
            self._check_names(metadata, what, ignore_mismatch)
        else:
            features, classes, ids, fingerprint = other.features, other.classes, other.ids, other.fingerprint
        features, classes, ids = (part.to(self.device) for part in (features, classes, ids))
        if not ignore_mismatch:
            current = self._fingerprint() or {}
            check_fingerprint(bank.fingerprint, current, "The support bank")
            check_fingerprint(fingerprint, (bank.fingerprint or {}) | current, what)
        features = bank.rounded(self._embed_rows(None, features))
        if bank.size:
            row, held = find_rows(ids, bank.ids)
            same = (bank.features[row].to(features.dtype) == features).all(-1) & (bank.classes[row] == classes)
            if (held & ~same).any():
                raise ValueError(
                    f"ids {some(ids[held & ~same])} name other images or classes in the two banks: give them other"
                    " ids, or take them out of one bank with model.remove_support(ids)."
                )
            features, classes, ids = features[~held], classes[~held], ids[~held]
        if len(ids):
            self._append_to_bank(features, classes, ids, fingerprint)

    def save_support_bank(self, path: str | os.PathLike) -> Path:
        """Write the bank alone to a `.safetensors` file, or into a folder as `support_bank.safetensors`; returns the
        path.

        Raises:
            ValueError: for an empty bank.
        """
        bank = self.support_bank
        if bank.size == 0:
            raise ValueError("The support bank is empty: call model.build_support_bank(dataset, ...) first.")
        return write_bank(
            bank,
            path,
            fingerprint=bank.fingerprint or self._fingerprint(),
            states=self._states_digest(),
            names=self.config.id2label,
        )

    def load_support_bank(
        self, path: str | os.PathLike, *, image_processor=None, ignore_mismatch: bool = False
    ) -> None:
        """Replace the bank by one that `save_support_bank` wrote.

        With the head and the graph options that it was written with, its states are taken as they are; else they are
        computed again from its features.

        Args:
            image_processor: of the images to come; settings other than those of the bank's images are an error.
            ignore_mismatch: take a bank that another backbone or image processor made, or whose classes have other
                names.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for a bank that does not belong to this model, saying what differs.
        """
        rows, metadata = read_bank(path)
        rows = {name: value.to(self.device) for name, value in rows.items()}
        what = f"The support bank in {path}"
        self._check_names(metadata, what, ignore_mismatch)
        if not ignore_mismatch:
            if not metadata["fingerprint"]:
                logger.warning(
                    f"{what} does not say which backbone made it: its features are taken to be this model's."
                )
            check_fingerprint(metadata["fingerprint"], self._fingerprint(image_processor), what)
        features, classes, ids = (rows[name] for name in ("features", "classes", "ids"))
        self._embed_rows(None, features)
        check_classes(self.config.num_labels, labels=None, support_classes=classes)
        bank = self.support_bank
        if metadata["states"] is None or metadata["states"] != self._states_digest():
            logger.info(f"{what} was written with another head or graph: its states are computed again.")
            self._fill_bank(self._wide(features), classes, ids, metadata["fingerprint"])
            return
        states = [features] * bank.shares_features + [rows[name] for name in bank.state_names]
        bank.fill(features, classes, ids, rows["degree"], rows["propagated"], states, metadata["fingerprint"])
        self._note_bank()

    @torch.no_grad()
    def _fill_bank(self, features: Tensor, classes: Tensor, ids: Tensor | None, fingerprint: dict | None) -> None:
        bank = self.support_bank
        check_classes(self.config.num_labels, labels=None, support_classes=classes)
        if len(features) == 0:
            bank.clear()
            self._note_bank()
            return
        ids = torch.arange(features.shape[0], device=features.device) if ids is None else ids
        # of the features as they are stored, so that an edit, which has no others, makes the same bank
        features = bank.rounded(features)
        training = self.training
        self.eval()
        ranking = self.bpgcn.rank(features, ids)
        graph = self._graph(ranking)
        known = known_classes(classes, self.config.num_labels, ranking.weights.dtype)
        _, states = run_head(self.head, features.to(self.dtype), graph, known=known)
        _, propagated = self.label_propagation(self._label_graph(ranking), known)
        bank.fill(features, classes, ids, graph.degree, propagated, states, fingerprint)
        self._note_bank()
        self.train(training)

    def _append_to_bank(self, features: Tensor, classes: Tensor, ids: Tensor, fingerprint: dict | None) -> None:
        bank = self.support_bank
        if bank.size:
            fingerprint = bank.fingerprint or fingerprint
            features = torch.cat([self._bank_features(), self._wide(features)])
            classes, ids = torch.cat([bank.classes, classes]), torch.cat([bank.ids, ids])
        self._fill_bank(features, classes, ids, fingerprint)

    def _note_bank(self) -> None:
        self.config.bank_size, self.config.bank_fingerprint = self.support_bank.size, self.support_bank.fingerprint

    def _bank_features(self) -> Tensor:
        return self._wide(self.support_bank.features)

    def _wide(self, features: Tensor) -> Tensor:
        # of a model in half precision, too, the ranking computes in float32
        return features.to(torch.promote_types(torch.promote_types(features.dtype, self.dtype), torch.float32))

    @torch.no_grad()
    def _embed_rows(self, pixel_values: Tensor | None, features: Tensor | None) -> Tensor:
        training = self.training
        self.eval()
        features = self.bpgcn.embed(pixel_values, features)
        self.train(training)
        if features.ndim != 2 or features.shape[1] != self.config.feature_size:
            raise ValueError(
                f"features {tuple(features.shape)} must be [n, {self.config.feature_size}], as this model's backbone"
                " and pooling make them."
            )
        return features

    def _fingerprint(self, image_processor=None) -> dict[str, str] | None:
        fingerprint = backbone_fingerprint(self.bpgcn)
        if image_processor is not None:
            fingerprint = (fingerprint or {}) | processor_fingerprint(image_processor)
        return fingerprint

    def _states_digest(self) -> str | None:
        modules = [self.bpgcn.ranking_temperature] + ([] if self.head is None else [self.head])
        return states_digest(self.config, modules)

    def _check_names(self, metadata: dict, what: str, ignore_mismatch: bool) -> None:
        own = {str(index): name for index, name in self.config.id2label.items()}
        differing = sorted(i for i in own.keys() & metadata["names"].keys() if own[i] != metadata["names"][i])
        if differing and not ignore_mismatch:
            pairs = ", ".join(f"{i} is {metadata['names'][i]!r} there, {own[i]!r} here" for i in differing[:3])
            raise ValueError(
                f"{what} has other classes: {pairs}. Put them in the same order, or pass ignore_mismatch=True if only"
                " their names differ."
            )
