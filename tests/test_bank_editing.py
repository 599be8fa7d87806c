"""Editing the support bank: after any edit it is the bank built afresh, and it belongs to the model that made it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import BitImageProcessorPil

from modeling_bpgcn import BPGCNForImageClassification
from tests.model_factory import CLASSES, HEAD_NAMES, tiny_images, tiny_model

M = 20
CLASSES_OF = torch.where(torch.arange(M) % 4 == 3, -100, torch.arange(M) % CLASSES)
IDS = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:M]


def filled(**overrides) -> BPGCNForImageClassification:
    model = tiny_model(**overrides)
    model.set_support_bank(torch.randn(M, 8), CLASSES_OF, IDS)
    return model


def rows_of(model) -> list[Tensor]:
    bank = model.support_bank
    return [bank.features.float().clone(), bank.classes.clone(), bank.ids.clone()]


def contents(model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.support_bank.named_buffers()}


def assert_built_afresh(model, features: Tensor, classes: Tensor, ids: Tensor) -> None:
    """The bank holds exactly what `set_support_bank` makes of these rows."""
    edited = contents(model)
    assert model.config.bank_size == model.support_bank.size == len(ids)
    model.set_support_bank(features, classes, ids)
    assert_close(edited, contents(model), atol=0, rtol=0)


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_an_edited_bank_is_the_bank_built_from_the_edited_rows(head, bank_dtype):
    model = filled(head=head, bank_dtype=bank_dtype)
    start = contents(model)
    x, classes, ids = rows_of(model)
    new = torch.randn(3, 8)

    given = model.add_support(features=new, classes=[2, -100, 0], ids=[1003, 1001, 1002])
    assert given.tolist() == [1003, 1001, 1002]
    x, classes, ids = torch.cat([x, new]), torch.cat([classes, torch.tensor([2, -100, 0])]), torch.cat([ids, given])
    assert (model.support_bank.propagated[:M] != start["propagated"]).any()  # the old rows see the new ones
    assert_built_afresh(model, x, classes, ids)

    model.relabel_support([1001, int(IDS[0])], torch.tensor([1, -100]))
    classes[[M + 1, 0]] = torch.tensor([1, -100])
    assert_built_afresh(model, x, classes, ids)

    model.remove_support(ids[[4, 21, 0]])
    kept = torch.tensor([i for i in range(M + 3) if i not in (4, 21, 0)])
    assert_built_afresh(model, x[kept], classes[kept], ids[kept])


def test_an_edit_undone_gives_the_first_answers():
    model, query = filled(), torch.randn(4, 8)
    before = model(features=query).logits
    ids = model.add_support(features=query, classes=[1, 1, 2, 0])
    assert ids.tolist() == [int(IDS.max()) + 1 + i for i in range(4)]
    assert (model(features=query).logits - before).abs().max() > 1e-2
    model.remove_support(ids)
    assert torch.equal(model(features=query).logits, before)


def test_images_are_added_in_evaluation_mode_and_the_mode_stays():
    model, images = filled(head_dropout=0.5).train(), tiny_images(2)
    model.add_support(images, classes=[0, 1])
    assert model.training
    with torch.no_grad():
        expected = model.eval().get_image_features(images)
    assert_close(model.support_bank.features[M:], expected)


def test_the_last_row_removed_leaves_an_empty_bank_and_the_first_added_starts_one():
    model = tiny_model()
    assert model.add_support(features=torch.randn(1, 8), classes=2).tolist() == [0]
    assert len(model.support_bank) == model.config.bank_size == 1
    assert model(features=torch.randn(2, 8)).logits.isfinite().all()
    model.remove_support(0)
    assert len(model.support_bank) == model.config.bank_size == 0
    assert model.config.bank_fingerprint is model.support_bank.fingerprint is None
    with pytest.raises(ValueError, match="no support bank"):
        model(features=torch.randn(2, 8))


def test_every_copy_of_an_image_is_removed_and_relabelled():
    model, ids = tiny_model(), IDS.clone()
    ids[1] = ids[0]
    model.set_support_bank(torch.randn(M, 8), CLASSES_OF, ids)
    model.relabel_support(ids[:1], [2])
    assert model.support_bank.classes[:2].tolist() == [2, 2]
    model.remove_support(ids[:1])
    assert torch.equal(model.support_bank.ids, ids[2:])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.remove_support([int(IDS[0]), 2000]), r"ids \[2000\] are not in the support bank, which holds 20"),
        (lambda m: m.relabel_support(2000, 1), r"ids \[2000\] are not in the support bank"),
        (lambda m: m.relabel_support(IDS[[3, 3]], [1, 2]), r"ids \[\d+\] are given more than once"),
        (lambda m: m.relabel_support(IDS[:2], [1]), r"1 classes for 2 images"),
        (lambda m: m.relabel_support(IDS[:1], [CLASSES]), r"support_classes"),
        (lambda m: m.remove_support([]), r"ids must be whole numbers, at least one"),
        (lambda m: m.remove_support([0.5]), r"ids must be whole numbers.*0\.5"),
        (lambda m: m.add_support(features=torch.zeros(1, 8), classes=[0], ids=IDS[:1]), r"in the support bank already"),
        (lambda m: m.add_support(features=torch.zeros(2, 8), classes=[0, 1], ids=[2000, 2000]), r"more than once"),
        (lambda m: m.add_support(features=torch.zeros(2, 8), classes=[0]), r"1 classes for 2 images"),
        (lambda m: m.add_support(features=torch.zeros(1, 8), classes=[-1]), r"support_classes"),
        (lambda m: m.add_support(features=torch.zeros(1, 7), classes=[0]), r"features \(1, 7\) must be \[n, 8\]"),
        (lambda m: m.add_support(features=torch.full((1, 8), torch.nan), classes=[0]), r"rows \[0\] of 1 are not fini"),
        (lambda m: m.add_support(classes=[0]), r"either pixel_values or features"),
    ],
)
def test_a_wrong_edit_is_named_and_changes_nothing(edit, message):
    model = filled()
    before = contents(model)
    with pytest.raises(ValueError, match=message):
        edit(model)
    assert_close(contents(model), before, atol=0, rtol=0)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_file", [False, True])
def test_merged_banks_are_the_bank_of_all_rows(by_file, tmp_path):
    model, x = tiny_model(), torch.randn(M, 8)
    model.set_support_bank(x[:12], CLASSES_OF[:12], IDS[:12])
    other = BPGCNForImageClassification(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.set_support_bank(x[9:], CLASSES_OF[9:], IDS[9:])  # three images are in both
    model.merge_support_bank(other.save_support_bank(tmp_path) if by_file else other.support_bank)
    assert_built_afresh(model, x, CLASSES_OF, IDS)


def test_merging_into_an_empty_bank_copies_and_with_itself_changes_nothing():
    model, empty = filled(bank_dtype="float16"), tiny_model(bank_dtype="float16")
    empty.load_state_dict(model.state_dict())
    empty.remove_support(IDS)
    empty.merge_support_bank(model.support_bank)
    assert_close(contents(empty), contents(model), atol=0, rtol=0)
    empty.merge_support_bank(model.support_bank)
    assert_close(contents(empty), contents(model), atol=0, rtol=0)


@pytest.mark.parametrize("change", ["feature", "class"])
def test_one_id_for_two_images_is_refused(change):
    model = filled()
    x, classes, ids = rows_of(model)
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    if change == "feature":
        x[5] += 1
    else:
        classes[5] = 1 - classes[5].clamp(0, 1)
    other.set_support_bank(x, classes, ids)
    with pytest.raises(ValueError, match=rf"ids \[{ids[5]}\] name other images or classes in the two banks"):
        model.merge_support_bank(other.support_bank)


# --- apart from the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_bank_saved_alone_comes_back_bit_for_bit(head, bank_dtype, tmp_path, monkeypatch):
    model, query = filled(head=head, bank_dtype=bank_dtype), torch.randn(4, 8)
    expected, before = model(features=query).logits, contents(model)
    path = model.save_support_bank(tmp_path / "bank")
    assert path == tmp_path / "bank" / "support_bank.safetensors"
    model.set_support_bank(torch.randn(5, 8), CLASSES_OF[:5])
    monkeypatch.setattr(model.bpgcn, "rank", None)  # nothing is computed again
    model.load_support_bank(tmp_path / "bank")
    monkeypatch.undo()
    assert model.config.bank_size == M
    assert torch.equal(model(features=query).logits, expected)
    assert_close(contents(model), before, atol=0, rtol=0)


def test_under_another_head_the_states_are_computed_again(tmp_path):
    model = filled()
    path = model.save_support_bank(tmp_path / "one.safetensors")
    rows = rows_of(model)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1)
    model.load_support_bank(path)
    assert_built_afresh(model, *rows)
    other = tiny_model(head="gat", num_neighbors=2)
    other.bpgcn.backbone.load_state_dict(model.bpgcn.backbone.state_dict())
    other.load_support_bank(path)
    assert_built_afresh(other, *rows)


def test_a_bank_stored_in_half_precision_answers_a_float32_model_closely(tmp_path):
    x, query, answers = torch.randn(M, 8), torch.randn(4, 8), {}
    for bank_dtype in ("float32", "float16"):
        torch.manual_seed(1)
        model = tiny_model(bank_dtype=bank_dtype)
        model.set_support_bank(x, CLASSES_OF, IDS)
        path = model.save_support_bank(tmp_path / bank_dtype)
        torch.manual_seed(1)
        reader = tiny_model()
        reader.load_support_bank(path)
        assert reader.support_bank.features.dtype == torch.float32
        answers[bank_dtype] = reader(features=query).logits.exp()
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("features").dtype == torch.float16
    assert_close(answers["float16"], answers["float32"], atol=5e-3, rtol=0)
    assert not torch.equal(answers["float16"], answers["float32"])


def test_what_is_no_bank_is_named(tmp_path):
    model = filled()
    with pytest.raises(FileNotFoundError, match=r"No support bank at .*: write one with model.save_support_bank"):
        model.load_support_bank(tmp_path)
    with pytest.raises(ValueError, match="The support bank is empty"):
        tiny_model().save_support_bank(tmp_path)
    save_file({"features": torch.zeros(2, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no support bank"):
        model.load_support_bank(tmp_path / "other.safetensors")


# --- bound to the backbone and the image processor -------------------------------------------------------------------


def test_a_bank_of_another_backbone_is_refused_wherever_it_comes_in(tmp_path):
    model = filled()
    path = model.save_support_bank(tmp_path)
    other = tiny_model()
    other.set_support_bank(torch.randn(5, 8), CLASSES_OF[:5], 2000 + torch.arange(5))
    message = (
        r"does not fit this model: the backbone's weights differ, .*build_support_bank\(dataset.*ignore_mismatch=True"
    )
    for refused in (
        lambda: other.load_support_bank(path),
        lambda: other.merge_support_bank(path),
        lambda: other.merge_support_bank(model.support_bank),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert len(other.support_bank) == 5
    other.load_support_bank(path, ignore_mismatch=True)
    assert torch.equal(other.support_bank.features, model.support_bank.features)


def test_a_trained_backbone_does_not_fit_its_old_bank():
    model = filled()
    with torch.no_grad():
        model.bpgcn.backbone.layernorm.weight[0] += 1e-3
    add = {"features": torch.randn(1, 8), "classes": [0]}
    with pytest.raises(ValueError, match=r"The support bank does not fit this model: the backbone's weights differ"):
        model.add_support(**add)
    model.add_support(**add, ignore_mismatch=True)
    assert len(model.support_bank) == M + 1


def test_other_settings_of_the_image_processor_are_refused_and_its_class_does_not_count(tmp_path):
    options = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor, other = BitImageProcessorPil(**options), BitImageProcessorPil(**options, image_mean=[0.1, 0.2, 0.3])
    model = filled()
    rows = rows_of(model)
    model.set_support_bank(*rows, image_processor=processor)
    path = model.save_support_bank(tmp_path)
    with pytest.raises(ValueError, match=r": the image processor's settings differ"):
        model.load_support_bank(path, image_processor=other)
    with pytest.raises(ValueError, match=r": the image processor's settings differ"):
        model.add_support(tiny_images(1), classes=[0], image_processor=other)
    processor.save_pretrained(tmp_path)
    model.load_support_bank(path, image_processor=BitImageProcessorPil.from_pretrained(tmp_path))
    model.add_support(tiny_images(1), classes=[0], image_processor=processor)
    model.add_support(tiny_images(1), classes=[0])


def test_another_pooling_makes_other_features(tmp_path):
    path = filled().save_support_bank(tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="the backbone's configuration differ"):
        tiny_model(pooling="mean").load_support_bank(path)


def test_other_names_of_the_classes_are_refused(tmp_path):
    model = filled()
    path = model.save_support_bank(tmp_path)
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_2", 2: "LABEL_1"}
    for take in (model.load_support_bank, model.merge_support_bank):
        with pytest.raises(ValueError, match="other classes: 1 is 'LABEL_1' there, 'LABEL_2' here"):
            take(path)
    model.load_support_bank(path, ignore_mismatch=True)


def test_the_checkpoint_remembers_what_made_its_bank(tmp_path):
    model = filled()
    fingerprint = model.config.bank_fingerprint
    assert fingerprint.keys() == {"backbone_config", "backbone_weights"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bank_fingerprint"] == fingerprint
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path)
    assert loaded.support_bank.fingerprint == fingerprint
    loaded.load_support_bank(model.save_support_bank(tmp_path))  # the weights came back bit for bit
    # in half precision the backbone is another one, and the bank still says which one made it
    half = BPGCNForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.support_bank.fingerprint == fingerprint
    with pytest.raises(ValueError, match="the backbone's weights differ"):
        half.add_support(features=torch.randn(1, 8), classes=[0])
    model.support_bank.clear()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("bank_fingerprint") is None


def test_a_bank_from_a_state_dict_is_taken_to_be_of_that_states_backbone(tmp_path):
    model, other = filled(), filled()
    other.load_state_dict(model.state_dict())
    assert other.support_bank.fingerprint is None
    path = other.save_support_bank(tmp_path)
    model.load_support_bank(path)
    assert model.config.bank_fingerprint.keys() == {"backbone_config", "backbone_weights"}
