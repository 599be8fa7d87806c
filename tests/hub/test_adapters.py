"""LoRA adapters as others find them: a folder or a repository that names its base, read by peft and by transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, pipeline

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.building import build_model
from modeling_bpgcn.training.images import to_rgb
from tests.training_factory import digit_trainer, digits, tiny_digit_model, write_recipe

NAMES = [str(digit) for digit in range(10)]
NO_BANK = r"no support bank to answer from\. Build it with model\.build_support_bank"
SCHEDULE = {"temperature_schedule": "linear", "final_temperature": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Tensor, Tensor]:
    """The folder of a LoRA run whose temperature moved, images, and what the trained model answers on them."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = write_recipe(folder, lora_rank=2, lora_alpha=8.0, **SCHEDULE)
    model_arguments, _, training = parse_arguments([str(recipe)])
    torch.manual_seed(0)
    model = build_model(model_arguments, training, NAMES)
    steps = {"max_steps": 4, "learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = digit_trainer(folder / "run", model, eval_strategy="steps", eval_steps=2, **steps, **SCHEDULE)
    trainer.train()
    trainer.save_model()
    images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(16)])
    return folder / "run", images, answers(trainer.bpgcn.eval(), images)


@torch.no_grad()
def answers(model, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits


def lora_weights(model) -> list[str]:
    return [name for name in model.state_dict() if ".lora_" in name]


# --- a run's folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [AutoModelForImageClassification, BPGCNForImageClassification])
def test_from_pretrained_of_the_adapter_folder_gives_the_trained_model(run, loader):
    folder, images, expected = run
    model = loader.from_pretrained(folder / "adapter")
    assert type(model) is BPGCNForImageClassification
    assert lora_weights(model)
    assert model.support_bank.size == model.config.bank_size == len(digits().train)
    assert model.config.ranking_temperature == pytest.approx(0.05)
    assert_close(answers(model, images), expected, atol=1e-6, rtol=0)


def test_peft_puts_the_adapter_on_the_base_and_merged_they_agree(run):
    folder, images, expected = run
    base = BPGCNForImageClassification.from_pretrained(folder / "base")
    assert not lora_weights(base)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert_close(answers(adapted, images), expected, atol=1e-6, rtol=0)
    for merged in (adapted.merge_and_unload(), BPGCNForImageClassification.from_pretrained(folder)):
        assert not lora_weights(merged)
        assert_close(answers(merged, images), expected, atol=1e-5, rtol=0)


def test_the_base_is_what_the_adapters_were_added_to_and_has_no_bank(run):
    folder, images, _ = run
    base, trained = (BPGCNForImageClassification.from_pretrained(folder / name) for name in ("base", "adapter"))
    assert (base.get_image_features(images) - trained.get_image_features(images)).abs().max() > 1e-2
    trained.disable_adapters()
    assert torch.equal(base.get_image_features(images), trained.get_image_features(images))
    with pytest.raises(ValueError, match=NO_BANK):
        answers(base, images)


def test_the_adapter_folder_holds_no_backbone(run):
    folder, *_ = run
    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(any(part in name for part in (".lora_", ".head.", ".support_bank.")) for name in names)
    assert not (folder / "adapter" / "model.safetensors").exists()


def test_a_checkpoint_loads_too_and_answers_from_its_own_bank(run):
    folder, images, expected = run
    early = BPGCNForImageClassification.from_pretrained(folder / "checkpoint-2")
    final = BPGCNForImageClassification.from_pretrained(folder / "checkpoint-4")
    assert early.support_bank.size == len(digits().train)
    assert_close(answers(final, images), expected, atol=1e-6, rtol=0)
    assert (answers(early, images) - expected).abs().max() > 1e-2


def test_a_pipeline_takes_the_adapter_folder(run):
    folder, *_ = run
    image = to_rgb(digits().test[0]["image"])
    by_adapter, by_merged = (
        pipeline("image-classification", model=str(path))(image) for path in (folder / "adapter", folder)
    )
    for one, other in zip(by_adapter, by_merged, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


# --- banks and bases --------------------------------------------------------------------------------------------------


def other_adapter(run_folder: Path, folder: Path, keep=lambda name: True, base: Path | None = None) -> Path:
    """A copy of the run's adapter with some of its tensors, on another base."""
    shutil.copytree(run_folder / "adapter", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if keep(k)}, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    if base is not None:
        settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def banked_base(run, tmp_path) -> Path:
    """The base of the run with a bank of 5 images of its own."""
    folder, images, _ = run
    base = BPGCNForImageClassification.from_pretrained(folder / "base")
    base.set_support_bank(base.get_image_features(images[:5]), torch.arange(5))
    base.save_pretrained(tmp_path / "banked")
    return tmp_path / "banked"


def test_the_adapters_bank_takes_the_place_of_the_bases(run, banked_base, tmp_path):
    folder, images, expected = run
    model = BPGCNForImageClassification.from_pretrained(other_adapter(folder, tmp_path / "a", base=banked_base))
    assert_close(answers(model, images), expected, atol=1e-6, rtol=0)


def test_an_adapter_without_a_bank_does_not_answer_from_the_bases(run, banked_base, tmp_path):
    folder, images, _ = run
    adapter = other_adapter(folder, tmp_path / "a", lambda name: ".support_bank." not in name, banked_base)
    model = BPGCNForImageClassification.from_pretrained(adapter)
    with pytest.raises(ValueError, match=NO_BANK):
        answers(model, images)
    model.set_support_bank(model.get_image_features(images), torch.arange(16) % 10)
    assert answers(model, images).isfinite().all()


def test_a_base_that_is_gone_is_named(run, tmp_path):
    adapter = other_adapter(run[0], tmp_path / "a", base=tmp_path / "gone")
    with pytest.raises(OSError, match=str(tmp_path / "gone")):
        BPGCNForImageClassification.from_pretrained(adapter)


def test_adapters_on_a_model_that_was_loaded_name_that(tmp_path):
    tiny_digit_model().save_pretrained(tmp_path / "mine")
    base = BPGCNForImageClassification.from_pretrained(tmp_path / "mine")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["head", "support_bank"]))
    trainer = digit_trainer(tmp_path / "run", model, max_steps=1)
    trainer.train()
    trainer.save_model()
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "mine")
    assert not (tmp_path / "run" / "base").exists()
    images = torch.randn(4, 3, 8, 8)
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path / "run" / "adapter")
    assert_close(answers(loaded, images), answers(trainer.bpgcn.eval(), images), atol=1e-6, rtol=0)


# --- on the Hub -------------------------------------------------------------------------------------------------------

PUSH = """
from peft import LoraConfig, get_peft_model
from modeling_bpgcn import BPGCNForImageClassification
from tests.training_factory import tiny_digit_model

tiny_digit_model().push_to_hub("alice/base")
base = BPGCNForImageClassification.from_pretrained("alice/base")
settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["head", "support_bank"], init_lora_weights=False)
model = get_peft_model(base, settings).eval()
images = torch.randn(12, 3, 8, 8)
with torch.no_grad():
    model.set_support_bank(model.get_image_features(images), torch.arange(12) % 10)
    logits = model(pixel_values=images).logits
    adapted = model.get_image_features(images)
    with model.disable_adapter():
        assert (model.get_image_features(images) - adapted).abs().max() > 1e-3
model.push_to_hub("alice/adapter")
torch.save({"images": images, "logits": logits}, sys.argv[1])
"""

LOAD = """
import importlib.util
from peft import PeftModel
from transformers import AutoModelForImageClassification

assert importlib.util.find_spec("modeling_bpgcn") is None
stored = torch.load(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained("alice/adapter", trust_remote_code=True)
base = AutoModelForImageClassification.from_pretrained("alice/base", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
for loaded in (model, PeftModel.from_pretrained(base, "alice/adapter").eval()):
    with torch.no_grad():
        print((loaded(pixel_values=stored["images"]).logits - stored["logits"]).abs().max().item())
"""


@pytest.mark.slow
def test_adapter_and_base_as_repositories_load_where_the_package_is_not_installed(hub, client, tmp_path):
    client.run(PUSH, tmp_path / "answers.pt", package=True, token="hf_alice")
    assert json.loads(hub.files("alice/adapter")["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert not [path for path in hub.files("alice/adapter") if path == "model.safetensors"]
    printed = client.run(LOAD, tmp_path / "answers.pt", package=False)
    assert [float(line) <= 1e-6 for line in printed.splitlines()] == [True, True]
