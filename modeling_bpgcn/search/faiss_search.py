"""Candidates from a FAISS index (Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", 2019)."""

import math

import torch
from torch import Tensor

FLAT_BELOW = 10_000  # an inverted file is not worth its training
POINTS_PER_CELL = 64  # of the training sample: k-means is most of the time that an index takes to build
ITERATIONS = 10


class FaissSearch:
    """An index for `model.use_search`; needs the `faiss` extra: `pip install 'bpgcn[faiss]'`.

    Args:
        factory: a string of `faiss.index_factory`, such as `HNSW32,Flat`. Unless given, an inverted file of about
            4 sqrt(M) cells over points of 8 bits a dimension (`IVF4096,SQ8` for M = 1,000,000), or all points as they
            are (`Flat`) below 10,000. The candidates are ranked by the stored features, whatever the index keeps.
        num_probes: cells of an inverted file that a query visits; a 64th of them unless given. More find more of the
            true neighbours and take longer, see benchmarks/README.md.

    Raises:
        ImportError: without FAISS.
    """

    def __init__(self, factory: str | None = None, num_probes: int | None = None):
        try:
            import faiss
        except ImportError as error:
            raise ImportError("FaissSearch needs FAISS: pip install 'bpgcn[faiss]'.") from error
        self._faiss = faiss
        self.factory, self.num_probes = factory, num_probes
        self._index = self._cells = None

    def build(self, points: Tensor) -> None:
        """Index points [M, D]."""
        faiss, (M, D) = self._faiss, points.shape
        index = faiss.index_factory(D, self.factory or default_factory(M), faiss.METRIC_L2)
        cells = faiss.try_extract_index_ivf(index)
        if cells is not None:
            cells.cp.niter, cells.cp.max_points_per_centroid = ITERATIONS, POINTS_PER_CELL
        points = points.detach().cpu().contiguous().numpy()
        index.train(points)
        index.add(points)
        self._index, self._cells = index, cells

    def search(self, query: Tensor, count: int) -> Tensor:
        """Rows [N, count] int64 of points near the queries [N, D], nearest first; -1 for none."""
        if self._cells is not None:
            self._cells.nprobe = min(self.num_probes or max(1, self._cells.nlist // 64), self._cells.nlist)
        _, rows = self._index.search(query.cpu().contiguous().numpy(), count)
        return torch.from_numpy(rows)


def default_factory(size: int) -> str:
    """The index for M points when the caller names none."""
    if size < FLAT_BELOW:
        return "Flat"
    # k-means wants 39 points a cell
    cells = 2 ** min(round(math.log2(4 * math.sqrt(size))), math.floor(math.log2(size / 39)))
    return f"IVF{cells},SQ8"
