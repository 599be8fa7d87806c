"""From arguments to a model: backbones, processors, LoRA and what a LoRA run leaves behind."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification, BitImageProcessorPil, Dinov2Model, pipeline

from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.building import build_model, build_processor
from modeling_bpgcn.training.images import image_transform, to_rgb
from modeling_bpgcn.training.run_folder import last_whole_checkpoint
from tests.model_factory import tiny_backbone
from tests.training_factory import PROCESSOR, RECIPE, digit_trainer, digits, logged, parameters, write_recipe

NAMES = [str(digit) for digit in range(10)]
LORA = {"lora_rank": 2, "lora_alpha": 8.0}


@pytest.fixture
def build(tmp_path):
    """(ModelArguments, BPGCNTrainingArguments) -> model, from a recipe with changes."""

    def make(**changes):
        model_arguments, _, training = parse_arguments([str(write_recipe(tmp_path, **changes))])
        torch.manual_seed(0)
        return build_model(model_arguments, training, NAMES)

    return make


@pytest.fixture
def processor_of(tmp_path):
    def make(image_size=8, **changes):
        return build_processor(parse_arguments([str(write_recipe(tmp_path, **changes))])[0], image_size)

    return make


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A folder with a backbone and its processor."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(7)
    Dinov2Model(tiny_backbone(hidden_size=16)).save_pretrained(folder, save_original_format=False)
    PROCESSOR.save_pretrained(folder)
    return folder


# --- backbones --------------------------------------------------------------------------------------------------------


def test_a_model_from_scratch_has_the_recipes_choices(build):
    model = build(head="sgc", num_neighbors=7)
    assert (model.config.head, model.config.num_neighbors) == ("sgc", 7)
    assert model.config.backbone_config.hidden_size == 16
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id["3"] == 3
    assert not model.config.learn_temperature


def test_a_learned_temperature_is_asked_for_by_the_schedule(build):
    assert build(temperature_schedule="learned").config.learn_temperature


def test_a_pretrained_backbone_brings_its_weights(build, pretrained):
    model = build(backbone=str(pretrained), backbone_config=None)
    expected = Dinov2Model.from_pretrained(pretrained)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.bpgcn.backbone.state_dict()[name], value), name
    assert model.config.num_labels == 10


@pytest.mark.parametrize("given", ["neither", "both"])
def test_a_backbone_comes_from_one_place(build, processor_of, pretrained, given):
    changes = {"backbone_config": None} if given == "neither" else {"backbone": str(pretrained)}
    for call in (build, processor_of):
        with pytest.raises(ValueError, match=r"Give either backbone .* or backbone_config"):
            call(**changes)


def test_a_folder_without_a_backbone_is_named(processor_of, tmp_path):
    with pytest.raises(ValueError, match=f"Unrecognized model in {tmp_path}"):
        processor_of(backbone=str(tmp_path), backbone_config=None)


def test_overrides_replace_what_the_recipe_says(tmp_path):
    model_arguments, _, training = parse_arguments([str(write_recipe(tmp_path))])
    assert build_model(model_arguments, training, NAMES, head="linear").config.head == "linear"


# --- processors -------------------------------------------------------------------------------------------------------


def test_the_processor_fits_the_backbone(processor_of):
    processor, patch_size = processor_of(image_size=16)
    assert patch_size == 4
    pixels = processor(to_rgb(digits().test[0]["image"]), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("size", "nearest"), [(10, "8 or 12"), (3, "4")])
def test_a_size_that_does_not_divide_into_patches_is_refused(processor_of, size, nearest):
    with pytest.raises(ValueError, match=rf"image size {size} is not a multiple .* pass --image_size {nearest}"):
        processor_of(image_size=size)


def test_a_backbone_keeps_its_own_processor(processor_of, pretrained):
    processor, patch_size = processor_of(None, backbone=str(pretrained), backbone_config=None)
    assert isinstance(processor, BitImageProcessorPil)
    assert (processor.size, patch_size) == (PROCESSOR.size, 4)


def test_a_backbone_without_a_processor_is_named(processor_of, pretrained, tmp_path):
    folder = Path(shutil.copytree(pretrained, tmp_path / "bare"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=str(folder)):
        processor_of(backbone=str(folder), backbone_config=None)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("schedule", ["constant", "learned"])
def test_adapters_sit_in_the_backbones_attention_and_beside_them_only_the_head_trains(build, schedule):
    model = build(**LORA, temperature_schedule=schedule)
    names = trained_names(model)
    adapters = {name for name in names if "lora_" in name}
    assert len(adapters) == 2 * 2 * 4  # A and B, layers, projections
    assert all(".backbone." in name for name in adapters)
    rest = {name.split("base_model.model.")[1] for name in names - adapters}
    learned = {"bpgcn.ranking_temperature.modules_to_save.default.log_temperature"}
    assert {name for name in rest if not name.startswith("head.modules_to_save.")} == (
        learned if schedule == "learned" else set()
    )
    assert any(name.startswith("head.modules_to_save.") for name in rest)


def test_chosen_layers_get_adapters(build):
    adapters = {name for name in trained_names(build(**LORA, lora_target_modules=["fc1"])) if "lora_" in name}
    assert len(adapters) == 2 * 2
    assert all(".mlp.fc1." in name for name in adapters)


def test_layer_names_that_match_nothing_are_answered_with_those_that_exist(build):
    message = (
        r"lora_target_modules=\['query'\] matches no layer of the backbone; its linear layers are fc1, fc2, k_proj, "
    )
    with pytest.raises(ValueError, match=message):
        build(**LORA, lora_target_modules=["query"])


def test_a_head_without_parameters_needs_no_saving(build):
    names = trained_names(build(**LORA, head="label_propagation", propagation_mix=1.0))
    assert names
    assert all("lora_" in name for name in names)


# --- a LoRA run -------------------------------------------------------------------------------------------------------

RUN = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-2}


@pytest.mark.parametrize("schedule", ["linear", "learned"])
def test_a_lora_run_trains_saves_and_loads_merged(build, tmp_path, schedule):
    options = {"temperature_schedule": schedule} | ({"final_temperature": 0.02} if schedule == "linear" else {})
    model = build(**LORA, **options)
    before, trained = parameters(model), trained_names(model)
    trainer = digit_trainer(tmp_path / "run", model, **RUN, **options)
    trainer.train()
    moved = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert moved == trained
    temperatures = logged(trainer, "temperature")
    assert len(set(temperatures)) == 5
    trainer.save_model()

    folder = tmp_path / "run"
    images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(16)])
    with torch.no_grad():
        expected = trainer.bpgcn.eval()(images)
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        answers = loaded(images)
    assert len(loaded.support_bank) == len(digits().train)
    assert not any("lora" in name for name in loaded.state_dict())
    assert torch.allclose(answers.logits, expected.logits, atol=1e-5)
    # merged weights differ in their last bit, and so may the order of neighbors that are as near
    order, other = (given.neighbor_indices.argsort(-1) for given in (answers, expected))
    assert torch.equal(answers.neighbor_indices.gather(1, order), expected.neighbor_indices.gather(1, other))
    assert torch.allclose(answers.neighbor_weights, expected.neighbor_weights, atol=1e-5)
    taus = [torch.as_tensor(model.bpgcn.ranking_temperature()).item() for model in (loaded, trainer.bpgcn)]
    assert taus[0] == pytest.approx(taus[1])
    assert (folder / "preprocessor_config.json").is_file()
    answer = pipeline("image-classification", model=str(folder))(to_rgb(digits().test[0]["image"]), top_k=10)
    pixels = trainer.eval_dataset[0]["pixel_values"][None]
    with torch.no_grad():
        logits = loaded(pixels).logits[0]
    assert answer[0]["label"] == str(int(logits.argmax()))

    # the trainer's own model is as it was: saving merged a copy
    assert isinstance(trainer.model, PeftModel)
    with torch.no_grad():
        assert torch.equal(trainer.bpgcn(images).logits, expected.logits)
    # the adapter alone, on the same base
    support = trainer.embed(trainer.support_dataset, "support")
    base = build(**options)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    base.config.ranking_temperature = trainer.bpgcn.config.ranking_temperature
    base.set_support_bank(*support)
    with torch.no_grad():
        assert torch.allclose(adapted(images).logits, expected.logits, atol=1e-5)
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_scheduled_temperature_reaches_the_ranking_under_lora(build, tmp_path):
    options = {"temperature_schedule": "linear", "final_temperature": 0.02}
    trainer = digit_trainer(tmp_path, build(**LORA, **options), max_steps=3, **options)
    trainer.train()
    assert trainer.bpgcn.config.ranking_temperature == pytest.approx(0.02)
    assert trainer.bpgcn.bpgcn.ranking_temperature() == pytest.approx(0.02)


def test_a_lora_run_resumes_bit_for_bit_from_its_checkpoint(build, tmp_path):
    options = {"temperature_schedule": "learned", **RUN}
    whole = digit_trainer(tmp_path / "run", build(**LORA, temperature_schedule="learned"), **options)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    for later in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / "run" / later)
    assert last_whole_checkpoint(tmp_path / "run") == str(checkpoint)
    resumed = digit_trainer(tmp_path / "run", build(**LORA, temperature_schedule="learned"), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert len(set(logged(whole, "loss"))) == 5


def test_the_best_lora_model_answers_from_its_own_bank(build, tmp_path):
    """An adapter's checkpoint holds no bank: the one at hand belongs to the last evaluation, not to the best model."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    # the head learns, then the adapters wreck the features
    wreck = {"head_only_steps": 2, "learning_rate": 5.0, "lr_scheduler_type": "constant"}
    trainer = digit_trainer(tmp_path, build(**LORA), **(RUN | best | wreck | {"max_steps": 4}))
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_global_step == 2
    assert losses[2] < losses[4]
    trainer.save_model()
    rows = [trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))]
    images, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        loss = AutoModelForImageClassification.from_pretrained(tmp_path)(images, labels=labels).loss
    assert loss.item() == pytest.approx(losses[2], rel=1e-4)


def test_a_merged_model_of_a_bf16_run_answers_the_same(build, tmp_path):
    trainer = digit_trainer(tmp_path, build(**LORA), **(RUN | {"max_steps": 2, "bf16": True}))
    trainer.train()
    trainer.save_model()
    transform = image_transform(PROCESSOR)
    image = digits().test.with_transform(transform)[0]["pixel_values"][None]
    with torch.no_grad():
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)(image).logits
        assert torch.allclose(loaded, trainer.bpgcn.eval()(image).logits, atol=1e-2)


def test_the_recipe_of_these_tests_has_dropout_and_augmentation():
    assert RECIPE["augmentation"] == "shift"
    assert RECIPE["backbone_config"]["hidden_dropout_prob"] > 0
