"""Which parameters train: the last blocks, name patterns, and the groups of the optimizer."""

import re

import pytest
import torch
from torch import nn

from modeling_bpgcn.training.freezing import GROUPS, freeze_by_pattern, group_of, train_last_blocks
from tests.model_factory import BACKBONES, tiny_backbone, tiny_model
from tests.training_factory import digit_trainer, parameters, tiny_digit_model

BLOCK = re.compile(r"\.(?:layer|layers)\.(\d+)\.")


def deep_model(kind: str):
    return tiny_model(backbone_config=tiny_backbone(kind, num_hidden_layers=3))


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def block_of(name: str) -> int | None:
    found = BLOCK.search(f".{name}")
    return int(found.group(1)) if found else None


# --- the last blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("count", [1, 2])
def test_only_the_last_blocks_and_what_follows_them_train(kind, count):
    backbone = deep_model(kind).bpgcn.backbone
    before = trained(backbone)
    train_last_blocks(backbone, count)
    after = trained(backbone)
    assert after < before
    assert {block_of(name) for name in after} == {None, *range(3 - count, 3)}
    # of what belongs to no block, the last normalisation follows the blocks and the embeddings come before them
    outside = {name for name in after if block_of(name) is None}
    assert outside == {"layernorm.weight", "layernorm.bias"}
    every = {name for name in before if block_of(name) in range(3 - count, 3)}
    assert after == every | outside


@pytest.mark.parametrize("kind", BACKBONES)
def test_no_block_freezes_the_whole_backbone_and_nothing_else(kind):
    model = deep_model(kind)
    train_last_blocks(model.bpgcn.backbone, 0)
    assert not trained(model.bpgcn.backbone)
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith("head.")}


@pytest.mark.parametrize("kind", BACKBONES)
def test_all_blocks_freeze_the_embeddings_alone(kind):
    backbone = deep_model(kind).bpgcn.backbone
    before = trained(backbone)
    train_last_blocks(backbone, 3)
    assert before - trained(backbone) == {name for name in before if name.startswith("embeddings.")}


@pytest.mark.parametrize("kind", BACKBONES)
def test_more_blocks_than_there_are_is_an_error(kind):
    with pytest.raises(ValueError, match="trainable_blocks=4 is more than the 3 blocks of the backbone"):
        train_last_blocks(deep_model(kind).bpgcn.backbone, 4)


def test_what_never_gets_a_gradient_stays_frozen():
    backbone = deep_model("dinov2").bpgcn.backbone
    assert "embeddings.mask_token" in dict(backbone.named_parameters())
    train_last_blocks(backbone, 3)
    assert "embeddings.mask_token" not in trained(backbone)


def test_a_backbone_without_a_list_of_blocks_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny_backbone(num_hidden_layers=3)
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="trainable_blocks: Odd has no list of 3 blocks; use freeze instead"):
        train_last_blocks(Odd(), 1)


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns_freeze_what_they_match_and_leave_the_rest():
    model = tiny_model()
    before = trained(model)
    freeze_by_pattern(model, [r"\.embeddings\.", r"^head\..*bias$"])
    frozen = before - trained(model)
    assert frozen == {n for n in before if ".embeddings." in n or (n.startswith("head.") and n.endswith("bias"))}
    assert any(n.startswith("head.") for n in frozen)
    assert any(".embeddings." in n for n in frozen)


def test_no_pattern_freezes_nothing():
    model = tiny_model()
    before = trained(model)
    freeze_by_pattern(model, [])
    assert trained(model) == before


@pytest.mark.parametrize("pattern", ["embedings", "^backbone"])
def test_a_pattern_that_matches_nothing_is_named_with_some_of_the_names(pattern):
    with pytest.raises(ValueError, match=re.escape(f"freeze={pattern!r} matches no parameter; names look like bpgcn.")):
        freeze_by_pattern(tiny_model(), ["layernorm", pattern])


# --- groups -----------------------------------------------------------------------------------------------------------


def test_every_parameter_has_its_group():
    model = tiny_model(learn_temperature=True)
    groups = {name: group_of(name) for name, _ in model.named_parameters()}
    assert set(groups.values()) == set(GROUPS)
    for name, group in groups.items():
        expected = "head" if name.startswith("head.") else "backbone"
        assert group == ("temperature" if name.endswith("log_temperature") else expected), name


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"trainable_blocks": 1}, {"trainable_blocks": 0}, {"freeze": [r"\.embeddings\.", r"^head\.layers\.0\."]}],
    ids=["last block", "head alone", "patterns"],
)
def test_frozen_parameters_do_not_move_and_the_others_do(tmp_path, options):
    model = tiny_digit_model()
    everything = trained(model)
    before = parameters(model)
    trainer = digit_trainer(tmp_path, model, max_steps=3, weight_decay=0.1, **options)
    trainer.train()
    learning = trained(model)
    assert learning < everything
    still = [name for name, value in before.items() if torch.equal(value, model.get_parameter(name))]
    assert set(still) == before.keys() - learning
