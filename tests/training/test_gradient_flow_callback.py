"""The gradient's way during training: logged and drawn, and training goes on as if nobody had looked."""

import pytest
import torch

from modeling_bpgcn.training import gradient_flow_callback
from modeling_bpgcn.training.gradient_flow_callback import FLOW_PICTURE, GradientFlowCallback, first_images
from tests.training_factory import digit_trainer, logged, parameters, tiny_digit_model, trained

EVERY_SCOPE = {
    "batch": {},
    "mixed batches, accumulated": {"labeled_batch_fraction": 0.5, "gradient_accumulation_steps": 2},
    "gradient cache": {"gradient_cache_chunk_size": 5},
    "memory": {"graph_scope": "memory", "memory_size": 32},
    "full": {"graph_scope": "full", "gradient_cache_chunk_size": 24},
    "learned temperature": {"temperature_schedule": "learned"},
}
SLOW = ("mixed batches, accumulated", "learned temperature")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, options in EVERY_SCOPE.items()
    ],
)
def test_training_is_bit_identical_with_and_without_it(tmp_path, options):
    learned = {"learn_temperature": options.get("temperature_schedule") == "learned"}
    runs = [
        trained(tmp_path / str(steps), tiny_digit_model(**learned), max_steps=4, gradient_flow_steps=steps, **options)
        for steps in (0, 1, 3)
    ]
    before = parameters(tiny_digit_model(**learned))
    without, *others = (parameters(run.model) for run in runs)
    assert any(not torch.equal(before[name], without[name]) for name in before)
    for other in others:
        assert all(torch.equal(other[name], without[name]) for name in without)
    assert all(logged(run, "loss") == logged(runs[0], "loss") for run in runs)
    assert [len(logged(run, "gradient_flow_edge_share")) for run in runs] == [0, 4, 1]
    assert not (tmp_path / "0" / FLOW_PICTURE).exists()
    assert (tmp_path / "1" / FLOW_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_prefix_cache_gives_the_blocks_that_train(tmp_path):
    options = {"trainable_blocks": 1, "augmentation": "none", "max_steps": 3}
    runs = [
        trained(tmp_path / str(steps), prefix_cache=str(tmp_path / "cache"), gradient_flow_steps=steps, **options)
        for steps in (0, 2)
    ]
    first, other = (parameters(run.model) for run in runs)
    assert all(torch.equal(first[name], other[name]) for name in first)
    [share] = logged(runs[1], "gradient_flow_edge_share")
    assert 0 < share < 1


def test_every_main_number_is_logged_at_its_step(tmp_path):
    trainer = trained(tmp_path, max_steps=5, gradient_flow_steps=2)
    steps = {entry["step"]: entry for entry in trainer.state.log_history if "gradient_flow_edge_share" in entry}
    assert set(steps) == {2, 4}
    for name in ("ranking_path_norm", "feature_path_norm", "edges_reached", "ranking_path_reaches_unlabeled"):
        assert all(entry[f"gradient_flow_{name}"] > 0 for entry in steps.values())


def test_the_picture_shows_the_first_and_the_last(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gradient_flow_callback, "plot_gradient_flow", lambda flows, path: drawn.append((flows, path)))
    trained(tmp_path, max_steps=6, gradient_flow_steps=2)
    [(flows, path)] = drawn
    assert list(flows) == ["step 2", "step 6"]
    assert flows["step 2"] != flows["step 6"]
    assert path == tmp_path / FLOW_PICTURE


def test_its_images_are_fixed_and_leave_the_loader_alone(tmp_path):
    loader = digit_trainer(tmp_path, labeled_batch_fraction=0.5).get_train_dataloader()
    state = torch.get_rng_state()
    one, two = first_images(loader, 10), first_images(loader, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(one["labels"]) == 10
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {"pixel_values", "labels", "node_ids"} == set(one)
    torch.set_rng_state(state)
    following = next(iter(loader))
    torch.set_rng_state(state)
    assert torch.equal(following["node_ids"][:10], one["node_ids"])


def test_a_fault_is_said_aloud(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gradient_flow_callback.logger, "warning_once", said.append)
    model = tiny_digit_model()
    rank = model.bpgcn.rank

    def detached(*args, **kwargs):
        ranking = rank(*args, **kwargs)
        return ranking._replace(weights=ranking.weights.detach())

    model.bpgcn.rank = detached
    trainer = trained(tmp_path, model, max_steps=2, gradient_flow_steps=1)
    assert said == ["FAULT: the edges carry no gradient. Their weights are detached or constant."] * 2
    assert logged(trainer, "gradient_flow_edge_share") == [0.0, 0.0]


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_flow_callback, "DTensor", torch.nn.Parameter)
    with pytest.raises(ValueError, match="gradient_flow_steps needs whole parameters"):
        trained(tmp_path, gradient_flow_steps=1)


def test_a_negative_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_flow_steps=-1 must be 0 or more"):
        digit_trainer(tmp_path, gradient_flow_steps=-1)


def test_only_the_first_process_measures(tmp_path):
    trainer = digit_trainer(tmp_path, gradient_flow_steps=1)
    trainer.state.is_world_process_zero = False
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradientFlowCallback))
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.state.global_step = 1
    callback.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / FLOW_PICTURE).exists()
