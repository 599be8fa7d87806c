"""One process and two compute the same: losses, gradients and weights over five optimizer steps, in every scope."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.distributed.launch import launched
from tests.model_factory import tiny_backbone
from tests.training_factory import digit_trainer, digits, logged, tiny_digit_model

COMMON = {"max_steps": 5, "weight_decay": 0.05, "lr_scheduler_type": "constant", "augmentation": "none"}
# per_device_train_batch_size is that of one process; 45 images in one batch, or all 45, divide unevenly over two
CASES = {
    "batch": {"per_device_train_batch_size": 32},
    "batch, mixed": {"per_device_train_batch_size": 32, "labeled_batch_fraction": 0.5, "class_balanced_batches": True},
    "batch, uneven": {"per_device_train_batch_size": 64, "max_images": 45},
    "batch, chunks": {"per_device_train_batch_size": 32, "gradient_cache_chunk_size": 5},
    "batch, accumulated": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
    "batch, accumulated chunks": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "gradient_cache_chunk_size": 3,
    },
    "batch, rows": {"per_device_train_batch_size": 32, "ranking_shards": "rows"},
    "batch, ring": {"per_device_train_batch_size": 32, "ranking_shards": "ring"},
    "batch, head first": {"per_device_train_batch_size": 32, "head_only_steps": 2},
    "batch, head first, chunks": {
        "per_device_train_batch_size": 32,
        "head_only_steps": 2,
        "gradient_cache_chunk_size": 5,
    },
    "memory": {"per_device_train_batch_size": 16, "graph_scope": "memory", "memory_size": 40},
    "memory, uneven": {
        "per_device_train_batch_size": 64,
        "graph_scope": "memory",
        "memory_size": 40,
        "max_images": 45,
    },
    "batch, SAM and penalty": {"per_device_train_batch_size": 32, "sam_rho": 0.1, "gradient_norm_penalty": 2.0},
    "batch, SAM and penalty, head first, chunks": {
        "per_device_train_batch_size": 32,
        "head_only_steps": 2,
        "gradient_cache_chunk_size": 5,
        "sam_rho": 0.1,
        "gradient_norm_penalty": 2.0,
    },
    "memory, SAM and penalty": {
        "per_device_train_batch_size": 16,
        "graph_scope": "memory",
        "memory_size": 40,
        "sam_rho": 0.1,
        "gradient_norm_penalty": 2.0,
    },
    "full, SAM, ring": {
        "per_device_train_batch_size": 10,
        "graph_scope": "full",
        "ranking_shards": "ring",
        "sam_rho": 0.1,
    },
    "full, penalty, uneven": {
        "per_device_train_batch_size": 10,
        "graph_scope": "full",
        "max_images": 45,
        "gradient_norm_penalty": 2.0,
    },
    "full": {"per_device_train_batch_size": 10, "graph_scope": "full"},
    "full, uneven": {"per_device_train_batch_size": 10, "graph_scope": "full", "max_images": 45},
    "full, rows": {"per_device_train_batch_size": 10, "graph_scope": "full", "ranking_shards": "rows"},
    "full, ring, uneven": {
        "per_device_train_batch_size": 10,
        "graph_scope": "full",
        "ranking_shards": "ring",
        "max_images": 45,
    },
    "full, learned temperature": {
        "per_device_train_batch_size": 10,
        "graph_scope": "full",
        "ranking_shards": "rows",
        "temperature_schedule": "learned",
    },
    "batch, support apart, averaged": {"per_device_train_batch_size": 32, "support_fraction": 0.5, "ema_decay": 0.8},
    "batch, edges dropped, classes embedded": {"per_device_train_batch_size": 32},
}
CONFIG = {
    "batch, edges dropped, classes embedded": {
        "edge_dropout": 0.3,
        "label_embedding": True,
        "average_precision_loss_weight": 0.3,
    },
}
# what others combine
SLOW = (
    "batch, mixed",
    "batch, chunks",
    "batch, accumulated",
    "batch, rows",
    "batch, ring",
    "batch, head first",
    "memory",
    "batch, SAM and penalty",
    "memory, SAM and penalty",
    "full",
    "full, rows",
    "batch, support apart, averaged",
)
QUICK = tuple(name for name in CASES if name not in SLOW)

SCRIPT = """
import sys
import torch
from tests.distributed.test_scopes import five_steps

folder, *names = sys.argv[1:]
found = {name: five_steps(f"{folder}/{number}", name, processes=2) for number, name in enumerate(names)}
torch.save(found, f"{folder}/rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


def five_steps(folder: str, name: str, processes: int = 1) -> dict:
    """Losses, gradients of each step and the weights in the end. Noise of the backbone is off, since each process draws
    its own; the head's dropout and the revealed labels are on."""
    options = COMMON | CASES[name]
    if options.get("graph_scope") != "full":
        options["per_device_train_batch_size"] //= processes
    learned = options.get("temperature_schedule") == "learned"
    backbone = tiny_backbone(hidden_size=16)
    config = {"learn_temperature": learned, "neighborhood_loss_weight": 0.3} | CONFIG.get(name, {})
    model = tiny_digit_model(backbone_config=backbone, **config).double()
    trainer = digit_trainer(folder, model, data=digits(options.pop("max_images", 64)), **options)
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = {n: _whole(p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None}
            gradients.append(found)

    trainer.add_callback(Keep)
    trainer.train()
    names = ("loss", "grad_norm", "ranking_gradient_norm", "feature_gradient_norm", "homophily", "temperature")
    weights = {n: _whole(p.detach()) for n, p in trainer.model.named_parameters()}
    return {"gradients": gradients, "weights": weights, **{n: logged(trainer, n) for n in names}}


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of all processes' shares of it if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def assert_trained_as_one(found: dict, expected: dict) -> None:
    """What one of several processes found is what one process alone finds."""
    assert len(expected["gradients"]) == 5
    reached = {n for step in expected["gradients"] for n, g in step.items() if g.abs().max() > 0}
    assert any(".backbone." in n for n in reached)
    assert any("head" in n for n in reached)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for value in ("grad_norm", "feature_gradient_norm", "homophily", "temperature"):
        assert found[value] == pytest.approx(expected[value], rel=1e-6), value
    for step, (one, two) in enumerate(zip(expected["gradients"], found["gradients"], strict=True)):
        for n in one.keys() | two.keys():
            # exchanged gradients are there also where one process alone has none
            reference = one.get(n, torch.zeros_like(found["weights"][n]))
            other = two.get(n, torch.zeros_like(reference))
            scale = max(float(reference.abs().max()), 1e-3)
            assert (other - reference).abs().max() <= 1e-6 * scale, (step, n)
    for n, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][n], weight, rtol=1e-6, atol=1e-7, msg=n)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Callable[[str], list[dict]]:
    """What each of two processes finds in a case; they run once for all quick ones, and once for the others."""

    @cache
    def run(names: tuple[str, ...]) -> list[dict]:
        return launched(SCRIPT, tmp_path_factory.mktemp("scopes"), *names)

    return lambda name: [found[name] for found in run(SLOW if name in SLOW else QUICK)]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_train_as_one(two_processes, tmp_path, name):
    expected = five_steps(str(tmp_path), name)
    for found in two_processes(name):
        assert_trained_as_one(found, expected)
