"""The penalty on the features' gradient and SAM: what their formulas say, in every scope, and what is logged."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import set_seed

from modeling_bpgcn.configuration_bpgcn import LOSS_WEIGHTS
from modeling_bpgcn.training.gradient_cache import split_rows
from modeling_bpgcn.training.sharpness import perturbed
from tests.training.test_gradient_cache import ROWS, noisy_model, one_batch, plain_step, step
from tests.training.test_trainer import StopAt
from tests.training_factory import arguments, digit_trainer, digits, logged, parameters

SAM = {"sam_rho": 0.2}
PENALTY = {"gradient_norm_penalty": 5.0}
OPTIONS = {"SAM": SAM, "penalty": PENALTY, "both": SAM | PENALTY}
SGD = {
    "optim": "sgd",
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "learning_rate": 0.5,
    "head_learning_rate": 0.1,
    "augmentation": "none",
}


def objective(model, batch: dict[str, Tensor], penalty: float, chunk_size: int = 1000) -> Tensor:
    """The first loss of a run of seed 42, noise included: L + penalty * |dL / dF|^2, from its definition."""
    features = torch.cat(
        [model(part["pixel_values"], support="none").features for part in split_rows(batch, chunk_size)]
    )
    if not features.requires_grad:
        features.requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence((42, 0, 0)).generate_state(1, np.uint64)[0]))
        loss = model(features=features, labels=batch["labels"], node_ids=batch["node_ids"]).loss
    [gradient] = torch.autograd.grad(loss, features, create_graph=True)
    assert gradient.abs().max() > 0
    return loss + penalty * (gradient**2).sum()


def gradients_of(loss: Tensor, model) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, named.values(), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def by_definition(model, batch, sam_rho: float = 0.0, gradient_norm_penalty: float = 0.0, chunk_size: int = 1000):
    """Gradients of the step: at w, or at w + rho g / |g|; the backbone's noise starts from the same state in both."""
    model.train()
    torch.manual_seed(11)
    found = gradients_of(objective(model, batch, gradient_norm_penalty, chunk_size), model)
    if sam_rho:
        start = parameters(model)
        norm = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
        model.load_state_dict({n: p + sam_rho * found[n] / norm if n in found else p for n, p in start.items()}, False)
        torch.manual_seed(11)
        plain = found
        found = gradients_of(objective(model, batch, gradient_norm_penalty, chunk_size), model)
        model.load_state_dict(start, False)
        assert max((found[n] - g).abs().max() / (g.abs().max() + 1e-3) for n, g in plain.items()) > 0.01
    return found


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert any(".backbone." in name for name, g in found.items() if g.abs().max() > 0)
    for name, gradient in expected.items():
        other = found.get(name, torch.zeros_like(gradient))
        scale = tolerance * float(gradient.abs().max() + 1e-3)
        assert_close(other, gradient, rtol=tolerance, atol=scale, msg=lambda m, n=name: f"{n}: {m}")


# --- the step is what the formulas say --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "scope",
    [
        {"per_device_train_batch_size": ROWS},
        {"per_device_train_batch_size": ROWS, "gradient_cache_chunk_size": 5},
        {"per_device_train_batch_size": 10, "graph_scope": "full"},
        {"per_device_train_batch_size": ROWS, "graph_scope": "memory"},
    ],
    ids=["batch", "chunks", "full", "memory"],
)
def test_one_step_of_sgd_is_that_of_the_definition(tmp_path, scope, options):
    model = noisy_model(noise=False)
    trainer = digit_trainer(tmp_path, model, **SGD, **scope, **options)
    batch = one_batch(trainer)
    if "chunks" in batch:
        parts = list(batch["chunks"])
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert len(batch["labels"]) == len(digits().train)
    start, gradients = parameters(model), by_definition(model, batch, **options)
    plain = by_definition(model, batch)
    trainer.train()
    for name, gradient in gradients.items():
        rate = SGD["learning_rate"] if ".backbone." in name else SGD["head_learning_rate"]
        assert_close(
            dict(model.named_parameters())[name], start[name] - rate * gradient, rtol=1e-9, atol=1e-9, msg=name
        )
    # which is not the plain step
    assert max(float((gradients[n] - g).abs().max()) for n, g in plain.items()) > 1e-3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_with_noise_both_passes_of_sam_draw_the_same(tmp_path, chunk_size, options):
    model = noisy_model()
    trainer = digit_trainer(
        tmp_path, model, per_device_train_batch_size=ROWS, gradient_cache_chunk_size=chunk_size, **options
    )
    batch = one_batch(trainer)
    start = parameters(model)
    expected = by_definition(model, batch, chunk_size=chunk_size or 1000, **options)
    _, found = step(trainer, batch)
    assert_equal_gradients(found, expected, 1e-9)
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())
    # and the random numbers go on as after one pass
    after = torch.rand(3)
    torch.manual_seed(11)
    for part in split_rows(batch, chunk_size or 1000):
        model(part["pixel_values"], support="none")
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"learn_temperature": True, "ranking_normalization": "all"}, {"temperature_schedule": "learned"}),
        ({"head": "gat", "graph_symmetrization": "mean", "ranking_relaxation": "entmax"}, {}),
        ({"head": "label_propagation", "ranking_metric": "euclidean"}, {}),
        ({"lora": True}, {}),
    ],
    ids=["learned-temperature", "gat", "label-propagation", "lora"],
)
def test_chunks_equal_the_batch_for_other_models(tmp_path, fields, more, options):
    def build(**extra):
        return digit_trainer(
            tmp_path, noisy_model(**fields), per_device_train_batch_size=ROWS, **options, **more, **extra
        )

    trainer = build(gradient_cache_chunk_size=5)
    batch = one_batch(trainer)
    (cached_loss, cached), (loss, plain) = step(trainer, batch), plain_step(build(), batch, 5)
    assert_close(cached_loss, loss)
    assert_equal_gradients(cached, plain, 1e-8)
    without = digit_trainer(tmp_path, noisy_model(**fields), per_device_train_batch_size=ROWS, **more)
    _, other = plain_step(without, batch, 5)
    assert any((other[n] - g).abs().max() > 1e-3 * g.abs().max() for n, g in plain.items() if ".backbone." in n)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_under_autocast_chunks_equal_the_batch_and_all_is_close_to_float32(tmp_path, options):
    def build(**extra):
        model = noisy_model(torch.float32)
        trainer = digit_trainer(tmp_path, model, per_device_train_batch_size=ROWS, **options, **extra)
        trainer.accelerator.prepare_model(model)  # runs its forward pass under autocast
        return trainer

    batch = one_batch(build())
    exact_loss, exact = step(build(gradient_cache_chunk_size=5), batch)
    cached_loss, cached = step(build(bf16=True, gradient_cache_chunk_size=5), batch)
    loss, plain = plain_step(build(bf16=True), batch, 5)
    assert_close(cached_loss, loss, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(cached, plain, 2e-2)  # sums of chunks are rounded to bf16 one by one
    assert exact_loss != loss
    assert_close(loss, exact_loss, rtol=0.05, atol=0)
    found, expected = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (plain, exact))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [{"trainable_blocks": 0, "freeze": ["backbone"]}, {"head_only_steps": 1}])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_head_alone_is_penalized_too(tmp_path, chunk_size, frozen):
    model = noisy_model(noise=False)
    options = {"per_device_train_batch_size": ROWS, "gradient_cache_chunk_size": chunk_size} | frozen
    trainer = digit_trainer(tmp_path, model, **options, **PENALTY)
    batch = one_batch(trainer)
    expected = {n: g for n, g in by_definition(model, batch, **PENALTY).items() if n.startswith("head.")}
    plain = by_definition(model, batch)
    assert len(expected) == 4
    _, found = step(trainer, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
    changed = expected["head.layers.1.weight"] - plain["head.layers.1.weight"]
    assert changed.abs().max() > 1e-3 * plain["head.layers.1.weight"].abs().max()


def test_rows_of_the_memory_are_not_penalized(tmp_path):
    model = noisy_model(noise=False, propagation_loss_weight=0.0)
    trainer = digit_trainer(tmp_path, model, graph_scope="memory", per_device_train_batch_size=ROWS, **PENALTY)
    batches = list(trainer.get_train_dataloader())
    context = model.train()(batches[1]["pixel_values"], support="none").features.detach()
    trainer._memory.push(context, batches[1]["labels"], batches[1]["node_ids"], 0)
    own = model(batches[0]["pixel_values"], support="none").features
    loss = model(
        features=torch.cat([own, context]),
        labels=torch.cat([b["labels"] for b in batches[:2]]),
        node_ids=torch.cat([b["node_ids"] for b in batches[:2]]),
        num_context=len(context),
    ).loss
    [gradient] = torch.autograd.grad(loss, own, create_graph=True)
    expected = gradients_of(loss + 5.0 * (gradient**2).sum(), model)
    _, found = step(trainer, batches[0])
    assert trainer._statistics.take()["memory_rows"] == len(context)
    assert_equal_gradients(found, expected, 1e-9)


def test_the_penalty_makes_the_gradient_of_the_features_smaller(tmp_path):
    norms = []
    for weight in (0.0, 20.0):
        model = noisy_model(torch.float32, noise=False)
        options = {"gradient_norm_penalty": weight, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
        trainer = digit_trainer(tmp_path, model, augmentation="none", max_steps=30, **options)
        trainer.train()
        batch = one_batch(trainer)
        with torch.no_grad():
            features = model(batch["pixel_values"], support="none").features
        features.requires_grad_()
        model.train()(features=features, labels=batch["labels"], node_ids=batch["node_ids"]).loss.backward()
        norms.append(float(features.grad.norm()))
    assert norms[0] > 0
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accumulated_batches_are_penalized_each_and_the_loss_holds_it(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = digit_trainer(tmp_path, noisy_model(noise=False), max_steps=1, **options, **PENALTY)
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "gradient_penalty" in entry]
    config, names = trainer.model.config, [weight.removesuffix("_loss_weight") for weight in LOSS_WEIGHTS]
    parts = sum(entry.get(f"{name}_loss", 0) * getattr(config, f"{name}_loss_weight") for name in names)
    assert entry["gradient_penalty"] > 1e-3
    assert entry["loss"] == pytest.approx(parts + 5 * entry["gradient_penalty"], rel=1e-5)


# --- SAM --------------------------------------------------------------------------------------------------------------


ENTRY = st.just(0.0) | st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)


@given(st.floats(1e-3, 10), st.lists(ENTRY, min_size=4, max_size=4).filter(any))
def test_weights_go_rho_along_the_gradient_and_come_back_bit_for_bit(rho, entries):
    a, b = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(()))
    still = torch.nn.Parameter(torch.randn(2))
    gradient = torch.tensor(entries)
    a.grad, b.grad = gradient[:3].clone(), gradient[3].clone()
    start = [p.detach().clone() for p in (a, b, still)]
    with contextlib.suppress(KeyboardInterrupt), perturbed([a, b, still], rho):
        moved = torch.cat([(a - start[0]).detach(), (b - start[1]).detach()[None]])
        assert a.grad is b.grad is still.grad is None
        assert torch.equal(still, start[2])
        assert_close(moved, rho * gradient / gradient.norm(), rtol=1e-4, atol=2e-6 * max(1, rho))
        raise KeyboardInterrupt
    assert all(torch.equal(p, q) for p, q in zip((a, b, still), start, strict=True))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_without_direction_moves_no_weight(value):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), value)
    with perturbed([weight], 0.1):
        assert torch.equal(weight, torch.ones(3))


def test_logs_tell_of_the_weights_themselves_and_of_the_perturbed_loss(tmp_path):
    runs = []
    for options in ({}, {"sam_rho": 0.02}):
        set_seed(0)
        trainer = digit_trainer(tmp_path, noisy_model(torch.float32), max_steps=3, **options)
        trainer.train()
        runs.append(trainer)
    plain, sam = runs
    for name in ("loss", "head_loss", "homophily", "ranking_gradient_norm", "feature_gradient_norm"):
        assert len(logged(sam, name)) == 3
        assert logged(sam, name)[0] == pytest.approx(logged(plain, name)[0], rel=1e-6), name
    assert not logged(plain, "sam_loss")
    assert not logged(plain, "gradient_penalty")
    assert all(worse > loss for worse, loss in zip(logged(sam, "sam_loss"), logged(sam, "loss"), strict=True))
    assert len(logged(sam, "sam_loss")) == 3


def test_the_memory_holds_features_of_the_weights_themselves(tmp_path):
    seen, memories = {}, {}
    for name, options in {"plain": {}, "SAM": SAM}.items():
        model = noisy_model(noise=False)
        trainer = digit_trainer(tmp_path, model, graph_scope="memory", memory_size=20, **options)
        calls = seen[name] = []

        def record(module, args, kwargs, calls=calls):
            if "num_context" in kwargs:
                context = len(kwargs["labels"]) - kwargs["num_context"]
                calls.append((kwargs["features"][:context].detach(), kwargs["features"][context:].detach()))

        model.register_forward_pre_hook(record, with_kwargs=True)
        batches = list(trainer.get_train_dataloader())
        for batch in batches[:2]:
            step(trainer, batch)
        memories[name] = trainer._memory._rows
    (_, plain), (_, _, first, second) = seen["plain"], seen["SAM"]
    assert len(plain[1]) == 16
    # the same context in both passes, of other features of the batch
    assert torch.equal(first[1], plain[1])
    assert torch.equal(second[1], plain[1])
    assert torch.equal(first[0], plain[0])
    assert not torch.allclose(second[0], first[0])
    assert all(torch.equal(memories["SAM"][n], memories["plain"][n]) for n in memories["plain"])


def test_a_run_that_was_stopped_and_goes_on_ends_at_the_same_weights(tmp_path):
    options = {"graph_scope": "memory", "memory_size": 24, "save_strategy": "steps", "save_steps": 2} | SAM | PENALTY
    ends = []
    for folder, stops in (("whole", []), ("parts", [StopAt(3)])):
        set_seed(0)
        trainer = digit_trainer(tmp_path / folder, noisy_model(torch.float32), max_steps=5, **options)
        for stop in stops:
            trainer.add_callback(stop)
        trainer.train()
        if stops:
            trainer = digit_trainer(tmp_path / folder, noisy_model(torch.float32), max_steps=5, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))
        ends.append(trainer)
    assert logged(ends[1], "sam_loss") == logged(ends[0], "sam_loss")
    start = parameters(noisy_model(torch.float32))
    for (name, p), (_, q) in zip(ends[0].model.named_parameters(), ends[1].model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not p.requires_grad or not torch.equal(p, start[name]), name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_rho": -0.1}, "sam_rho=-0.1 must be a number of 0 or more"),
        ({"sam_rho": math.nan}, "sam_rho=nan must be a number of 0 or more"),
        ({"gradient_norm_penalty": math.inf}, "gradient_norm_penalty=inf must be a number of 0 or more"),
        ({"sam_rho": 0.1, "gradient_accumulation_steps": 2}, "set gradient_accumulation_steps 1"),
        ({"sam_rho": 0.1, "optim": "lomo"}, "optim=lomo lacks: use another"),
        ({"gradient_norm_penalty": 0.1, "ranking_shards": "ring"}, "ranking_shards=ring has not: leave it at none"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_sharded_gradients_are_refused(tmp_path, monkeypatch, kind, options):
    from modeling_bpgcn.training import evaluation

    def wrapped(self):
        monkeypatch.undo()
        evaluation.BankEvaluator.create_accelerator_and_postprocess(self)
        setattr(self, f"is_{kind.lower()}_enabled", True)

    monkeypatch.setattr(evaluation.BankEvaluator, "create_accelerator_and_postprocess", wrapped)
    with pytest.raises(ValueError, match=f"{' and '.join(options)} cannot be used with {kind}"):
        digit_trainer(tmp_path, **options)
