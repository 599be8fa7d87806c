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
        num_probes: cells of an inverted file that a query visits, thrice the square root of their number unless given
            (192 of 4096). More find more of the true neighbours and take longer, see benchmarks/README.md.
        ef_search: the same for an `HNSW` graph, the length of its list of candidates; FAISS's own unless given.

    Raises:
        ImportError: without FAISS.
    """

    def __init__(self, factory: str | None = None, num_probes: int | None = None, ef_search: int | None = None):
        try:
            import faiss
        except ImportError as error:
            raise ImportError("FaissSearch needs FAISS: pip install 'bpgcn[faiss]'.") from error
        self._faiss = faiss
        self.factory, self.num_probes, self.ef_search = factory, num_probes, ef_search
        self._index = self._cells = self._graph = None

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
        self._graph = getattr(faiss.downcast_index(index), "hnsw", None)

    def search(self, query: Tensor, count: int) -> Tensor:
        """Rows [N, count] int64 of points near the queries [N, D], nearest first; -1 for none."""
        if self._cells is not None:
            cells = self._cells.nlist
            self._cells.nprobe = min(self.num_probes or default_probes(cells), cells)
        if self._graph is not None and self.ef_search:
            self._graph.efSearch = self.ef_search
        _, rows = self._index.search(query.cpu().contiguous().numpy(), count)
        return torch.from_numpy(rows)


def default_probes(cells: int) -> int:
    """How many cells a query visits when the caller does not say."""
    return round(3 * math.sqrt(cells))


def default_factory(size: int) -> str:
    """The index for M points when the caller names none."""
    if size < FLAT_BELOW:
        return "Flat"
    # k-means wants 39 points a cell
    cells = 2 ** min(round(math.log2(4 * math.sqrt(size))), math.floor(math.log2(size / 39)))
    return f"IVF{cells},SQ8"
