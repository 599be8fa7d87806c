"""What a run is measured against, computed again by hand."""

import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from modeling_bpgcn.heads import LabelPropagation
from modeling_bpgcn.training import baselines
from modeling_bpgcn.training.baselines import FINE_TUNED, LINEAR, fine_tuned_linear, frozen_baselines, measure_baselines
from modeling_bpgcn.training.data import DataArguments, load_image_data
from tests.training_factory import digit_trainer, digits, parameters, tiny_digit_model

LINEAR_FEATURES = "frozen features, linear"
PROPAGATION = "frozen features, fixed graph, label propagation"
GCN = "frozen features, fixed graph, gcn head"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(baselines, "FIXED_GRAPH_STEPS", 20)


def by_method(rows: list[dict]) -> dict[str, dict]:
    assert all(row["baseline"] is True for row in rows)
    return {row["method"]: row for row in rows}


def dense_propagation(features, ids, classes, config) -> torch.Tensor:
    """Label propagation on the fixed graph of all images, as matrices [N, N] and [N, C]."""
    unit = features / features.norm(dim=1, keepdim=True)
    scores = (unit @ unit.T).masked_fill(ids[:, None] == ids[None, :], -torch.inf)
    best, indices = scores.topk(config.num_neighbors, dim=1)
    matrix = torch.zeros(len(ids), len(ids)).scatter(1, indices, (best / config.ranking_temperature).softmax(1))
    known = torch.zeros(len(ids), config.num_labels)
    known[classes >= 0, classes[classes >= 0]] = 1
    z = known
    for _ in range(config.propagation_steps):
        z = config.propagation_alpha * matrix @ z + (1 - config.propagation_alpha) * known
    return z


# --- frozen features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transductive", [False, True], ids=["test images apart", "test images in training"])
def test_frozen_baselines_by_hand(tmp_path, transductive):
    data = digits()
    if transductive:
        # hidden classes of the training images are what is tested
        data = load_image_data(DataArguments("digits", labels_per_class=4, max_images=64))
        hidden = [row for row, label in enumerate(data.train["label"]) if label < 0]
        truth = load_image_data(DataArguments("digits", max_images=64)).train
        assert truth["node_id"][:] == data.train["node_id"][:]
        data.test, data.test_in_graph = truth.select(hidden), True
    trainer = digit_trainer(tmp_path, data=data)
    rows = by_method(frozen_baselines(trainer, trainer.eval_dataset))
    assert list(rows) == [LINEAR_FEATURES, GCN, PROPAGATION]

    support, classes, ids = trainer.embed(trainer.support_dataset, "support")
    queries, labels, query_ids = trainer.embed(trainer.eval_dataset, "queries")
    assert torch.isin(query_ids, ids).all() == transductive
    known = classes >= 0
    scaler = StandardScaler().fit(support[known])
    linear = LogisticRegression(max_iter=2000).fit(scaler.transform(support[known]), classes[known])
    expected = accuracy_score(labels, linear.predict(scaler.transform(queries)))
    assert rows[LINEAR_FEATURES]["accuracy"] == pytest.approx(expected)
    assert expected > 0.3

    if transductive:
        nodes, node_ids, visible = support, ids, classes
    else:
        nodes, node_ids = torch.cat([support, queries]), torch.cat([ids, query_ids])
        visible = torch.cat([classes, torch.full_like(labels, -100)])
    z = dense_propagation(nodes, node_ids, visible, trainer.bpgcn.config)
    place = {int(node): row for row, node in enumerate(node_ids)}
    answers = LabelPropagation.log_probabilities(z)[[place[int(node)] for node in query_ids]].argmax(1)
    assert rows[PROPAGATION]["accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert 0.2 < rows[PROPAGATION]["accuracy"] < 1


def test_the_head_of_the_fixed_graph_learns(tmp_path, monkeypatch):
    trainer = digit_trainer(tmp_path, tiny_digit_model(head="sgc", head_dropout=0.0))
    name = "frozen features, fixed graph, sgc head"
    monkeypatch.setattr(baselines, "FIXED_GRAPH_STEPS", 0)
    before = by_method(frozen_baselines(trainer, trainer.eval_dataset))[name]["accuracy"]
    monkeypatch.setattr(baselines, "FIXED_GRAPH_STEPS", 200)
    after = by_method(frozen_baselines(trainer, trainer.eval_dataset))[name]["accuracy"]
    assert after > before + 0.1


def test_a_model_without_a_head_has_no_head_to_fix_a_graph_for(tmp_path):
    trainer = digit_trainer(tmp_path, tiny_digit_model(head="label_propagation", propagation_mix=1.0))
    assert list(by_method(frozen_baselines(trainer, trainer.eval_dataset))) == [LINEAR_FEATURES, PROPAGATION]


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    trainer = digit_trainer(tmp_path)
    before, state = parameters(trainer.model), torch.get_rng_state()
    frozen_baselines(trainer, trainer.eval_dataset)
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer.model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(trainer.bpgcn.support_bank) == 0
    assert all(p.grad is None for p in trainer.model.parameters())


# --- a trained backbone with a linear head ----------------------------------------------------------------------------


def test_the_fine_tuned_linear_classifier_sees_labelled_images_alone_for_as_many_steps(tmp_path):
    trainer = digit_trainer(tmp_path, max_steps=7, labeled_batch_fraction=0.5, save_strategy="steps", save_steps=2)
    model = tiny_digit_model(**LINEAR)
    before = parameters(model)
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (seen.append((model.training, kwargs)), forward(*args, **kwargs))[1]
    (row,) = fine_tuned_linear(model, trainer, trainer.eval_dataset)
    assert row["method"] == FINE_TUNED
    assert row["baseline"] is True
    assert row.keys() == {"method", "baseline", "accuracy", "macro_f1", "ece"}
    batches = [options["labels"] for training, options in seen if training and "labels" in options]
    assert len(batches) == 7
    assert all(len(labels) == 16 and (labels >= 0).all() for labels in batches)
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_linear_is_a_classifier_of_single_images(tmp_path):
    trainer = digit_trainer(tmp_path, tiny_digit_model(**LINEAR))
    trainer.build_support_bank()
    images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(4)])
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(images).logits
        expected = torch.log_softmax(model.head.linear(model.get_image_features(images)), -1)
    assert torch.allclose(logits, expected, atol=1e-6)


# --- which are measured, and once -------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """kinds -> rows, and whether the trained baseline was built."""
    built = []

    def build():
        built.append(True)
        return tiny_digit_model(**LINEAR)

    def measure(kinds: str) -> tuple[list[dict], bool]:
        built.clear()
        trainer = digit_trainer(tmp_path, max_steps=2)
        return measure_baselines(trainer, trainer.eval_dataset, kinds, build), bool(built)

    return measure


def test_none_frozen_or_all_are_measured(measured, tmp_path):
    assert measured("none") == ([], False)
    assert not (tmp_path / "baselines.json").exists()
    frozen, built = measured("frozen")
    assert ([row["method"] for row in frozen], built) == ([LINEAR_FEATURES, GCN, PROPAGATION], False)
    everything, built = measured("all")
    assert ([row["method"] for row in everything], built) == ([LINEAR_FEATURES, GCN, PROPAGATION, FINE_TUNED], True)


def test_what_was_measured_before_is_not_measured_again(measured, tmp_path):
    rows, built = measured("all")
    assert built
    assert measured("all") == (rows, False)
    record = json.loads((tmp_path / "baselines.json").read_text())
    assert record == rows
    (tmp_path / "baselines.json").write_text(json.dumps([{**row, "accuracy": 0.125} for row in record]))
    assert {row["accuracy"] for row in measured("frozen")[0]} == {0.125}
