"""LoRA with peft on the backbone's attention: what trains, what is saved; reloading and merging keep the answers."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn import BPGCNForImageClassification
from tests.model_factory import BACKBONES, HEAD_NAMES, tiny_backbone, tiny_images, tiny_model

LABELS = torch.tensor([0, 1, 2, 0, 1, -100, 0, -100, 1, -100, 2, 2])
TARGETS = {
    "pattern": r".*\.attention\.(q_proj|k_proj|v_proj|o_proj)",
    "names": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def adapted(base, targets="pattern", **options) -> PeftModel:
    modules_to_save = ["head", "ranking_temperature", "support_bank"]
    fields = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS[targets], "modules_to_save": modules_to_save}
    return get_peft_model(base, LoraConfig(**(fields | options)))


def trained(model: PeftModel, images: Tensor, steps: int = 8) -> list[float]:
    """A few steps, then the bank and evaluation mode; the losses."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    model.train()
    for _ in range(steps):
        torch.manual_seed(0)
        loss = model(pixel_values=images, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(images), LABELS, 100 + torch.arange(12))
    return losses


@torch.no_grad()
def answers(model, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_only_adapters_head_and_temperature_train(kind, targets):
    base, images = tiny_model(backbone_config=tiny_backbone(kind), learn_temperature=True), tiny_images(12)
    model = adapted(base, targets)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trainable if ".lora_" in name}
    assert len(adapters) == 2 * 4 * 2  # layers, projections, A and B
    assert all(".attention." in name for name in adapters)
    others = {name.split(".modules_to_save.default.")[0].rsplit(".", 1)[-1] for name in trainable - adapters}
    assert others == {"head", "ranking_temperature"}

    losses = trained(model, images)
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trainable


def fresh_base(folder: Path, **overrides) -> BPGCNForImageClassification:
    """A base model that is also on disk, so that another process could start from it."""
    tiny_model(learn_temperature=True, **overrides).save_pretrained(folder)
    return BPGCNForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("head", [name for name in HEAD_NAMES if name != "label_propagation"])
def test_saved_reloaded_and_merged_it_gives_the_same_answers(head, tmp_path):
    base, images = fresh_base(tmp_path / "base", head=head), tiny_images(12)
    model = adapted(base)
    trained(model, images)
    queries = tiny_images(6)
    expected = answers(model, queries)
    untrained = BPGCNForImageClassification.from_pretrained(tmp_path / "base")
    untrained.set_support_bank(untrained.get_image_features(images), LABELS)
    assert (answers(untrained, queries) - expected).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    # the base has another bank by now, or none: the adapter's replaces it
    for bank in (None, 5):
        start = BPGCNForImageClassification.from_pretrained(tmp_path / "base")
        if bank:
            start.set_support_bank(torch.randn(bank, 8), LABELS[:bank])
        reloaded = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
        assert reloaded.support_bank.size == 12
        assert reloaded.support_bank.ids.tolist() == list(range(100, 112))
        assert torch.equal(answers(reloaded, queries), expected)

    merged = reloaded.merge_and_unload()
    assert type(merged) is BPGCNForImageClassification
    assert not [name for name in merged.state_dict() if "lora" in name or "modules_to_save" in name]
    assert_close(answers(merged, queries), expected, atol=1e-5, rtol=0)

    merged.save_pretrained(tmp_path / "merged")
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(answers(loaded, queries), answers(merged, queries))


def test_the_adapters_folder_holds_no_backbone(tmp_path):
    model = adapted(fresh_base(tmp_path / "base"))
    trained(model, tiny_images(12), steps=1)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kinds = {".lora_": 0, ".head.": 0, ".ranking_temperature.": 0, ".support_bank.": 0}
    for name in names:
        (kind,) = (kind for kind in kinds if kind in name)
        kinds[kind] += 1
    assert all(kinds.values())


def test_a_fixed_temperature_may_be_named_too():
    model = adapted(tiny_model())
    trained(model, tiny_images(12), steps=1)
    assert not [name for name, _ in model.named_parameters() if "ranking_temperature" in name]
    assert answers(model, tiny_images(3)).isfinite().all()
