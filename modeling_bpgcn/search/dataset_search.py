"""Candidates from the FAISS index of a `datasets.Dataset`, which is saved and loaded with the data set."""

import torch
from datasets import Dataset
from torch import Tensor


def bank_dataset(model) -> Dataset:
    """The support bank as a data set of columns `ids`, `classes` and `points`, one row per support image in the bank's
    order, to be indexed:

        dataset = bank_dataset(model)
        dataset.add_faiss_index("points", string_factory="HNSW32")
        model.use_search(DatasetSearch(dataset, "points"))
    """
    base = model.base_model
    keys = base.support_bank.keys(base.config.ranking_metric)
    columns = {
        "ids": base.support_bank.ids.cpu().numpy(),
        "classes": base.support_bank.classes.cpu().numpy(),
        "points": keys.vectors[:, : keys.width].float().cpu().numpy(),
    }
    return Dataset.from_dict(columns)


class DatasetSearch:
    """An index for `model.use_search` that a data set of `bank_dataset` carries; needs the `faiss` extra.

    Args:
        dataset: rows in the order of the bank, with a column `points`.
        index_name: of the index, the column's name unless `add_faiss_index` was given another.
    """

    def __init__(self, dataset: Dataset, index_name: str = "points"):
        self.dataset, self.index_name = dataset, index_name

    def build(self, points: Tensor) -> None:
        """Check that the data set holds these points [M, D]: its index was made by its owner.

        Raises:
            ValueError: for rows that are not the bank's.
        """
        fits = len(self.dataset) == len(points)
        if fits:
            ends = [0, len(points) // 2, len(points) - 1]
            stored = torch.tensor(self.dataset[ends]["points"])
            fits = stored.shape == points[ends].shape and torch.allclose(stored, points[ends].cpu(), atol=1e-5)
        if not fits:
            raise ValueError(
                f"The {len(self.dataset)} rows of the indexed data set are not the {len(points)} of the support bank:"
                " make it anew with bank_dataset(model) and add_faiss_index, as after any change of the bank."
            )

    def search(self, query: Tensor, count: int) -> Tensor:
        """Rows [N, count] int64 of points near the queries [N, D], nearest first; -1 for none."""
        found = self.dataset.search_batch(self.index_name, query.cpu().contiguous().numpy(), k=count)
        return torch.as_tensor(found.total_indices)
