"""Indices over large support banks: candidates for `model.use_search`, which the model ranks and weighs itself."""

from .dataset_search import DatasetSearch, bank_dataset
from .faiss_search import FaissSearch

__all__ = ["DatasetSearch", "FaissSearch", "bank_dataset"]
