"""Gradient caching: the loss and every gradient of the plain step, with the activations of one chunk at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import set_seed

from modeling_bpgcn.training.gradient_cache import GradientCache, split_rows
from tests.model_factory import tiny_backbone
from tests.training_factory import digit_trainer, digits, logged, parameters, tiny_digit_model

ROWS = 23  # divides by no chunk size below


def noisy_model(dtype=torch.float64, noise: bool = True, lora: bool = False, **overrides):
    """Dropout in backbone, adapters and head, and drop-path; three layers."""
    chance = 0.2 if noise else 0.0
    backbone = tiny_backbone(
        hidden_size=16, num_hidden_layers=3, hidden_dropout_prob=chance, drop_path_rate=chance, layerscale_value=0.5
    )
    fields = {"head_dropout": chance, "neighborhood_loss_weight": 0.5, "consistency_loss_weight": 0.1}
    model = tiny_digit_model(backbone_config=backbone, **(fields | overrides)).to(dtype)
    if lora:
        options = {"lora_dropout": chance, "modules_to_save": ["head"], "init_lora_weights": False}
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)).to(dtype)
    return model


def one_batch(trainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def gradients(trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def step(trainer, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step of the trainer, from a random state that is always the same."""
    trainer.model.zero_grad()
    trainer._micro_step = (-1, 0)
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(11)
    loss = trainer.training_step(trainer.model, batch)
    return loss, gradients(trainer)


def plain_step(trainer, batch, chunk_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the activations of all chunks held at once: `Trainer` alone."""
    trainer.args.gradient_cache_chunk_size = None
    trainer.model.train()
    trainer._features = lambda model, inputs, embed=trainer._features: torch.cat(
        [embed(model, chunk) for chunk in split_rows(inputs, chunk_size)]
    )
    return step(trainer, batch)


def assert_equal_steps(cached, plain, tolerance: float) -> None:
    assert cached[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        if "key.bias" not in name and "k_proj.bias" not in name:  # softmax over keys: no gradient by nature
            assert gradient.abs().max() > 0, name
    assert_close(cached[0], plain[0], rtol=tolerance, atol=tolerance)
    for name, gradient in plain[1].items():
        assert_close(
            cached[1][name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max() + 1), msg=name
        )


@pytest.mark.parametrize("chunk_size", [5, 8, 22, 23, 64])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"lora": True}, {}),
        ({"learn_temperature": True, "ranking_normalization": "all"}, {"temperature_schedule": "learned"}),
        ({"head": "gat", "graph_symmetrization": "mean"}, {}),
        ({"head": "label_propagation"}, {}),
        ({}, {"trainable_blocks": 1}),
        ({}, {"activation_checkpointing": True}),
    ],
    ids=["plain", "lora", "learned-temperature", "gat", "label-propagation", "last-block", "checkpointing"],
)
def test_cached_equals_plain_in_loss_and_every_gradient_with_noise_on(tmp_path, chunk_size, options, arguments):
    def build(**extra):
        fields = {"per_device_train_batch_size": ROWS} | arguments | extra
        return digit_trainer(tmp_path, noisy_model(**options), **fields)

    trainer = build(gradient_cache_chunk_size=chunk_size)
    batch = one_batch(trainer)
    known = batch["labels"] >= 0
    assert known.any()
    assert (~known).any()
    cached, plain = step(trainer, batch), plain_step(build(), batch, chunk_size)
    # the head of this model sees no gradient where label propagation is all there is
    assert_equal_steps(cached, plain, 1e-9)


def test_the_noise_was_on(tmp_path):
    trainer = digit_trainer(tmp_path, noisy_model(), per_device_train_batch_size=ROWS)
    batch = one_batch(trainer)
    trainer.model.train()
    features = [trainer._features(trainer.model, batch) for _ in range(2)]
    assert not torch.allclose(*features)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_cached_equals_plain_in_float32_and_under_autocast(tmp_path, bf16):
    computed_in = set()

    def build(**extra):
        model = noisy_model(torch.float32)
        trainer = digit_trainer(tmp_path, model, per_device_train_batch_size=ROWS, bf16=bf16, **extra)
        trainer.accelerator.prepare_model(trainer.model)  # as `Trainer.train` does: autocast is in its forward
        for module in model.bpgcn.backbone.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, __, output: computed_in.add(output.dtype))
        return trainer

    trainer = build(gradient_cache_chunk_size=5)
    batch = one_batch(trainer)
    assert_equal_steps(step(trainer, batch), plain_step(build(), batch, 5), 1e-5)
    assert computed_in == {torch.bfloat16 if bf16 else torch.float32}


def test_without_noise_chunks_equal_the_whole_batch_at_once(tmp_path):
    runs = []
    for size in (None, 5):
        model = noisy_model(noise=False)
        trainer = digit_trainer(tmp_path, model, per_device_train_batch_size=ROWS, gradient_cache_chunk_size=size)
        runs.append(step(trainer, one_batch(trainer)))
    assert_equal_steps(*runs, 1e-9)


def test_the_full_scope_is_the_batch_of_all_images(tmp_path):
    runs, count = [], len(digits().train)
    for options in (
        {"per_device_train_batch_size": count},
        {"graph_scope": "full", "per_device_train_batch_size": 7},
        {"graph_scope": "full", "per_device_train_batch_size": 7, "gradient_cache_chunk_size": 10},
    ):
        trainer = digit_trainer(tmp_path, noisy_model(noise=False), augmentation="none", **options)
        assert len(trainer.get_train_dataloader()) == 1
        runs.append(step(trainer, one_batch(trainer)))
    for run in runs[1:]:
        assert_equal_steps(run, runs[0], 1e-9)


def test_full_scope_with_augmentation_sees_the_same_pixels_in_both_passes(tmp_path):
    def build(**options):
        return digit_trainer(tmp_path, noisy_model(), graph_scope="full", per_device_train_batch_size=10, **options)

    trainer = build()
    chunks = one_batch(trainer)["chunks"]
    passes = [list(chunks) for _ in range(2)]
    assert [len(chunk["labels"]) for chunk in passes[0]] == [10] * 6 + [4]
    for one, two in zip(*passes, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    batch = {name: torch.cat([chunk[name] for chunk in passes[0]]) for name in passes[0][0]}
    assert_equal_steps(step(trainer, {"chunks": chunks}), plain_step(build(), batch, 10), 1e-9)
    chunks.batch_sampler.batch_sampler.set_epoch(1)
    other = torch.cat([chunk["pixel_values"] for chunk in chunks])
    assert other.shape == batch["pixel_values"].shape
    assert not torch.equal(other.sum((1, 2, 3)).sort().values, batch["pixel_values"].sum((1, 2, 3)).sort().values)


def test_a_cached_run_with_schedule_decay_clipping_and_accumulation_equals_the_plain_one(tmp_path):
    common = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 11,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "head_only_steps": 1,
    }
    runs = []
    for size in (None, 4):
        set_seed(3)
        trainer = digit_trainer(tmp_path, noisy_model(noise=False), gradient_cache_chunk_size=size, **common)
        before = parameters(trainer.model)
        trainer.train()
        runs.append(trainer)
    assert all(norm > 0 for norm in logged(runs[0], "grad_norm"))
    for name in ("loss", "grad_norm", "ranking_gradient_norm", "feature_gradient_norm", "homophily"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-6), name
    moved = [name for name, p in runs[0].model.named_parameters() if not torch.equal(p, before[name])]
    assert any(".backbone." in name for name in moved)
    for (name, p), (_, q) in zip(runs[0].model.named_parameters(), runs[1].model.named_parameters(), strict=True):
        assert_close(p, q, rtol=1e-7, atol=1e-8, msg=name)


def test_the_random_stream_goes_on_after_a_step_as_after_the_first_pass(tmp_path):
    trainer = digit_trainer(tmp_path, noisy_model(), per_device_train_batch_size=ROWS, gradient_cache_chunk_size=5)
    batch = one_batch(trainer)
    step(trainer, batch)
    after = torch.rand(3)
    torch.manual_seed(11)
    trainer.model.train()
    with torch.no_grad():
        for chunk in split_rows(batch, 5):
            trainer._features(trainer.model, chunk)
    assert torch.equal(after, torch.rand(3))


def test_a_backbone_that_does_not_train_is_embedded_once(tmp_path):
    model = noisy_model(noise=False)
    trainer = digit_trainer(
        tmp_path, model, trainable_blocks=0, per_device_train_batch_size=ROWS, gradient_cache_chunk_size=5
    )
    calls = []
    handle = model.bpgcn.backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    # the final norm of the backbone comes after its blocks, and trains with them alone
    model.bpgcn.backbone.requires_grad_(False)
    _, found = step(trainer, one_batch(trainer))
    handle.remove()
    assert calls == [False] * 5
    assert found
    assert all("head" in name for name in found)


def test_only_one_chunk_is_embedded_with_gradient_at_a_time():
    weight = torch.nn.Parameter(torch.ones(()))
    held = []

    def embed(chunk):
        held.append(torch.is_grad_enabled())
        return chunk["x"] * weight

    rows = {"x": torch.arange(6.0)[:, None], "labels": torch.arange(6), "node_ids": torch.arange(6)}
    cache = GradientCache(split_rows(rows, 4), embed)
    nodes = cache.embed(torch.device("cpu"), True)
    assert nodes["features"].is_leaf
    assert nodes["features"].requires_grad
    (nodes["features"] ** 2).sum().backward()
    cache.backward(nodes["features"].grad)
    assert held == [False, False, True, True]
    assert weight.grad == 2 * (torch.arange(6.0) ** 2).sum()
