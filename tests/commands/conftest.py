"""Small pictures in class folders, and a saved model with some of them in its bank."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from modeling_bpgcn import BPGCNForImageClassification
from tests.analysis.evidence_images import NUM_CLASSES, write_backbone, write_images

CLASS_NAMES = [f"class {number}" for number in range(NUM_CLASSES)]
IN_BANK = 10  # of each class; the other 10 are not


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """CLASS/NUMBER.png, 20 of each of three classes."""
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def empty_model(tmp_path_factory):
    """A folder of a model without a bank, and its image processor."""
    folder = tmp_path_factory.mktemp("empty-model")
    write_backbone(folder / "backbone")
    torch.manual_seed(0)
    model = BPGCNForImageClassification.from_backbone_pretrained(
        str(folder / "backbone"),
        num_labels=NUM_CLASSES,
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: number for number, name in enumerate(CLASS_NAMES)},
        num_neighbors=4,
        head_hidden_size=8,
    )
    model.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(empty_model, pictures, tmp_path_factory):
    """A folder of the model with the first ten images of each class in its bank, under ids from 100."""
    folder = tmp_path_factory.mktemp("model")
    model = BPGCNForImageClassification.from_pretrained(empty_model)
    processor = AutoImageProcessor.from_pretrained(empty_model, backend="pil")
    rows = [
        {
            "image": Image.open(pictures / name / f"{number}.png"),
            "label": label,
            "node_ids": 100 + IN_BANK * label + number,
        }
        for label, name in enumerate(CLASS_NAMES)
        for number in range(IN_BANK)
    ]
    model.build_support_bank(rows, image_processor=processor, progress=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Run a command in this process -> (exit status, stdout, stderr)."""

    def run(main, *arguments) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
