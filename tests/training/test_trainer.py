"""The trainer: optimizer, batches, logs, evaluation, checkpoints that resume bit for bit, and bad input."""

import copy
import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, TrainerCallback

from modeling_bpgcn import modeling_bpgcn, objectives
from modeling_bpgcn.graph import RankingGraph
from modeling_bpgcn.ranking import soft_topk
from modeling_bpgcn.training.data import DataArguments, load_image_data
from modeling_bpgcn.training.loading import read_classes
from modeling_bpgcn.training.run_folder import last_whole_checkpoint
from modeling_bpgcn.training.sampler import RepeatableRows
from modeling_bpgcn.training.trainer import BPGCNTrainer
from tests.model_factory import captured_warnings, only, tiny_backbone, tiny_images
from tests.training_factory import (
    ROOT,
    arguments,
    digit_trainer,
    digits,
    logged,
    parameters,
    script_environment,
    tiny_digit_model,
    trained,
)

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
# no draw of random numbers in a step: no dropout, and losses without a random half
PLAIN = {"head_dropout": 0.0, "propagation_loss_weight": 0.0, "neighborhood_loss_weight": 0.5}


def plain_model(**overrides):
    return tiny_digit_model(backbone_config=tiny_backbone(hidden_size=16), **(PLAIN | overrides))


class Rows(torch.utils.data.Dataset):
    """Rows that the transform has made already, from tensors."""

    def __init__(self, images, labels, ids=None):
        self.images, self.labels = images, labels
        self.ids = range(len(images)) if ids is None else ids

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return {"pixel_values": self.images[row], "labels": int(self.labels[row]), "node_ids": int(self.ids[row])}


def row_trainer(output_dir, rows, model=None, train_classes=None, **overrides):
    model = plain_model() if model is None else model
    options = {"train_dataset": rows, "support_dataset": rows, "eval_dataset": rows, "train_classes": train_classes}
    return BPGCNTrainer(model, arguments(output_dir, **overrides), **options)


def finite(model) -> bool:
    return all(torch.isfinite(parameter).all() for parameter in model.parameters())


class StopAt(TrainerCallback):
    """End the training after a step, as a killed process would: the schedule still aims at max_steps."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# --- optimizer --------------------------------------------------------------------------------------------------------


def test_backbone_head_and_temperature_have_their_own_learning_rates(tmp_path):
    rates = {"backbone_learning_rate": 1e-3, "head_learning_rate": 2e-2, "temperature_learning_rate": 3e-1}
    model = tiny_digit_model(learn_temperature=True)
    trainer = digit_trainer(tmp_path, model, temperature_schedule="learned", weight_decay=0.1, max_steps=4, **rates)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {group["name"]: group["initial_lr"] for group in groups} == {
        "backbone": 1e-3,
        "head": 2e-2,
        "temperature": 3e-1,
    }
    # the schedule scales each: linear decay, read after the step's own decay
    for name, rate in rates.items():
        assert logged(trainer, name) == pytest.approx([rate * share for share in (0.75, 0.5, 0.25, 0.0)])


def test_each_trained_parameter_is_in_one_group_and_biases_do_not_decay(tmp_path):
    model = tiny_digit_model(learn_temperature=True)
    trainer = digit_trainer(tmp_path, model, temperature_schedule="learned", weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(members)) == len(members)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(members) == names.keys()
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay["bpgcn.ranking_temperature.log_temperature"] == 0.0
    for name in ("head.layers.0.bias", "bpgcn.backbone.layernorm.weight", "bpgcn.backbone.layernorm.bias"):
        assert decay[name] == 0.0
    assert decay["head.layers.0.weight"] == 0.1
    assert any(value == 0.1 for name, value in decay.items() if ".backbone." in name)


def test_the_backbone_has_the_general_learning_rate_unless_given(tmp_path):
    trainer = digit_trainer(tmp_path, learning_rate=4e-4)
    rates = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {"backbone": 4e-4, "head": 1e-2}


def test_a_model_in_which_nothing_trains_is_refused(tmp_path):
    trainer = digit_trainer(tmp_path, freeze=["."])
    with pytest.raises(ValueError, match="No parameter trains: freeze fewer of them, or raise trainable_blocks"):
        trainer.create_optimizer()


def test_head_only_steps_leave_the_backbone_untouched_and_then_it_moves(tmp_path):
    model = tiny_digit_model()
    start = parameters(model)
    seen = {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = parameters(model)

    trainer = digit_trainer(tmp_path, model, max_steps=4, head_only_steps=2, weight_decay=0.1)
    trainer.add_callback(Record())
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in trained if ".backbone." in name}
    assert backbone
    assert backbone < trained
    for step in (1, 2):
        assert all(torch.equal(seen[step][name], start[name]) for name in backbone)
        assert not any(torch.equal(seen[step][name], start[name]) for name in trained - backbone)
    assert not any(torch.equal(seen[4][name], start[name]) for name in backbone)
    # what no gradient reaches is not logged as a gradient of 0 either
    assert len(logged(trainer, "ranking_gradient_norm")) == 2


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_mix_labelled_and_unlabelled_images_in_the_ratio_asked(tmp_path):
    trainer = digit_trainer(tmp_path, labeled_batch_fraction=0.75)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) >= 4
    for batch in batches:
        assert batch["pixel_values"].shape == (16, 3, 8, 8)
        assert int((batch["labels"] >= 0).sum()) == 12
        assert batch["node_ids"].unique().numel() == 16


def test_class_balanced_batches_hold_every_class_equally(tmp_path):
    trainer = digit_trainer(tmp_path, labeled_batch_fraction=0.625, class_balanced_batches=True)
    batches = list(trainer.get_train_dataloader())
    assert batches
    for batch in batches:
        labels = batch["labels"][batch["labels"] >= 0]
        assert labels.bincount(minlength=10).tolist() == [1] * 10


def test_without_a_ratio_an_epoch_is_one_pass_over_the_images(tmp_path):
    trainer = digit_trainer(tmp_path)
    ids = torch.cat([batch["node_ids"] for batch in trainer.get_train_dataloader()])
    assert sorted(ids.tolist()) == sorted(digits().train["node_id"][:])


def test_classes_of_another_data_set_are_given_by_name(tmp_path):
    rows = Rows(tiny_images(32), [0, 1, -100, -100] * 8)
    with pytest.raises(ValueError, match="labeled_batch_fraction needs to know which images are labelled"):
        row_trainer(tmp_path, rows, labeled_batch_fraction=0.5).get_train_dataloader()
    trainer = row_trainer(tmp_path, rows, labeled_batch_fraction=0.25, train_classes=rows.labels)
    assert {int((batch["labels"] >= 0).sum()) for batch in trainer.get_train_dataloader()} == {4}


def test_a_trainer_without_training_images_says_so(tmp_path):
    trainer = BPGCNTrainer(plain_model(), arguments(tmp_path))
    with pytest.raises(ValueError, match="Training needs a train_dataset"):
        trainer.get_train_dataloader()
    with pytest.raises(ValueError, match="answers from a support bank: pass support_dataset or train_dataset"):
        trainer.evaluate(Rows(tiny_images(2), [0, 1]))


def test_augmentation_depends_on_the_batch_and_the_seed_alone():
    rows = digits().train.with_transform(lambda batch: {"noise": torch.rand(len(batch["label"]))})
    repeatable = RepeatableRows(rows, seed=3)
    first = repeatable.__getitems__([5, 2, 9])
    state = torch.get_rng_state()
    assert repeatable.__getitems__([5, 2, 9]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len({float(row["noise"]) for row in first}) == 3
    assert repeatable.__getitems__([2, 5, 9]) != first
    assert RepeatableRows(rows, seed=4).__getitems__([5, 2, 9]) != first
    assert len(repeatable) == len(rows)


# --- logs -------------------------------------------------------------------------------------------------------------


def test_logs_say_what_the_ranking_and_the_gradients_do(tmp_path):
    weights = {
        "head_loss": 0.7,
        "propagation_loss": 1.3,
        "neighborhood_loss": 0.3,
        "consistency_loss": 0.2,
        "propagation_consistency_loss": 0.6,
    }
    model = tiny_digit_model(**{f"{name}_weight": weight for name, weight in weights.items()})
    trainer = digit_trainer(tmp_path, model, max_steps=3, labeled_batch_fraction=0.5)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert all(entry[name] > 0 for name in weights)
        assert entry["loss"] == pytest.approx(sum(weight * entry[name] for name, weight in weights.items()), rel=1e-5)
        assert entry["temperature"] == 0.1
        assert 1 <= entry["effective_neighbors"] <= 4
        assert 0 <= entry["homophily"] <= 1
        assert entry["ranking_gradient_norm"] > 0
        assert entry["feature_gradient_norm"] > 0
        assert entry["grad_norm"] > 0


def test_logs_are_means_since_the_last_one(tmp_path):
    each, pairs = (trained(tmp_path, max_steps=4, logging_steps=steps) for steps in (1, 2))
    for name in ("loss", "effective_neighbors", "homophily", "ranking_gradient_norm", "head_loss"):
        one, two = torch.tensor(logged(each, name)), torch.tensor(logged(pairs, name))
        assert torch.allclose(one.view(2, 2).mean(1), two, rtol=1e-5), name


def test_effective_neighbors_and_homophily_of_a_batch_by_hand(tmp_path):
    trainer = digit_trainer(tmp_path, plain_model(), max_steps=1, augmentation="none")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        outputs = copy.deepcopy(trainer.model).train()(**batch)
    trainer.train()
    weights, labels = outputs.neighbor_weights, batch["labels"]
    pairs = [
        (labels[i], labels[j])
        for i, row in enumerate(outputs.neighbor_indices.tolist())
        for j in row
        if labels[i] >= 0 and labels[j] >= 0
    ]
    assert len(pairs) > 10
    (homophily,) = logged(trainer, "homophily")
    assert homophily == pytest.approx(sum(int(a == b) for a, b in pairs) / len(pairs))
    (effective,) = logged(trainer, "effective_neighbors")
    entropy = -(weights * weights.log()).sum(1)
    assert effective == pytest.approx(float(entropy.exp().mean()), rel=1e-5)


def test_the_two_gradient_norms_equal_autograd_by_hand(tmp_path):
    trainer = digit_trainer(tmp_path, plain_model(), max_steps=1, augmentation="none", labeled_batch_fraction=0.75)
    model = copy.deepcopy(trainer.model).train()
    batch = next(iter(trainer.get_train_dataloader()))
    labels, config = batch["labels"], model.config

    # the forward pass written out on two copies of the features, one for each path
    features = model.get_image_features(batch["pixel_values"]).detach()
    ranked, messages = features.clone().requires_grad_(), features.clone().requires_grad_()
    ranking = soft_topk(ranked, num_neighbors=4, temperature=0.1, query_ids=batch["node_ids"])
    graph = RankingGraph.from_ranking(ranking, self_weight=config.self_weight)
    log_probabilities = torch.log_softmax(model.head(messages, graph)[0], dim=-1)
    label_graph = RankingGraph.from_ranking(ranking, self_weight=0.0)
    loss = config.head_loss_weight * F.nll_loss(log_probabilities, labels, ignore_index=-100)
    loss = loss + config.consistency_loss_weight * objectives.consistency_loss(log_probabilities, labels)
    loss = loss + objectives.propagation_consistency_loss(model.label_propagation, label_graph, labels, 10)
    loss = loss + 0.5 * objectives.neighborhood_loss(ranked, labels, batch["node_ids"], 0.1, "cosine")
    loss.backward()

    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert ranked.grad.norm() > 1e-4
    assert messages.grad.norm() > 1e-4
    assert logged(trainer, "ranking_gradient_norm") == pytest.approx([ranked.grad.norm().item()], rel=1e-4)
    assert logged(trainer, "feature_gradient_norm") == pytest.approx([messages.grad.norm().item()], rel=1e-4)


def test_a_linear_head_with_its_loss_alone_has_no_gradient_through_the_ranking(tmp_path):
    model = tiny_digit_model(head="linear", propagation_mix=0.0, **only("head_loss"))
    trainer = digit_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "feature_gradient_norm")) == 2
    assert all(norm > 0 for norm in logged(trainer, "feature_gradient_norm"))
    assert not any(logged(trainer, "ranking_gradient_norm"))


@pytest.mark.parametrize("loss", ["propagation_loss", "propagation_consistency_loss"])
def test_a_loss_of_propagated_labels_alone_has_no_gradient_through_the_features(tmp_path, loss):
    trainer = digit_trainer(tmp_path, tiny_digit_model(**only(loss)), max_steps=2)
    trainer.train()
    assert len(logged(trainer, "ranking_gradient_norm")) == 2
    assert all(norm > 0 for norm in logged(trainer, "ranking_gradient_norm"))
    assert not any(logged(trainer, "feature_gradient_norm"))


# --- evaluation -------------------------------------------------------------------------------------------------------


def by_hand(trainer, support) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers, classes, and classes of the neighbours, with the model's own `build_support_bank`."""
    model = copy.deepcopy(trainer.model)
    model.build_support_bank(support, progress=False)
    queries = [trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))]
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in queries]) for name in queries[0]}
    with torch.no_grad():
        outputs = model.eval()(batch["pixel_values"], node_ids=batch["node_ids"])
    return outputs.logits, batch["labels"], model.support_bank.classes[outputs.neighbor_indices]


def test_evaluation_answers_from_a_bank_of_the_support_images(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=4, per_device_eval_batch_size=10)
    trainer.train()
    metrics = trainer.evaluate()
    logits, labels, neighbors = by_hand(trainer, trainer.support_dataset)
    assert len(trainer.bpgcn.support_bank) == trainer.bpgcn.config.bank_size == len(digits().train)
    assert len(labels) == len(digits().test) > 30
    answers = logits.argmax(1)
    assert metrics["eval_loss"] == pytest.approx(F.nll_loss(logits, labels).item(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert metrics["eval_macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    known = neighbors >= 0
    same = (neighbors == labels[:, None]) & known
    shares = (same.sum(1) / known.sum(1))[known.any(1)]  # of each query's neighbours of known class
    assert metrics["eval_neighbor_homophily"] == pytest.approx(shares.mean().item(), rel=1e-6)
    assert 0 < metrics["eval_accuracy"] < 1


def test_the_bank_holds_the_support_images_not_the_augmented_training_images(tmp_path):
    trainer = digit_trainer(tmp_path)
    trainer.build_support_bank()
    expected, classes, ids = trainer.embed(trainer.support_dataset, "again")
    bank = trainer.bpgcn.support_bank
    assert torch.equal(bank.features, expected)
    assert torch.equal(bank.ids, ids)
    assert ids.tolist() == digits().train["node_id"][:]
    assert classes.tolist() == digits().train["label"][:]
    assert (classes == -100).any()
    assert (classes >= 0).any()


def test_transductive_evaluation_is_one_graph_of_support_and_test_images(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=4, transductive_evaluation=True, per_device_eval_batch_size=10)
    trainer.train()
    metrics = trainer.evaluate()
    model = copy.deepcopy(trainer.model).eval()
    features, labels, ids = trainer.embed(trainer.eval_dataset, "queries")
    with torch.no_grad():
        answers = model(features=features, node_ids=ids, support="transductive").logits.argmax(1)
    assert metrics["eval_transductive_accuracy"] == pytest.approx(accuracy_score(labels, answers))
    names = {name.removeprefix("eval_transductive_") for name in metrics if name.startswith("eval_transductive_")}
    assert names == {"accuracy", "macro_f1", "ece", "neighbor_homophily"}
    assert any("eval_transductive_accuracy" in entry for entry in trainer.state.log_history)
    inductive = digit_trainer(tmp_path).evaluate()
    assert not any("transductive" in name for name in inductive)


def test_a_step_of_training_drops_the_bank(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=1)
    trainer.evaluate()
    assert len(trainer.bpgcn.support_bank) > 0
    trainer.train()
    assert len(trainer.bpgcn.support_bank) == 0


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_checkpoint_holds_the_bank_of_the_evaluation_before_it(tmp_path, evaluated):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2} if evaluated else {}
    trainer = digit_trainer(tmp_path, max_steps=2, **CHECKPOINTS, **evaluation)
    trainer.train()
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    rows = state["bpgcn.support_bank.features"].shape[0] if "bpgcn.support_bank.features" in state else 0
    assert rows == (len(digits().train) if evaluated else 0)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert len(loaded.support_bank) == rows
    if evaluated:
        image = trainer.eval_dataset[0]["pixel_values"][None]
        with torch.no_grad():
            # the weights lie elsewhere in memory, which may reorder a sum
            assert_close(loaded(image).logits, trainer.model.eval()(image).logits, rtol=0, atol=1e-6)


def test_evaluation_leaves_the_random_stream_of_training_alone(tmp_path):
    without = trained(tmp_path, max_steps=3)
    trainer = digit_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Embed(trainer))
    trainer.train()
    assert logged(trainer, "loss") == logged(without, "loss")


class Embed(TrainerCallback):
    """Embed the test images after each step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        assert len(self.trainer.embed(self.trainer.eval_dataset, "queries")[0])
        assert self.trainer.model.training


# --- best model, early stopping ---------------------------------------------------------------------------------------

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    **CHECKPOINTS,
}


def validated_trainer(output_dir, model=None, **overrides):
    """A trainer that chooses on validation images."""
    data = load_image_data(DataArguments("digits", labels_per_class=6, validation_fraction=0.3, max_images=96))
    assert len(data.validation)
    assert data.validation is not data.test
    data.test = data.validation
    return digit_trainer(output_dir, model, data=data, **(BEST | overrides))


def test_training_that_gets_no_better_stops_early(tmp_path):
    still = {"learning_rate": 0.0, "head_learning_rate": 0.0, "early_stopping_patience": 2}
    trainer = validated_trainer(tmp_path, max_steps=40, **still)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step == 2


def test_the_best_model_comes_back_whole(tmp_path):
    # the first steps teach the head, the later ones wreck the backbone
    wreck = {"learning_rate": 1.0, "head_learning_rate": 1e-2, "head_only_steps": 4, "lr_scheduler_type": "constant"}
    sharper = {"temperature_schedule": "linear", "final_temperature": 0.02}
    trainer = validated_trainer(tmp_path, max_steps=8, **wreck, **sharper)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert best < max(losses)
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in saved.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert len(saved.support_bank) > 0
    # the temperature is that of the best step too
    assert trainer.model.config.ranking_temperature == pytest.approx(saved.config.ranking_temperature)
    assert trainer.model.config.ranking_temperature == pytest.approx(0.1 - 0.08 * (best - 1) / 7)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


# --- gradient accumulation, precision, memory -------------------------------------------------------------------------


def test_accumulated_gradients_are_the_mean_over_micro_batches(tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.05, "head_learning_rate": 0.05, "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "max_steps": 1, "augmentation": "none", "weight_decay": 0.0}
    trainer = digit_trainer(tmp_path, plain_model(), gradient_accumulation_steps=2, **options)
    model = copy.deepcopy(trainer.model).train()
    batches = list(trainer.get_train_dataloader())[:2]
    assert all((batch["labels"] >= 0).any() for batch in batches)
    losses = [model(**batch).loss for batch in batches]
    assert abs(losses[0] - losses[1]) > 1e-3
    (sum(losses) / 2).backward()
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([sum(losses).item() / 2], rel=1e-5)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert any(p.grad.abs().max() > 1e-3 for _, p in trained)
    for name, p in trained:
        after = trainer.model.get_parameter(name)
        assert torch.allclose(after, p - 0.05 * p.grad, rtol=1e-4, atol=1e-6), name


def test_a_bf16_run_finishes_near_the_float32_one(tmp_path):
    runs = {bf16: trained(tmp_path, plain_model(), bf16=bf16, max_steps=3) for bf16 in (False, True)}
    assert all(finite(trainer.model) for trainer in runs.values())
    exact, half = (torch.tensor(logged(runs[bf16], "loss")) for bf16 in (False, True))
    assert not torch.equal(exact, half)
    assert torch.allclose(exact, half, rtol=0.05)
    assert all(norm > 0 for norm in logged(runs[True], "ranking_gradient_norm"))
    assert len(logged(runs[True], "ranking_gradient_norm")) == len(logged(runs[True], "feature_gradient_norm")) == 3
    assert runs[True].evaluate()["eval_loss"] == pytest.approx(runs[False].evaluate()["eval_loss"], rel=0.1)
    assert all(p.dtype == torch.float32 for p in runs[True].model.parameters())


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    runs = [trained(tmp_path, max_steps=3, activation_checkpointing=on) for on in (False, True)]
    assert runs[1].model.is_activation_checkpointing
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-5)
    assert logged(runs[1], "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-4)


# --- resume -----------------------------------------------------------------------------------------------------------


def assert_same_run(one, other) -> None:
    """All parameters, the optimizer's state and everything logged, bit for bit."""
    for (name, p), (_, q) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [trainer.optimizer.state_dict() for trainer in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][index][key]))
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    histories = [
        [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in t.state.log_history]
        for t in (one, other)
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("saved_at", "options"),
    [
        pytest.param(3, {}, marks=pytest.mark.slow),  # in the middle of the first epoch
        (4, {}),  # at its end
        pytest.param(6, {}, marks=pytest.mark.slow),  # in the middle of the second
        (3, {"gradient_accumulation_steps": 2}),
        (3, {"labeled_batch_fraction": 0.5, "class_balanced_batches": True}),
        (3, {"eval_strategy": "steps", "eval_steps": 3, "transductive_evaluation": True}),
        (3, {"dataloader_num_workers": 2}),
        (3, {"head_only_steps": 5}),
        (3, {"bf16": True}),
        (3, {"gradient_cache_chunk_size": 5}),
        (3, {"graph_scope": "full", "per_device_train_batch_size": 20}),
        (6, {"graph_scope": "memory", "memory_size": 40}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value) or "plain",
)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, saved_at, options):
    common = {"max_steps": 9, "temperature_schedule": "learned", "weight_decay": 0.05, "warmup_steps": 2, **options}
    common |= {"save_strategy": "steps", "save_steps": saved_at}

    def build(folder):
        return digit_trainer(tmp_path / folder, tiny_digit_model(learn_temperature=True), **common)

    whole = build("whole")
    whole.train()
    cut = build("cut")
    cut.add_callback(StopAt(saved_at + 1))
    cut.train()
    assert cut.state.global_step == saved_at + 1
    resumed = build("cut")
    torch.rand(7)  # another process is at another point of its random stream
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{saved_at}"))
    assert resumed.state.global_step == 9
    assert len(set(logged(whole, "loss"))) == 9
    assert_same_run(whole, resumed)


def test_augmentation_and_dropout_were_on_in_these_runs(tmp_path):
    batches = [
        next(iter(digit_trainer(tmp_path, augmentation=kind).get_train_dataloader())) for kind in ("none", "shift")
    ]
    assert torch.equal(batches[0]["node_ids"], batches[1]["node_ids"])
    assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    model = tiny_digit_model().train()
    features = [model.get_image_features(batches[0]["pixel_values"]) for _ in range(2)]
    assert not torch.equal(*features)
    assert model.config.head_dropout == 0.5


def test_the_number_of_loader_processes_changes_nothing(tmp_path):
    assert_same_run(*(trained(tmp_path, max_steps=5, dataloader_num_workers=workers) for workers in (0, 2)))


# --- a disk that fills up ---------------------------------------------------------------------------------------------

DISK_FULL = """
import resource, sys, signal
from transformers import TrainerCallback
from tests.training_factory import digit_trainer

class Fill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))

trainer = digit_trainer(sys.argv[1], max_steps=9, save_strategy="steps", save_steps=2)
trainer.add_callback(Fill())
trainer.train()
"""


@pytest.mark.parametrize(
    "limit", [pytest.param(1000, id="model"), pytest.param(40_000, id="optimizer", marks=pytest.mark.slow)]
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_the_one_before_resumes(tmp_path, limit):
    """The limit fails the model's file, or lets it pass and fails the larger one of the optimizer."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL.format(limit=limit), str(folder)],
        cwd=ROOT,
        env=script_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"OSError: {folder / 'checkpoint-4'} cannot be written (")
    assert f"Free some space; the same command goes on from {folder / 'checkpoint-2'}." in message
    sizes = {path.name: path.stat().st_size for path in (folder / "checkpoint-2").iterdir()}
    failing = "model.safetensors" if limit == 1000 else "optimizer.pt"
    assert sizes[failing] > limit
    assert failing == "model.safetensors" or sizes["model.safetensors"] < limit
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")

    options = {"max_steps": 9, **CHECKPOINTS}
    resumed = digit_trainer(folder, **options)
    resumed.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    assert_same_run(trained(tmp_path / "whole", **options), resumed)


def test_a_first_checkpoint_that_cannot_be_written_says_that_there_is_none(tmp_path):
    trainer = digit_trainer(tmp_path / "run", max_steps=2, **CHECKPOINTS)
    (tmp_path / "run" / "checkpoint-2").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written .* starts from the beginning, as there is no"):
        trainer.train()


def test_a_model_that_cannot_be_written_at_the_end_is_named(tmp_path):
    folder = tmp_path / "run"
    trainer = digit_trainer(folder, max_steps=2, **CHECKPOINTS)
    trainer.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.build_support_bank()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=f"{folder} cannot be written .* goes on from {folder / 'checkpoint-2'}"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_than_writing_pass_as_they_are(tmp_path):
    class Odd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("something else")

    trainer = digit_trainer(tmp_path, max_steps=2, **CHECKPOINTS)
    trainer.add_callback(Odd())
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer.train()


# --- a saved model ----------------------------------------------------------------------------------------------------


def test_a_model_saved_by_name_has_a_bank_and_a_processor_and_answers_the_same(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert len(trainer.bpgcn.support_bank) == 0
    trainer.save_model()
    assert (tmp_path / "preprocessor_config.json").is_file()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert len(loaded.support_bank) == len(digits().train)
    images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(8)])
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, trainer.model.eval()(images).logits)


# --- bad input that training survives ---------------------------------------------------------------------------------


def test_a_batch_without_a_labelled_image_trains_on_and_says_so_once(tmp_path):
    rows = Rows(tiny_images(32), [-100] * 32)
    model = plain_model(propagation_loss_weight=1.0, consistency_loss_weight=1.0)
    before = parameters(model)
    with captured_warnings(objectives.logger) as messages:
        trainer = row_trainer(tmp_path, rows, model, max_steps=3)
        trainer.train()
    assert [message for message in messages if "A batch holds no labelled image" in message] == messages
    assert len(messages) == 1
    assert logged(trainer, "head_loss") == logged(trainer, "propagation_loss") == [0.0] * 3
    assert "homophily" not in trainer.state.log_history[0]
    assert finite(model)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_without_labels_and_without_a_loss_that_needs_none_nothing_breaks(tmp_path):
    model = tiny_digit_model(consistency_loss_weight=0.0)
    trainer = row_trainer(tmp_path, Rows(tiny_images(16), [-100] * 16), model, max_steps=2)
    with captured_warnings(objectives.logger):
        trainer.train()
    assert logged(trainer, "loss") == [0.0, 0.0]
    assert finite(trainer.model)


def test_a_batch_of_fewer_images_than_neighbours_trains_and_says_so_once(tmp_path):
    rows = Rows(tiny_images(12), [0, 1, 2, 3] * 3)
    with captured_warnings(modeling_bpgcn.logger) as messages:
        trainer = row_trainer(tmp_path, rows, plain_model(num_neighbors=6), per_device_train_batch_size=4, max_steps=3)
        trainer.train()
    assert len(messages) == 1
    assert "num_neighbors=6" in messages[0]
    assert all(1 <= effective <= 3 for effective in logged(trainer, "effective_neighbors"))
    assert finite(trainer.model)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 16), (16, 1)])
def test_a_training_batch_of_a_single_image_is_refused(tmp_path, count, batch_size):
    trainer = row_trainer(tmp_path, Rows(tiny_images(count), [0] * count), per_device_train_batch_size=batch_size)
    with pytest.raises(ValueError, match="batch_size=1: the batch is the graph, so it needs 2 images or more"):
        trainer.train()


def test_a_batch_of_two_images_trains(tmp_path):
    with captured_warnings(modeling_bpgcn.logger):
        trainer = row_trainer(tmp_path, Rows(tiny_images(2), [0, 1]), tiny_digit_model(), max_steps=3)
        trainer.train()
    assert finite(trainer.model)
    assert all(math.isfinite(loss) and loss > 0 for loss in logged(trainer, "loss"))


def test_evaluation_of_single_images_equals_that_of_all_at_once(tmp_path):
    metrics = [digit_trainer(tmp_path, per_device_eval_batch_size=size).evaluate() for size in (1, 64)]
    for name in ("eval_accuracy", "eval_neighbor_homophily"):
        assert metrics[0][name] == metrics[1][name]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-5)


def test_duplicate_images_train_and_answer(tmp_path):
    """Every image four times: their similarity is 1, and self cannot be told by its position."""
    images = tiny_images(4).repeat(4, 1, 1, 1)
    labels = [0, 1, 2, 3] * 4
    trainer = row_trainer(tmp_path, Rows(images, labels), plain_model(num_neighbors=3), max_steps=4)
    trainer.train()
    assert finite(trainer.model)
    assert all(norm > 0 for norm in logged(trainer, "feature_gradient_norm"))
    # the three nearest of each are its copies, and never itself
    assert logged(trainer, "homophily")[0] == 1.0
    assert trainer.evaluate()["eval_neighbor_homophily"] == 1.0


def test_identical_images_train_without_a_number_that_is_none(tmp_path):
    trainer = row_trainer(tmp_path, Rows(torch.ones(8, 3, 8, 8), [0, 1] * 4), tiny_digit_model(), max_steps=3)
    trainer.train()
    assert finite(trainer.model)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_classes_are_read_from_the_column_that_the_transform_reads(tmp_path):
    rows = Dataset.from_dict({"image": [0, 1, 2], "label": [1, -100, 0], "node_id": [0, 1, 2]})
    trainer = BPGCNTrainer(plain_model(), arguments(tmp_path), train_dataset=rows.with_transform(lambda rows: rows))
    assert list(read_classes(trainer.args, trainer.train_dataset)) == [1, -100, 0]
