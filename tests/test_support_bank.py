"""The support bank: answers that depend on the image and the bank alone, and a bank that survives saving."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import BitImageProcessorPil

from modeling_bpgcn import BPGCNForImageClassification, BPGCNModel
from modeling_bpgcn.ranking import soft_topk
from tests.model_factory import CLASSES, HEAD_NAMES, tiny_config, tiny_images, tiny_model

M = 40
CLASSES_OF = torch.where(torch.arange(M) % 4 == 3, -100, torch.arange(M) % CLASSES)
IDS = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:M]


def spread_features(count: int, width: int = 8) -> Tensor:
    """Features around a few centres: near and far neighbours, none alike."""
    return torch.randn(4, width)[torch.arange(count) % 4] + 0.5 * torch.randn(count, width)


def model_with_bank(dtype=torch.float32, **overrides) -> BPGCNForImageClassification:
    """In float64 the bank is kept so too, which a saved bank never is."""
    model = tiny_model(**overrides).to(dtype)
    if dtype == torch.float64:
        model.support_bank.dtype = dtype
    model.set_support_bank(spread_features(M).to(dtype), CLASSES_OF, IDS)
    return model


# --- what a bank holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_new_model_has_an_empty_bank_and_a_filled_one_has_a_row_per_image(head):
    model = tiny_model(head=head)
    assert len(model.support_bank) == model.config.bank_size == 0
    empty = {name: value for name, value in model.state_dict().items() if "support_bank" in name}
    assert empty
    assert all(value.shape[0] == 0 for value in empty.values())
    x = spread_features(M)
    model.set_support_bank(x, CLASSES_OF, IDS)
    bank = model.support_bank
    assert len(bank) == model.config.bank_size == M
    assert torch.equal(bank.features, x)
    assert torch.equal(bank.classes, CLASSES_OF)
    assert torch.equal(bank.ids, IDS)
    assert bank.propagated.shape == (M, CLASSES)
    assert all(buffer.shape[0] == M for _, buffer in bank.named_buffers())
    assert not any(buffer.requires_grad for _, buffer in bank.named_buffers())
    bank.clear()
    assert len(bank) == 0
    assert all(buffer.untyped_storage().nbytes() == 0 for _, buffer in bank.named_buffers())
    assert model.state_dict().keys() >= empty.keys()


def test_half_precision_storage_is_half_as_large_and_answers_alike():
    x, query = spread_features(M), spread_features(5)
    answers = {}
    for dtype in ("float32", "float16"):
        torch.manual_seed(1)
        model = tiny_model(bank_dtype=dtype)
        model.set_support_bank(x, CLASSES_OF, IDS)
        assert model.support_bank.features.dtype == getattr(torch, dtype)
        assert model.support_bank.ids.dtype == torch.int64
        answers[dtype] = model(features=query).logits
    assert answers["float16"].dtype == torch.float32
    assert_close(answers["float16"], answers["float32"], atol=1e-2, rtol=0)
    assert not torch.equal(answers["float16"], answers["float32"])


def test_filling_the_bank_leaves_the_training_mode_alone_and_draws_nothing():
    model = tiny_model(head_dropout=0.5, ranking_relaxation="gumbel").train()
    x = spread_features(M)
    model.set_support_bank(x, CLASSES_OF, IDS)
    assert model.training
    first = dict(model.support_bank.state_dict())
    model.eval().set_support_bank(x, CLASSES_OF, IDS)
    assert not model.training
    assert_close(dict(model.support_bank.state_dict()), first, atol=0, rtol=0)


def test_an_image_that_is_in_the_bank_twice_is_not_its_own_neighbour_there():
    model, x = tiny_model(), spread_features(M)
    x[1], ids = x[0], IDS.clone()
    ids[1] = ids[0]
    model.set_support_bank(x, CLASSES_OF, ids)
    joint = model(features=x, node_ids=ids, support="batch", support_classes=CLASSES_OF)
    assert not (ids[joint.neighbor_indices] == ids[:, None]).any()
    states = {}
    for name, names in (("by id", ids), ("by row", IDS)):
        model.set_support_bank(x, CLASSES_OF, names)
        states[name] = model.support_bank.state_0.clone()
    graph = model._graph(model.bpgcn.rank(x, ids))
    assert_close(states["by id"], model.head(x, graph)[1][1])
    assert (states["by id"] - states["by row"])[:2].abs().max() > 1e-3


# --- a query is answered as the node it copies -----------------------------------------------------------------------


@pytest.mark.parametrize("self_loop", ["share", "unit"])
@pytest.mark.parametrize("normalization", ["row", "symmetric"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_training_node_asked_again_gets_the_training_nodes_answer(head, normalization, self_loop):
    # softmax over all: rows do not sum to 1, so that the degrees in the bank matter
    options = {"ranking_normalization": "all", "graph_normalization": normalization, "graph_self_loop": self_loop}
    model = model_with_bank(torch.float64, head=head, **options)
    x = model.support_bank.features
    assert model.support_bank.degree.max() - model.support_bank.degree.min() > 0.05
    joint = model(features=x, node_ids=IDS, support="batch", support_classes=CLASSES_OF)
    unknown = (CLASSES_OF < 0).nonzero()[:, 0]
    asked = model(features=x[unknown], node_ids=IDS[unknown])
    assert torch.equal(asked.neighbor_indices, joint.neighbor_indices[unknown])
    assert_close(asked.neighbor_weights, joint.neighbor_weights[unknown], atol=1e-12, rtol=1e-12)
    assert_close(asked.logits, joint.logits[unknown], atol=1e-12, rtol=1e-12)
    assert joint.logits[unknown].exp().std(0).max() > 1e-2
    if head != "label_propagation":  # the head does not see a node's own class, so this holds for all nodes
        model.label_propagation.share = 0.0
        everyone = model(features=x, node_ids=IDS).logits
        assert_close(everyone, model(features=x, node_ids=IDS, support="batch").logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("symmetrization", ["mean", "mutual"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_under_a_symmetrised_graph_a_query_reads_the_bank_directed(head, symmetrization):
    model = model_with_bank(head=head, graph_symmetrization=symmetrization, graph_normalization="symmetric")
    before = {name: value.clone() for name, value in model.support_bank.named_buffers()}
    answer = model(features=spread_features(5))
    assert answer.logits.isfinite().all()
    assert_close(dict(model.support_bank.named_buffers()), before, atol=0, rtol=0)


def test_label_propagation_answers_with_the_classes_of_its_neighbours():
    model = model_with_bank(torch.float64, head="label_propagation", propagation_steps=1)
    model.support_bank.classes.clamp_(min=0)
    model.set_support_bank(model.support_bank.features, model.support_bank.classes, IDS)
    answer = model(features=spread_features(5).double())
    onehot = torch.eye(CLASSES, dtype=torch.float64)[model.support_bank.classes]
    votes = (answer.neighbor_weights[..., None] * onehot[answer.neighbor_indices]).sum(1)
    assert_close(answer.logits.exp(), (0.9 * votes + 1e-4) / (0.9 * votes + 1e-4).sum(-1, keepdim=True))


# --- the answer depends on the image and the bank, on nothing else ---------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_alone_in_a_batch_or_shuffled_the_answer_is_the_same(head, dtype, tolerance):
    model = tiny_model(head=head, num_labels=CLASSES).to(dtype)
    images = (tiny_images(64) + 3 * torch.randn(4, 3, 1, 1)[torch.arange(64) % 4]).to(dtype)
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(tiny_images(M).to(dtype)), CLASSES_OF, IDS)
        batch = model(images)
        alone = torch.cat([model(image[None]).logits for image in images])
        order = torch.randperm(64)
        shuffled = model(images[order]).logits
    # neighbours and answers differ between images, else the comparison would say nothing
    assert len(set(map(tuple, batch.neighbor_indices.tolist()))) > 20
    assert batch.logits.exp().std(0).max() > 1e-2
    assert (alone - batch.logits).abs().max() <= tolerance
    assert (shuffled - batch.logits[order]).abs().max() <= tolerance


def test_the_batch_is_the_support_when_asked_for():
    model = model_with_bank()
    x = spread_features(12)
    in_batch = model(features=x, support="batch")
    expected = soft_topk(x, num_neighbors=3, temperature=0.1)
    assert torch.equal(in_batch.neighbor_indices, expected.indices)
    assert (model(features=x).logits - in_batch.logits).abs().max() > 1e-3
    assert torch.equal(model.train()(features=x).neighbor_indices, expected.indices)  # the default in training


def test_the_answer_names_the_images_it_rests_on():
    model = model_with_bank()
    query = spread_features(5)
    answer = model(features=query)
    expected = soft_topk(query, model.support_bank.features, num_neighbors=3, temperature=0.1)
    assert torch.equal(answer.neighbor_indices, expected.indices)
    assert_close(answer.neighbor_weights, expected.weights)


def test_labels_beside_the_bank_give_the_answers_nll_and_are_not_seen():
    model, query = model_with_bank(), spread_features(5)
    answer = model(features=query, labels=torch.tensor([0, 1, 2, -100, 1]))
    assert torch.equal(answer.logits, model(features=query).logits)
    expected = -answer.logits[[0, 1, 2, 4], [0, 1, 2, 1]].mean()
    assert_close(answer.loss, expected)
    assert answer.loss_parts is None


def test_without_a_bank_the_error_says_how_to_get_one():
    for model in (tiny_model(), BPGCNModel(tiny_config()).eval()):
        with pytest.raises(ValueError, match=r"no support bank .* model.build_support_bank\(dataset.* support='batch'"):
            model(features=spread_features(4))
    with pytest.raises(ValueError, match=r"support='transductive' needs a support bank: call model.build_support_bank"):
        tiny_model()(features=spread_features(4), support="transductive")


# --- transductive ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_transductive_is_one_graph_of_bank_and_queries(head, symmetrization):
    model = model_with_bank(torch.float64, head=head, graph_symmetrization=symmetrization)
    bank, query = model.support_bank, spread_features(6).double()
    answer = model(features=query, support="transductive")
    joint = model(
        features=torch.cat([bank.features, query]),
        node_ids=torch.cat([bank.ids, 2000 + torch.arange(6)]),
        support_classes=torch.cat([bank.classes, torch.full((6,), -100)]),
        support="batch",
    )
    assert_close(answer.logits, joint.logits[M:], atol=1e-12, rtol=1e-12)
    assert torch.equal(answer.neighbor_indices, joint.neighbor_indices[M:])
    assert (answer.neighbor_indices >= M).any()  # queries are each other's neighbours
    assert torch.equal(answer.features, query)
    if head != "linear":
        assert (answer.logits - model(features=query).logits).abs().max() > 1e-3


def test_a_query_that_the_bank_holds_takes_its_row_there():
    model = model_with_bank(torch.float64)
    x = model.support_bank.features
    rows = torch.tensor([7, 3, 21])
    fresh = spread_features(2).double()
    ids = torch.cat([IDS[rows[:2]], torch.tensor([5000]), IDS[rows[2:]], torch.tensor([5001])])
    query = torch.cat([x[rows[:2]], fresh[:1], x[rows[2:]], fresh[1:]])
    answer = model(features=query, node_ids=ids, support="transductive")
    joint = model(
        features=torch.cat([x, fresh]),
        node_ids=torch.cat([IDS, torch.tensor([5000, 5001])]),
        support_classes=torch.cat([CLASSES_OF, torch.full((2,), -100)]),
        support="batch",
    )
    place = torch.tensor([7, 3, M, 21, M + 1])
    assert_close(answer.logits, joint.logits[place], atol=1e-12, rtol=1e-12)
    assert torch.equal(answer.features, query)


# --- building it from images -----------------------------------------------------------------------------------------


def test_a_bank_is_built_from_rows_with_pixels():
    model, images = tiny_model(), tiny_images(7)
    rows = [{"pixel_values": image, "labels": i % 3, "node_ids": 10 + i} for i, image in enumerate(images)]
    rows[2]["labels"] = -100
    del rows[4]["labels"]
    model.build_support_bank(rows, batch_size=3, progress=False)
    with torch.no_grad():
        assert_close(model.support_bank.features, model.get_image_features(images), atol=1e-5, rtol=0)
    assert model.support_bank.classes.tolist() == [0, 1, -100, 0, -100, 2, 0]
    assert model.support_bank.ids.tolist() == list(range(10, 17))


def test_a_bank_is_built_from_pictures_of_any_mode():
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    modes = ("RGB", "L", "RGBA", "P", "I;16")
    rows = [{"photo": Image.effect_noise((20, 14), 60).convert(mode), "kind": i % 3} for i, mode in enumerate(modes)]
    model = tiny_model().train()
    model.build_support_bank(rows, image_processor=processor, image_column="photo", label_column="kind", progress=False)
    assert model.training
    assert model.support_bank.classes.tolist() == [0, 1, 2, 0, 1]
    assert model.support_bank.ids.tolist() == [0, 1, 2, 3, 4]
    pixels = processor([row["photo"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert_close(model.support_bank.features, model.get_image_features(pixels), atol=1e-5, rtol=0)


def test_building_names_what_is_missing():
    with pytest.raises(ValueError, match="The support data set is empty: a bank needs at least one image"):
        tiny_model().build_support_bank([], progress=False)
    with pytest.raises(
        ValueError, match=r"needs 'pixel_values', or a column 'image' and an image_processor; .*'photo'"
    ):
        tiny_model().build_support_bank([{"photo": None, "label": 1}], progress=False)


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_saved_bank_gives_the_same_answers_bit_for_bit(head, bank_dtype, tmp_path):
    model = model_with_bank(head=head, bank_dtype=bank_dtype)
    query = spread_features(5)
    model.save_pretrained(tmp_path)
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(features=query).logits, model(features=query).logits)
    assert_close(dict(loaded.support_bank.named_buffers()), dict(model.support_bank.named_buffers()), atol=0, rtol=0)
    assert json.loads((tmp_path / "config.json").read_text())["bank_size"] == M


def test_the_bank_is_in_the_safetensors_file(tmp_path):
    model_with_bank().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["bpgcn.support_bank.features"].shape == (M, 8)
    assert stored["bpgcn.support_bank.ids"].dtype == torch.int64


def test_saving_writes_the_size_that_the_bank_has_whatever_the_config_says(tmp_path):
    model = model_with_bank()
    model.config.bank_size = 7
    model.save_pretrained(tmp_path)
    assert len(BPGCNForImageClassification.from_pretrained(tmp_path).support_bank) == M
    model.support_bank.clear()
    model.save_pretrained(tmp_path)
    assert len(BPGCNForImageClassification.from_pretrained(tmp_path).support_bank) == 0


def test_the_base_model_reads_the_same_bank(tmp_path):
    model = model_with_bank()
    query = spread_features(5)
    model.save_pretrained(tmp_path)
    base = BPGCNModel.from_pretrained(tmp_path)
    answer = base(features=query)
    assert torch.equal(answer.neighbor_weights, model(features=query).neighbor_weights)


@pytest.mark.parametrize("claimed", [0, M - 1, M + 5])
@pytest.mark.parametrize("model_class", [BPGCNForImageClassification, BPGCNModel])
def test_a_bank_that_contradicts_the_config_is_refused(model_class, claimed, tmp_path):
    model_with_bank().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bank_size": claimed}))
    message = rf"The support bank in .* and its config \(bank_size={claimed}\) disagree: .*support_bank"
    for ignore in (False, True):
        with pytest.raises(ValueError, match=message):
            model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_a_config_that_claims_a_bank_which_is_not_there_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bank_size": 4}))
    with pytest.raises(ValueError, match=r"bank_size=4\) disagree: .*call build_support_bank again"):
        BPGCNForImageClassification.from_pretrained(tmp_path)


def test_a_checkpoint_may_lack_an_empty_bank(tmp_path):
    model_with_bank().save_pretrained(tmp_path)
    weights, path = tmp_path / "model.safetensors", tmp_path / "config.json"
    kept = {name: value for name, value in load_file(weights).items() if "support_bank" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bank_size": 0}))
    model = BPGCNForImageClassification.from_pretrained(tmp_path)
    assert len(model.support_bank) == 0
    model.set_support_bank(spread_features(M), CLASSES_OF, IDS)
    assert model(features=spread_features(5)).logits.isfinite().all()


def test_loading_a_state_dict_resizes_the_bank_or_empties_it():
    full, other = model_with_bank(), tiny_model()
    query = spread_features(5)
    other.set_support_bank(spread_features(9), CLASSES_OF[:9])
    for target in (tiny_model(), other):
        assert all(not keys for keys in target.load_state_dict(full.state_dict()))
        assert len(target.support_bank) == M
        assert torch.equal(target(features=query).logits, full(features=query).logits)
    full.load_state_dict(tiny_model().state_dict())
    assert len(full.support_bank) == 0


def test_a_state_that_says_nothing_about_the_bank_leaves_it_alone():
    model = model_with_bank()
    before = model.support_bank.features.clone()
    partial = {name: value for name, value in tiny_model().state_dict().items() if "support_bank" not in name}
    missing, _ = model.load_state_dict(partial, strict=False)
    assert {name.removeprefix("bpgcn.support_bank.") for name in missing} == set(
        dict(model.support_bank.named_buffers())
    )
    assert torch.equal(model.support_bank.features, before)


def test_a_state_of_another_width_is_refused():
    other = tiny_model(pooling="cls_mean")
    other.set_support_bank(spread_features(M, 16), CLASSES_OF)
    with pytest.raises(RuntimeError, match=r"size mismatch for bpgcn\.support_bank\.features"):
        model_with_bank().load_state_dict(other.state_dict())
