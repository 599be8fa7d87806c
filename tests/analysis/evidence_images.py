"""A folder of small pictures and a small backbone, as the evidence benchmark takes them."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BitImageProcessor, Dinov2Model, set_seed

from tests.model_factory import tiny_backbone

NUM_CLASSES, IMAGES_PER_CLASS = 3, 20


def write_images(folder: Path) -> Path:
    """Stripes, a class by its direction and colour, under noise."""
    random = np.random.default_rng(0)
    for value in range(NUM_CLASSES):
        (folder / f"class {value}").mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            pixels = random.integers(0, 120, (8, 8, 3))
            pixels[:: value + 1, :, value] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class {value}" / f"{number}.png")
    return folder


def write_backbone(folder: Path) -> Path:
    """Two blocks, patches of 4 pixels."""
    set_seed(0)
    Dinov2Model(tiny_backbone(hidden_size=16)).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    BitImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder
