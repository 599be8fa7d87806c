"""FSDP2 on two processes trains as one process without it, and what it saves is an ordinary model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.distributed.launch import LAUNCHER, launched
from tests.distributed.test_scopes import assert_trained_as_one, five_steps
from tests.training_factory import digit_trainer

FSDP_LAUNCHER = (
    *LAUNCHER[:2],
    *("--config_file", "configuration/accelerate/fsdp.yaml", "--num_processes", "2", "--mixed_precision", "no"),
    *("--main_process_port", "0"),
)
CASES = (
    "batch",
    "batch, accumulated chunks",
    "batch, ring",
    "batch, head first, chunks",
    "memory, uneven",
    "full, uneven",
)

# accelerate shards on accelerators alone and passes over FSDP on the CPU without a word, though torch has it there:
# the processes name themselves GPUs while it decides
SCRIPT = """
import sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from tests.distributed.test_fsdp import CASES
from tests.distributed.test_scopes import five_steps
from tests.training_factory import digit_trainer

def create_accelerator(self, create=Trainer.create_accelerator_and_postprocess):
    PartialState().distributed_type = DistributedType.MULTI_GPU
    create(self)
    assert self.accelerator.is_fsdp2

Trainer.create_accelerator_and_postprocess = create_accelerator
folder = sys.argv[1]
steps = {name: five_steps(f"{folder}/{number}", name, processes=2) for number, name in enumerate(CASES)}

options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "transductive_evaluation": True}
whole, resumed = (digit_trainer(f"{folder}/model", **options) for _ in range(2))
whole.train()
metrics = whole.evaluate()
whole.save_model()
layers = [module for module in whole.model.modules() if isinstance(module, FSDPModule)]
resumed.train(resume_from_checkpoint=f"{folder}/model/checkpoint-2")
states = [trainer.accelerator.get_state_dict(trainer.model) for trainer in (whole, resumed)]
rank = torch.distributed.get_rank()
found = {"steps": steps, "metrics": metrics, "states": states, "sharded": len(layers)}
torch.save(found, f"{folder}/rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The saved model, and what each of two processes found."""
    folder = tmp_path_factory.mktemp("fsdp")
    found = launched(SCRIPT, folder, launcher=FSDP_LAUNCHER)
    return folder / "model", found


@pytest.mark.parametrize("name", CASES)
def test_sharded_parameters_train_as_whole_ones(sharded, tmp_path, name):
    expected = five_steps(str(tmp_path), name)
    for process in sharded[1]:
        assert process["sharded"] > 2  # the layers and the model
        assert_trained_as_one(process["steps"][name], expected)


def test_the_saved_model_is_whole_with_its_bank_and_its_own_code(sharded):
    folder, (one, two) = sharded
    model = AutoModelForImageClassification.from_pretrained(folder)
    state = model.state_dict()
    assert state.keys() == one["states"][0].keys()
    for name, value in one["states"][0].items():
        assert torch.equal(value, state[name]), name
    assert model.support_bank.size == 64
    assert model.config.auto_map["AutoModelForImageClassification"] == "modeling_bpgcn.BPGCNForImageClassification"
    assert (folder / "modeling_bpgcn.py").is_file()
    assert not list(folder.glob("*fsdp*.py"))
    expected = digit_trainer(folder, model, transductive_evaluation=True).evaluate()
    for name in ("eval_accuracy", "eval_macro_f1", "eval_ece", "eval_transductive_accuracy"):
        assert one["metrics"][name] == two["metrics"][name] == pytest.approx(expected[name], abs=1e-6), name


def test_a_resumed_run_ends_as_an_uninterrupted_one(sharded):
    _, (one, _) = sharded
    whole, resumed = one["states"]
    for name, value in whole.items():
        if "support_bank" not in name:
            assert torch.equal(value, resumed[name]), name
