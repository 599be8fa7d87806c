"""The memory: a queue with one row an image, whose rows are nodes of the graph and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from modeling_bpgcn.training.feature_memory import FeatureMemory
from tests.model_factory import only, tiny_images, tiny_model
from tests.training_factory import digit_trainer, digits, logged, tiny_digit_model


def rows(ids: list[int], step: int = 0) -> dict[str, torch.Tensor]:
    """Features that name their image and step."""
    ids = torch.tensor(ids, dtype=torch.long)
    return {
        "features": torch.stack([ids.float(), torch.full((len(ids),), float(step))], 1),
        "labels": ids % 3 - 1,
        "node_ids": ids,
    }


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True), min_size=1, max_size=8),
    st.integers(1, 9),
)
def test_it_holds_the_newest_row_of_the_latest_images(batches, size):
    memory, newest = FeatureMemory(size), {}
    for step, ids in enumerate(batches):
        memory.push(**rows(ids, step), step=step)
        for image in ids:
            newest.pop(image, None)
            newest[image] = step
    held = memory.others(torch.tensor([-1]), 0)
    expected = list(newest.items())[-size:]
    assert held["node_ids"].tolist() == [image for image, _ in expected]
    assert held["features"].tolist() == [[float(image), float(step)] for image, step in expected]
    assert held["labels"].tolist() == [image % 3 - 1 for image, _ in expected]
    assert len(memory) == len(expected) <= size


def test_images_of_the_batch_are_left_out_and_the_warm_up_gives_nothing():
    memory = FeatureMemory(8, warmup_steps=2)
    memory.push(**rows([1, 2, 3]), step=0)
    assert memory.others(torch.tensor([9]), step=1) is None
    assert memory.others(torch.tensor([2, 9]), step=2)["node_ids"].tolist() == [1, 3]
    assert memory.others(torch.tensor([1, 2, 3]), step=2) is None


def test_features_are_held_without_their_graph():
    memory = FeatureMemory(8)
    batch = rows([1, 2])
    batch["features"].requires_grad_()
    memory.push(**batch, step=0)
    assert not memory.others(torch.tensor([5]), 0)["features"].requires_grad


def test_staleness_by_hand():
    memory = FeatureMemory(8)
    assert memory.staleness(torch.ones(1, 2), torch.tensor([1]), 0)["memory_rows"] == 0
    memory.push(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([7, 3]), step=2)
    memory.push(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.tensor([5]), step=4)
    found = memory.staleness(torch.tensor([[1.0, 1.0], [1.0, 1.0], [3.0, 0.0]]), torch.tensor([4, 3, 5]), step=5)
    assert found["memory_rows"] == 3
    assert float(found["memory_age"]) == pytest.approx((3 + 3 + 1) / 3)
    assert float(found["memory_drift"]) == pytest.approx((1 - 0.5**0.5 + 0) / 2)


def test_a_saved_memory_comes_back(tmp_path):
    memory, other = FeatureMemory(8), FeatureMemory(8)
    memory.push(**rows([4, 2], 1), step=1)
    memory.save(tmp_path)
    other.load(tmp_path, torch.device("cpu"))
    held = [m.others(torch.tensor([0]), 5) for m in (memory, other)]
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    assert other.staleness(torch.ones(1, 2), torch.tensor([4]), 6)["memory_age"] == 5


# --- context nodes ----------------------------------------------------------------------------------------------------


def test_context_nodes_are_revealed_and_nothing_is_asked_of_them():
    model = tiny_model(neighborhood_loss_weight=1.0, consistency_loss_weight=1.0, reveal_ratio=0.5).train()
    features = torch.randn(20, 8, dtype=torch.float64)
    model = model.double()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -100, -100, 0, 1] + [0, 1, 2, 0, 1, 2, 0, 1, -100, -100])

    def run(labels):
        torch.manual_seed(0)
        return model(features=features, labels=labels, num_context=10, output_path_features=True)

    base = run(labels)
    by_ranking = {"propagation_loss", "neighborhood_loss", "propagation_consistency_loss"}
    assert set(base.loss_parts) == {"head_loss", "consistency_loss"} | by_ranking
    other_labels = labels.clone()
    other_labels[10:] = -100
    other = run(other_labels)
    # the head asks the batch only, the ranking losses read the context's classes
    assert_close(other.loss_parts["head_loss"], base.loss_parts["head_loss"])
    assert_close(other.loss_parts["consistency_loss"], base.loss_parts["consistency_loss"])
    for name in by_ranking:
        assert not torch.allclose(other.loss_parts[name], base.loss_parts[name]), name
    head = torch.nn.functional.nll_loss(base.logits[:10], labels[:10], ignore_index=-100)
    assert_close(base.loss_parts["head_loss"], head)


def test_context_alone_may_be_what_is_revealed():
    model = tiny_model(**only("propagation_loss"), reveal_ratio=0.01).double().train()
    features = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, -100, -100] + [0, 1, 2, 0, 1, 2, 0, 1])
    loss = model(features=features, labels=labels, num_context=8).loss
    loss.backward()
    assert loss > 0
    assert features.grad.abs().max() > 0
    # one labelled node and nothing else known: nothing to reveal
    assert model(features=features, labels=labels[:4].repeat(3).index_fill(0, torch.arange(4, 12), -100)).loss == 0


# --- in the trainer ---------------------------------------------------------------------------------------------------


def test_the_graph_grows_by_the_memory_and_duplicates_are_no_neighbours(tmp_path):
    trainer = digit_trainer(
        tmp_path, tiny_digit_model(), graph_scope="memory", memory_size=40, memory_warmup_steps=1, max_steps=8
    )
    seen = []
    forward = trainer.model.forward

    def record(*args, **kwargs):
        if "num_context" in kwargs:
            seen.append((kwargs["node_ids"].tolist(), kwargs["num_context"], kwargs["features"].requires_grad))
        return forward(*args, **kwargs)

    trainer.model.forward = record
    trainer.train()
    contexts = [context for _, context, _ in seen]
    assert contexts[0] == 0
    assert contexts[1:4] == [16, 32, 40]
    assert len(digits().train) == 64
    for ids, context, trains in seen:
        assert len(set(ids)) == len(ids) == 16 + context
        assert trains
    assert max(contexts) <= 40
    rows_held = logged(trainer, "memory_rows")
    assert rows_held[:4] == [0, 16, 32, 40]
    assert max(logged(trainer, "memory_age")) > 1
    drift = logged(trainer, "memory_drift")
    assert drift
    assert all(0 < value < 1 for value in drift)


def test_the_memory_gets_no_gradient_and_the_batch_gets_one_through_it(tmp_path):
    model = tiny_digit_model(**only("propagation_loss"))
    trainer = digit_trainer(tmp_path, model, graph_scope="memory", memory_size=48, max_steps=3)
    trainer.train()
    assert all(norm > 0 for norm in logged(trainer, "ranking_gradient_norm"))
    held = trainer._memory.others(torch.tensor([-1]), 99)
    assert len(held["node_ids"]) == 48
    assert not held["features"].requires_grad


def test_the_objective_without_context_is_unchanged():
    model = tiny_model().train()
    images = tiny_images(12)
    labels = torch.arange(12) % 3
    losses = []
    for context in ({}, {"num_context": 0}):
        torch.manual_seed(0)
        losses.append(model(pixel_values=images, labels=labels, **context).loss)
    assert torch.equal(*losses)
