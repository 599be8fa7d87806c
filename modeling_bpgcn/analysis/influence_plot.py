"""A picture of what answers rest on: the neighbors of a query, and below them the support images that move it most."""

from collections.abc import Sequence
from os import PathLike

from matplotlib.figure import Figure
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from .influence import influence, removal_influence
from .plots import MUTED, UNLABELED, QueryNeighbors, plot_neighbors

ROWS = ("by weight", "by influence")


def plot_influence(
    model: BPGCNForImageClassification,
    features: Tensor,
    images: Sequence,
    support_images: Sequence,
    path: str | PathLike,
    labels: Sequence[int] | None = None,
    node_ids: Tensor | None = None,
    label_names: Sequence[str] | None = None,
    max_images: int = 8,
) -> Figure:
    """Draw two rows for each query: the heaviest neighbors with their weights, and the support images whose removal
    would lower the log-probability of the answer most, with their shares of all such drops (`removal_influence`).

    Args:
        features: [Q, D] of the queries; `images` [Q] and `support_images` [M], in the bank's order, are their pictures.
        path: PNG to write.
        labels, node_ids: true classes (-100 unknown) and ids of the queries, where known.
        label_names: names of the classes, their numbers unless given.
        max_images: images drawn in a row.

    Raises:
        ValueError: without queries or a bank, or where pictures are missing.
    """
    bank = model.support_bank
    if len(images) != len(features) or len(support_images) != bank.size:
        raise ValueError(
            f"There are {len(images)} images for {len(features)} queries and {len(support_images)} support_images for"
            f" {bank.size} rows of the bank: pass one for each."
        )
    found = influence(model, features=features, node_ids=node_ids)
    drops = -removal_influence(model, features=features, node_ids=node_ids).clamp_max(0)
    shares = drops / drops.sum(-1, keepdim=True).clamp_min(1e-12)
    rows = []
    for i, image in enumerate(images):
        strongest, order = shares[i].topk(min(max_images, bank.size))
        for sizes, support in ((found.neighbor_weights[i], found.neighbor_indices[i]), (strongest, order)):
            rows.append(
                QueryNeighbors(
                    image=image,
                    label=UNLABELED if labels is None else int(labels[i]),
                    prediction=int(found.class_index[i]),
                    probability=float(found.log_probability[i].exp()),
                    neighbor_images=[support_images[row] for row in support[:max_images].tolist()],
                    neighbor_classes=bank.classes[support[:max_images]].tolist(),
                    neighbor_weights=sizes[:max_images].tolist(),
                )
            )
    figure = plot_neighbors(rows, path, label_names, max_images)
    place = 0
    for i, row in enumerate(rows):
        figure.axes[place].set_ylabel(ROWS[i % 2], fontsize=8, color=MUTED, labelpad=1)
        place += 1 + len(row.neighbor_images)
    figure.savefig(path, format="png", dpi=120)
    return figure
