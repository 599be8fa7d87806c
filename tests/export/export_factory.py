"""Small models with a support bank, which the tests of the export share."""

import torch

from modeling_bpgcn import BPGCNForImageClassification
from tests.model_factory import CLASSES, tiny_backbone, tiny_images, tiny_model

SUPPORT = 20


def shallow_backbone(kind: str = "dinov2", **overrides):
    """One layer: tracing is most of what these tests cost."""
    return tiny_backbone(kind, num_hidden_layers=1, **overrides)


def model_with_bank(**fields) -> BPGCNForImageClassification:
    """With the classes of 20 support images, one of them unknown."""
    model = tiny_model(**({"backbone_config": shallow_backbone()} | fields))
    fill(model, SUPPORT)
    return model


@torch.no_grad()
def fill(model: BPGCNForImageClassification, count: int) -> None:
    """Give the model a bank of so many new images."""
    classes = torch.arange(count) % CLASSES
    classes[0] = -100
    model.set_support_bank(model.get_image_features(tiny_images(count)), classes)
