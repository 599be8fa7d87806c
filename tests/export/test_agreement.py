"""The comparison tells rounding from another answer."""

import pytest
import torch

from modeling_bpgcn.export import compare
from tests.export.export_factory import SUPPORT, model_with_bank
from tests.model_factory import tiny_images


@pytest.fixture
def model():
    """Its images 3 and 4 in the bank are the same."""
    model = model_with_bank()
    bank = model.support_bank
    features = bank.features.clone()
    features[4] = features[3]
    model.set_support_bank(features, bank.classes)
    return model


@torch.no_grad()
def answers(model, pixel_values):
    """The model's own, as those of an exported file."""
    outputs = model(pixel_values=pixel_values)
    return {"logits": outputs.logits.clone(), "neighbor_indices": outputs.neighbor_indices.clone()}


def test_the_model_agrees_with_itself(model):
    found = compare(model, lambda x: answers(model, x), tiny_images(40))
    assert found.agrees
    assert (found.images, found.logits, found.same_class, found.ties, found.other_neighbors) == (40, 0.0, 40, 0, 0)


def test_other_logits_do_not_agree(model):
    def run(pixel_values):
        given = answers(model, pixel_values)
        given["logits"][-1, 0] += 2e-4
        return given

    found = compare(model, run, tiny_images(8))
    assert not found.agrees
    assert found.logits == pytest.approx(2e-4, rel=1e-2)
    assert not compare(
        model, lambda x: answers(model, x) | {"logits": x.new_full((len(x), 3), torch.nan)}, tiny_images(2)
    ).agrees


def test_other_neighbors_do_not_agree_even_with_the_same_logits(model):
    def run(pixel_values):
        given = answers(model, pixel_values)
        others = [row for row in range(SUPPORT) if row not in [3, 4, *given["neighbor_indices"][0].tolist()]]
        given["neighbor_indices"][0, -1] = others[0]
        return given

    found = compare(model, run, tiny_images(8))
    assert not found.agrees
    assert (found.logits, found.ties, found.other_neighbors) == (0.0, 0, 1)


def test_equal_neighbors_may_change_places(model):
    pixel_values = tiny_images(64)
    rows = answers(model, pixel_values)["neighbor_indices"]
    cut = ((rows == 3).any(-1) & ~(rows == 4).any(-1)).nonzero()[:, 0]
    assert len(cut)  # images of which 3 is the last neighbour: 4 might be in its place

    def run(pixel_values):
        given = answers(model, pixel_values)
        given["neighbor_indices"][given["neighbor_indices"] == 3] = 4
        given["logits"] += 0.1 * (given["neighbor_indices"] == 4).any(-1, keepdim=True)
        return given

    found = compare(model, run, pixel_values[cut[:1].repeat(2)])
    assert (found.ties, found.other_neighbors, found.agrees) == (2, 0, False)  # nothing is left to compare
    elsewhere = (~((rows == 3) | (rows == 4)).any(-1)).nonzero()[:, 0]
    found = compare(model, run, pixel_values[torch.cat([cut[:1], elsewhere[:5]])])
    assert (found.logits, found.ties, found.agrees) == (0.0, 1, True)
