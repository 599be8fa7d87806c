"""The picture of influence: two rows a query, each with the images and numbers that the analysis found."""

import numpy as np
import pytest
import torch

from modeling_bpgcn.analysis.influence import influence, removal_influence
from modeling_bpgcn.analysis.influence_plot import ROWS, plot_influence
from tests.model_factory import CLASSES, tiny_model

M, Q = 20, 2


def model_and_queries():
    model = tiny_model(ranking_temperature=0.3)
    model.set_support_bank(torch.randn(M, 8), torch.where(torch.arange(M) % 3 == 0, torch.arange(M) % CLASSES, -100))
    return model, torch.randn(Q, 8)


def pictures(count: int) -> list[np.ndarray]:
    """Each of one shade, which tells them apart."""
    return [np.full((8, 8), i) for i in range(count)]


def test_neighbors_and_influential_images_are_drawn_with_their_shares(tmp_path):
    model, features = model_and_queries()
    path = tmp_path / "pictures" / "influence.png"
    figure = plot_influence(model, features, pictures(Q), pictures(M), path, labels=[0, -100], max_images=4)
    assert path.stat().st_size > 1000
    k = model.config.num_neighbors
    assert len(figure.axes) == Q * ((1 + k) + (1 + 4))
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == list(ROWS) * Q
    found, scores = influence(model, features=features), removal_influence(model, features=features)
    place = 0
    for i in range(Q):
        drops = (-scores[i]).clamp_min(0)
        order = drops.argsort(descending=True)[:4]
        expected = (found.neighbor_indices[i], found.neighbor_weights[i]), (order, drops[order] / drops.sum())
        for rows, sizes in expected:
            drawn = figure.axes[place + 1 : place + 1 + len(rows)]
            assert [int(axes.images[0].get_array()[0, 0]) for axes in drawn] == rows.tolist()
            assert [axes.texts[0].get_text() for axes in drawn] == [f"{size:.3f}" for size in sizes.tolist()]
            place += 1 + len(rows)
        assert drops[order[0]] > 0


@pytest.mark.parametrize(("images", "support"), [(Q - 1, M), (Q, M - 1)])
def test_missing_pictures_are_named(tmp_path, images, support):
    model, features = model_and_queries()
    with pytest.raises(ValueError, match=rf"{images} images for {Q} queries and {support} support_images for {M} rows"):
        plot_influence(model, features, pictures(images), pictures(support), tmp_path / "x.png")
