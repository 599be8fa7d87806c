"""Recipes and options: the recipe sets defaults, the command line wins, and what is wrong is named."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from modeling_bpgcn import BPGCNConfig
from modeling_bpgcn.configuration_bpgcn import CHOICES
from modeling_bpgcn.training.arguments import parse_arguments
from modeling_bpgcn.training.model_arguments import CONFIG_FIELDS, ModelArguments
from tests.training_factory import ROOT, arguments

RECIPES = sorted((ROOT / "configuration").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    def write(**settings) -> str:
        settings = {"dataset": "digits", "output_dir": str(tmp_path / "run"), "use_cpu": True} | settings
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return str(path)

    return write


def refused(capsys, *given) -> str:
    """The message that ends the program, as a user reads it."""
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(list(given))
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- who wins ---------------------------------------------------------------------------------------------------------


def test_the_recipe_sets_defaults_and_the_command_line_wins(recipe):
    path = recipe(num_neighbors=7, max_steps=11, labels_per_class=3, learning_rate=2.5e-4)
    model, data, training = parse_arguments([path])
    assert (model.num_neighbors, data.labels_per_class, training.max_steps) == (7, 3, 11)
    assert training.learning_rate == 2.5e-4
    model, data, training = parse_arguments([path, "--num_neighbors", "20", "--labels_per_class=5"])
    assert (model.num_neighbors, data.labels_per_class, training.max_steps) == (20, 5, 11)


def test_options_alone_need_no_recipe(tmp_path):
    model, data, training = parse_arguments(["--dataset", "digits", "--output_dir", str(tmp_path), "--head", "sgc"])
    assert (model.head, data.dataset, training.output_dir) == ("sgc", "digits", str(tmp_path))


def test_what_the_recipe_leaves_out_keeps_its_default(recipe):
    model, _, training = parse_arguments([recipe()])
    assert (model.num_neighbors, training.head_learning_rate, training.head_only_steps) == (10, 1e-2, 0)


def test_a_required_option_may_come_from_either(recipe, capsys):
    assert parse_arguments([recipe(dataset=None), "--dataset", "digits"])[1].dataset == "digits"
    assert "the following arguments are required: --dataset" in refused(capsys, recipe(dataset=None))


def test_true_and_false_can_be_set_and_reset(recipe):
    path = recipe(transductive_evaluation=True, class_balanced_batches=False)
    _, _, training = parse_arguments([path, "--transductive_evaluation", "false", "--class_balanced_batches"])
    assert (training.transductive_evaluation, training.class_balanced_batches) == (False, True)


def test_a_nested_backbone_config_comes_from_the_recipe(recipe):
    backbone = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1}
    assert parse_arguments([recipe(backbone_config=backbone)])[0].backbone_config == backbone


def test_nested_settings_of_trainer_are_understood_as_it_does(recipe):
    path = recipe(accelerator_config={"split_batches": True}, lr_scheduler_kwargs={"num_cycles": 0.25})
    training = parse_arguments([path])[2]
    assert training.accelerator_config.split_batches is True
    assert training.lr_scheduler_kwargs == {"num_cycles": 0.25}


def test_a_list_of_one_needs_no_brackets(recipe):
    model, _, training = parse_arguments([recipe(freeze="embeddings", lora_target_modules="q_proj")])
    assert (training.freeze, model.lora_target_modules) == (["embeddings"], ["q_proj"])
    assert parse_arguments([recipe(freeze=["a", "b"])])[2].freeze == ["a", "b"]
    assert parse_arguments([recipe(freeze="a"), "--freeze", "b", "c"])[2].freeze == ["b", "c"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("num_neighbours", "num_neighbors"), ("learnin_rate", "learning_rate"), ("head_sise", None)]
)
def test_an_unknown_key_of_the_recipe_is_named_with_the_nearest_known_one(recipe, capsys, wrong, nearest):
    path = recipe(**{wrong: 1})
    message = refused(capsys, path)
    assert f"{path}: {wrong} is no option." in message
    assert f"Did you mean {nearest}?" in message if nearest else "Did you mean head_" in message


@pytest.mark.parametrize("option", ["--num_neighbours", "--num_neighbours=20", "--num-neighbors"])
def test_an_unknown_option_is_named_with_the_nearest_known_one(recipe, capsys, option):
    message = refused(capsys, recipe(), option, "20")
    assert f"the command line: {option.split('=')[0][2:]} is no option. Did you mean num_neighbors?" in message


def test_a_shortened_option_is_not_guessed(recipe, capsys):
    assert "num_neigh is no option. Did you mean num_neighbors?" in refused(capsys, recipe(), "--num_neigh", "20")


def test_an_option_like_nothing_known_points_to_the_help(recipe, capsys):
    assert "zzzzqq is no option. --help lists them all." in refused(capsys, recipe(), "--zzzzqq", "1")


def test_a_word_that_belongs_to_no_option_is_named(recipe, capsys):
    assert "second.yaml belongs to no option" in refused(capsys, recipe(), "second.yaml")


def test_a_missing_recipe_is_named(tmp_path, capsys):
    message = refused(capsys, str(tmp_path / "nowhere.yaml"))
    assert f"the recipe {tmp_path / 'nowhere.yaml'} does not exist" in message


@pytest.mark.parametrize("text", ["- dataset\n- digits\n", "digits\n", "3\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, capsys, text):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    assert f"the recipe {path} must hold lines of `name: value`." in refused(capsys, str(path))


def test_a_recipe_that_is_no_yaml_is_named(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("dataset: [digits\nmax_steps: 3\n")
    message = refused(capsys, str(path))
    assert f"the recipe {path} is no YAML" in message
    assert "line 2, column 10" in message


def test_a_key_that_is_a_number_is_named(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: digits\n3: 4\n")
    assert f"{path}: 3 is no option." in refused(capsys, str(path))


def test_no_argument_at_all_asks_for_a_recipe(capsys):
    assert "give a recipe, such as configuration/digits.yaml, or --help." in refused(capsys)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "ranking_temperature", "final_temperature"])
def test_a_number_that_yaml_reads_as_text_is_named(tmp_path, capsys, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"dataset: digits\n{name}: 1e-4\n")
    assert f"{name}: 1e-4 is text to YAML; write a number such as 1.0e-4." in refused(capsys, str(path))


def test_other_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: digits\nadam_epsilon: 1e-7\nlabeled_fraction: 5e-1\n")
    _, data, training = parse_arguments([str(path)])
    assert (training.adam_epsilon, data.labeled_fraction) == (1e-7, 0.5)


@pytest.mark.parametrize("name", ["num_neighbors", "max_steps", "labels_per_class"])
def test_a_word_in_place_of_a_number_is_named(recipe, capsys, name):
    message = refused(capsys, recipe(**{name: "ten"}))
    assert name in message
    assert "invalid int value: 'ten'" in message


def test_the_best_model_is_not_chosen_on_test_images(recipe, capsys):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    best |= {"save_steps": 5}
    message = refused(capsys, recipe(**best))
    assert "load_best_model_at_end would choose on test images: set validation_fraction" in message
    assert parse_arguments([recipe(**best, validation_fraction=0.1)])[2].load_best_model_at_end
    assert parse_arguments([recipe(**best, validation_split="validation")])[2].load_best_model_at_end


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backbone_learning_rate", "head_learning_rate", "temperature_learning_rate"])
def test_a_negative_rate_is_refused(tmp_path, name):
    assert getattr(arguments(tmp_path, **{name: 0.0}), name) == 0.0
    with pytest.raises(ValueError, match=rf"{name}=-0.1 must not be negative\."):
        arguments(tmp_path, **{name: -0.1})


@pytest.mark.parametrize("name", ["trainable_blocks", "head_only_steps"])
def test_a_negative_count_is_refused(tmp_path, name):
    assert getattr(arguments(tmp_path, **{name: 0}), name) == 0
    with pytest.raises(ValueError, match=rf"{name}=-1 must be 0 or more\."):
        arguments(tmp_path, **{name: -1})


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("final", [None, 0.0, -0.1])
def test_a_moving_temperature_needs_an_end_above_0(tmp_path, kind, final):
    with pytest.raises(ValueError, match=f"temperature_schedule='{kind}' needs final_temperature above 0; it is"):
        arguments(tmp_path, temperature_schedule=kind, final_temperature=final)
    assert arguments(tmp_path, temperature_schedule=kind, final_temperature=0.02).final_temperature == 0.02


@pytest.mark.parametrize("kind", ["constant", "learned"])
def test_an_end_without_a_moving_temperature_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"final_temperature=0.1 has no effect with temperature_schedule='{kind}'"):
        arguments(tmp_path, temperature_schedule=kind, final_temperature=0.1)


@pytest.mark.parametrize("name", ["temperature_schedule", "baselines"])
def test_an_unknown_choice_is_named_with_those_that_exist(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}='everything' is unknown: choose one of .*, "):
        arguments(tmp_path, **{name: "everything"})


def test_early_stopping_needs_a_best_model(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience needs load_best_model_at_end"):
        arguments(tmp_path, early_stopping_patience=2)


# --- every recipe, every field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_opens_with_its_goal_and_command(path):
    settings = yaml.safe_load(path.read_text())
    given = [] if "dataset" in settings else ["--dataset", "digits"]
    given += [] if {"backbone", "backbone_config"} & settings.keys() else ["--backbone", "facebook/dinov2-small"]
    model, _, training = parse_arguments([str(path), *given])
    assert (model.backbone is None) != (model.backbone_config is None)
    config = BPGCNConfig(**{name: getattr(model, name) for name in CONFIG_FIELDS if name != "backbone_config"})
    assert config.num_neighbors == settings["num_neighbors"]
    assert training.max_steps == settings["max_steps"]
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# Goal ")
    assert second.startswith("# Command ")
    assert f"configuration/{path.name}" in second


def test_there_are_recipes():
    assert {"digits.yaml", "image_folder.yaml", "flowers17.yaml", "lora.yaml"} <= {path.name for path in RECIPES}


def test_model_arguments_are_the_choices_of_the_config_with_its_defaults():
    own = {f.name: f.default for f in dataclasses.fields(BPGCNConfig) if f.name in BPGCNConfig.__annotations__}
    # written by the model, or said by another option (temperature_schedule)
    chosen = own.keys() - {"bank_size", "bank_fingerprint", "learn_temperature", "backbone_config"}
    offered = {f.name: f for f in dataclasses.fields(ModelArguments)}
    assert chosen <= offered.keys()
    assert len(chosen) >= 28
    for name in chosen:
        assert offered[name].default == own[name], name
        assert offered[name].metadata.get("choices") == CHOICES.get(name), name
    assert {"bank_size", "bank_fingerprint", "learn_temperature"}.isdisjoint(offered)


def test_an_unknown_choice_on_the_command_line_is_refused(recipe, capsys):
    assert "invalid choice: 'gnc'" in refused(capsys, recipe(), "--head", "gnc")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("num_neighbors", "dataset", "head_only_steps", "learning_rate"))
    assert Path("train.py").name in text


# --- scopes of the graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph_scope": "all"}, "graph_scope='all' is unknown: choose one of batch, memory, full"),
        ({"ranking_shards": "columns"}, "ranking_shards='columns' is unknown"),
        ({"gradient_cache_chunk_size": 0}, "gradient_cache_chunk_size=0 must be 1 or more"),
        ({"graph_scope": "memory", "memory_size": -1}, "must be 0 or more"),
        ({"memory_size": 10}, "need graph_scope memory, not batch"),
        ({"graph_scope": "full", "memory_warmup_steps": 10}, "need graph_scope memory, not full"),
        ({"graph_scope": "memory", "ranking_shards": "rows"}, "leave ranking_shards at none"),
        ({"graph_scope": "full", "labeled_batch_fraction": 0.5}, "full has no batches to mix"),
        ({"graph_scope": "full", "gradient_accumulation_steps": 2}, "set gradient_accumulation_steps 1"),
        ({"ddp_find_unused_parameters": True}, "leave it out"),
    ],
)
def test_scopes_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_the_memory_has_a_size_unless_given_one(tmp_path):
    assert arguments(tmp_path, graph_scope="memory").memory_size == 4096
    assert arguments(tmp_path, graph_scope="memory", memory_size=7).memory_size == 7
    assert arguments(tmp_path).memory_size == 0
