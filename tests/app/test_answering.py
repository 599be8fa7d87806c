"""Answers of the demo: the model's own, told with neighbours and edges, for many visitors of one model at once."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import BitImageProcessorPil

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.app import answering
from modeling_bpgcn.app.answering import MAX_ADDED, Added, Answer, Demonstration
from tests.model_factory import CLASSES, HEAD_NAMES, tiny_images, tiny_model

M = 20
CLASSES_OF = torch.where(torch.arange(M) % 4 == 3, -100, torch.arange(M) % CLASSES)
IDS = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:M]
SIZE = {"height": 8, "width": 8}
PROCESSOR = BitImageProcessorPil(size=SIZE, do_center_crop=False, do_convert_rgb=True)
PICTURES = {int(id_): Image.new("RGB", (8, 8), (number, 0, 0)) for number, id_ in enumerate(IDS[:-1])}


def filled(**overrides) -> BPGCNForImageClassification:
    torch.manual_seed(0)
    model = tiny_model(**overrides)
    with torch.no_grad():
        model.set_support_bank(model.get_image_features(tiny_images(M)), CLASSES_OF, IDS)
    return model


def demonstration(**overrides) -> Demonstration:
    return Demonstration(filled(**overrides), PROCESSOR, PICTURES)


def picture(seed: int = 1) -> Image.Image:
    pixels = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def with_added(demo: Demonstration, *class_names: str) -> tuple[Added, ...]:
    """Images of these classes, near to `picture()` and different from one another."""
    added = ()
    for number, name in enumerate(class_names):
        features = demo.embed(picture()) + 0.05 * (number + 1)
        added = demo.add(picture(), features, name, added)
    return added


def probabilities(answer: Answer, demo: Demonstration) -> Tensor:
    return torch.tensor([answer.probabilities[name] for name in demo.class_names])


def edges_among(answer: Answer) -> dict[tuple[int, int], float]:
    """Weights of the edges between neighbours, by their ids."""
    ids = [0, *(neighbor.id for neighbor in answer.neighbors)]
    return {(ids[edge.source], ids[edge.target]): edge.weight for edge in answer.edges if edge.source}


def assert_same(answer: Answer, other: Answer) -> None:
    assert answer.probabilities == other.probabilities
    assert answer.edges == other.edges
    assert [n.id for n in answer.neighbors] == [n.id for n in other.neighbors]


# --- the model's own answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_probabilities_are_the_models(head):
    demo = demonstration(head=head)
    features = demo.embed(picture())
    with torch.no_grad():
        expected = demo.model(**PROCESSOR(picture(), return_tensors="pt")).logits.softmax(-1)[0]
    assert expected.std() > 1e-3
    for settings_ in ({}, {"temperature": demo.temperature, "num_neighbors": demo.num_neighbors}):
        answer = demo.answer(features, **settings_)
        assert_close(probabilities(answer, demo), expected, atol=1e-6, rtol=0)
        assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbors_are_told_weightiest_first_with_similarity_class_and_picture(metric):
    demo = demonstration(ranking_metric=metric, num_neighbors=M)
    model, features = demo.model, demo.embed(picture())
    neighbors = demo.answer(features).neighbors
    weights = [neighbor.weight for neighbor in neighbors]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert sorted(neighbor.id for neighbor in neighbors) == sorted(IDS.tolist())
    for neighbor in neighbors:
        row = IDS.tolist().index(neighbor.id)
        own = model.support_bank.features[row]
        cosine = float(torch.cosine_similarity(features, own, dim=0))
        similarity = cosine if metric == "cosine" else -float((features - own).square().sum())
        assert neighbor.similarity == pytest.approx(similarity, rel=1e-3, abs=1e-5)
        known = int(CLASSES_OF[row])
        assert neighbor.class_name == (None if known < 0 else demo.class_names[known])
        assert neighbor.propagated == demo.class_names[int(model.support_bank.propagated[row].argmax())]
        assert neighbor.thumbnail is PICTURES.get(neighbor.id)
        assert not neighbor.added
    assert any(neighbor.thumbnail is None for neighbor in neighbors)
    assert any(neighbor.class_name is None for neighbor in neighbors)


def test_where_no_label_arrives_no_class_is_told():
    demo = demonstration()
    demo.model.relabel_support(IDS, [-100] * M)
    assert {(n.class_name, n.propagated) for n in demo.answer(demo.embed(picture())).neighbors} == {(None, None)}


def test_edges_are_those_of_the_query_and_of_the_support_graph():
    demo = demonstration(num_neighbors=6)
    model = demo.model
    answer = demo.answer(demo.embed(picture()))
    rows = [IDS.tolist().index(neighbor.id) for neighbor in answer.neighbors]
    with torch.no_grad():
        ranking = model.bpgcn.rank(model.support_bank.features, IDS)
    expected = {(0, place): neighbor.weight for place, neighbor in enumerate(answer.neighbors, 1)}
    for source, row in enumerate(rows, 1):
        for index, weight in zip(ranking.indices[row].tolist(), ranking.weights[row].tolist(), strict=True):
            if index in rows:
                expected[source, rows.index(index) + 1] = weight
    found = {(edge.source, edge.target): edge.weight for edge in answer.edges}
    assert len(found) == len(answer.edges) == len(expected) > 6
    assert found == pytest.approx(expected, abs=1e-5)


# --- temperature and k -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("normalization", ["row", "symmetric"])
def test_temperature_and_k_change_how_the_query_reads_and_nothing_else(normalization, learned):
    demo = demonstration(graph_normalization=normalization, learn_temperature=learned, graph_symmetrization="mean")
    features, plain = demo.embed(picture()), demo.answer(demo.embed(picture()))
    answer = demo.answer(features, 0.03, 7)
    assert abs(probabilities(answer, demo) - probabilities(plain, demo)).max() > 1e-3
    other = copy.deepcopy(demo.model)  # with the bank as it is
    other.config.num_neighbors, other.config.ranking_temperature, other.config.learn_temperature = 7, 0.03, False
    with torch.no_grad():
        expected = other(features=features[None])
    assert_close(probabilities(answer, demo), expected.logits[0].softmax(-1), atol=1e-6, rtol=0)
    assert [neighbor.id for neighbor in answer.neighbors] == IDS[expected.neighbor_indices[0]].tolist()
    shown = {neighbor.id for neighbor in plain.neighbors}
    among = {pair: weight for pair, weight in edges_among(answer).items() if shown.issuperset(pair)}
    assert among == pytest.approx(edges_among(plain), rel=1e-4)
    assert among
    assert_same(demo.answer(features), plain)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, M), temperature=st.floats(1e-3, 100), count=st.integers(0, 2))
def test_any_setting_gives_a_distribution_and_a_graph_of_the_shown(k, temperature, count):
    demo = demonstration()
    added = with_added(demo, *demo.class_names[:count])
    answer = demo.answer(demo.embed(picture()), temperature, k, added)
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert len(answer.neighbors) == k
    weights = [neighbor.weight for neighbor in answer.neighbors]
    assert weights == sorted(weights, reverse=True)
    assert [edge for edge in answer.edges if edge.source == 0] == list(answer.edges[:k])
    for edge in answer.edges:
        assert edge.source != edge.target
        assert 0 <= edge.source <= k
        assert 1 <= edge.target <= k


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-9, 1e9, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_named(temperature):
    demo = demonstration()
    with pytest.raises(ValueError, match=r"temperature .* must be between 0\.001 and 100"):
        demo.answer(demo.embed(picture()), temperature)


@pytest.mark.parametrize("k", [0, -1, M + 1, 10**9])
def test_a_number_of_neighbors_out_of_range_is_named(k):
    demo = demonstration()
    with pytest.raises(ValueError, match=f"{k} neighbors: choose 1 to {M}"):
        demo.answer(demo.embed(picture()), num_neighbors=k)


def test_the_models_own_settings_are_within_what_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(answering, "MAX_SHOWN", 5)
    for own, most in ((3, 5), (7, 7), (50, M)):
        demo = demonstration(num_neighbors=own)
        assert (demo.num_neighbors, demo.max_num_neighbors) == (min(own, M), most)
        assert len(demo.answer(demo.embed(picture()), num_neighbors=demo.num_neighbors).neighbors) == min(own, M)
    cold = demonstration(ranking_temperature=1e-4)
    cold.answer(cold.embed(picture()), temperature=cold.temperature)


# --- added images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bank_dtype": "float16"}, {"graph_normalization": "symmetric"}], ids=str)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_added_images_answer_as_in_a_model_that_was_given_them(head, options):
    demo = demonstration(head=head, graph_symmetrization="mean", **options)
    features, plain = demo.embed(picture()), demo.answer(demo.embed(picture()))
    added = with_added(demo, "LABEL_2", "LABEL_2", "LABEL_0")
    answer = demo.answer(features, added=added)
    other = copy.deepcopy(demo.model)
    rows = torch.stack([image.features for image in added])
    ids = other.add_support(features=rows, classes=[2, 2, 0])
    assert [image.id for image in added] == ids.tolist()
    with torch.no_grad():
        expected = other(features=features[None]).logits[0].softmax(-1)
    assert torch.equal(probabilities(answer, demo), expected)
    if head != "linear":
        assert abs(expected - probabilities(plain, demo)).max() > 1e-3
    built = demo._with_added(added)
    assert_close(dict(built.support_bank.named_buffers()), dict(other.support_bank.named_buffers()), atol=0, rtol=0)
    assert built.config.bank_size == M + 3
    [nearest, *_] = answer.neighbors
    assert (nearest.added, nearest.id, nearest.class_name) == (True, added[0].id, "LABEL_2")
    assert nearest.thumbnail is added[0].thumbnail


def test_ids_of_added_images_stay_apart_when_one_is_taken_out():
    demo = demonstration()
    first, second, third = with_added(demo, *demo.class_names)
    [*_, fourth] = demo.add(picture(), demo.embed(picture()), "LABEL_0", (first, third))
    assert [image.id for image in (first, second, third, fourth)] == [int(IDS.max()) + i for i in (1, 2, 3, 4)]
    assert len(demo.answer(demo.embed(picture()), added=(first, third, fourth)).neighbors) == 3


def test_an_added_image_is_kept_as_a_small_picture():
    demo = demonstration()
    [image] = demo.add(Image.new("RGBA", (500, 200)), demo.embed(picture()), "LABEL_1")
    assert (image.thumbnail.mode, image.thumbnail.size, image.class_index) == ("RGB", (128, 51), 1)


def test_what_cannot_be_added_is_named(monkeypatch):
    demo = demonstration()
    features = demo.embed(picture())
    with pytest.raises(ValueError, match="'dog' is none of the model's 3 classes"):
        demo.add(picture(), features, "dog", ())
    many = with_added(demo, *["LABEL_0"] * MAX_ADDED)
    assert len(many) == MAX_ADDED
    with pytest.raises(ValueError, match="20 images are added already"):
        demo.add(picture(), features, "LABEL_0", many)
    monkeypatch.setattr(answering, "MAX_REBUILT", M - 1)
    with pytest.raises(ValueError, match=r"bank has 20 images.*only up to 19.*index MODEL IMAGES --add"):
        demo.add(picture(), features, "LABEL_0", ())


# --- one model, many visitors ----------------------------------------------------------------------------------------


def state_of(model) -> tuple:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return tensors, modules, model.config.to_dict()


@pytest.mark.parametrize("learned", [False, True])
def test_the_model_never_changes(learned):
    demo = demonstration(learn_temperature=learned)
    before = copy.deepcopy(state_of(demo.model))
    features = demo.embed(picture())
    answer = demo.answer(features, 0.5, 9, with_added(demo, "LABEL_2"))
    assert len(answer.neighbors) == 9
    after = state_of(demo.model)
    assert_close(after[0], before[0], atol=0, rtol=0)
    assert after[1:] == before[1:]
    assert not features.requires_grad
    assert all(parameter.grad is None for parameter in demo.model.parameters())


def test_visitors_at_the_same_time_get_the_answers_they_get_alone():
    demo = demonstration()
    visits = [
        (demo.embed(picture(seed)), temperature, k, with_added(demo, *names))
        for seed in (1, 2)
        for temperature, k in ((None, None), (0.02, 5), (0.7, 12))
        for names in ((), ("LABEL_0",), ("LABEL_1", "LABEL_2"))
    ]
    alone = [Demonstration(demo.model, PROCESSOR, PICTURES).answer(*visit) for visit in visits]
    assert len({tuple(answer.probabilities.values()) for answer in alone}) > len(visits) / 2
    demo._models.size = 2  # so that banks come and go
    order = torch.randperm(10 * len(visits), generator=torch.Generator().manual_seed(0)) % len(visits)
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda visit: demo.answer(*visits[visit]), order.tolist())
        for visit, answer in zip(order.tolist(), answers, strict=True):
            assert_same(answer, alone[visit])


def test_a_bank_is_built_once_and_so_many_are_kept(monkeypatch):
    built, build = [], answering._rebuilt
    monkeypatch.setattr(answering, "_rebuilt", lambda model, added: built.append(added) or build(model, added))
    monkeypatch.setattr(answering, "CACHED_ROWS", 3 * M)
    demo = demonstration()
    features = demo.embed(picture())
    one, two = with_added(demo, "LABEL_0"), with_added(demo, "LABEL_1")
    same_id = (replace(one[0], features=one[0].features + 1),)
    loaded = (replace(one[0], features=one[0].features.clone()),)  # as a page's state comes back
    for added in (one, one, loaded, two, same_id, one):
        demo.answer(features, added=added)
    assert [id(added) for added in built] == [id(one), id(two), id(same_id)]
    demo.answer(features, added=with_added(demo, "LABEL_2"))  # `two` was not asked for longest
    demo.answer(features, added=one)
    assert len(built) == 4
    demo.answer(features, added=two)
    assert len(built) == 5
    assert len(demo._models._held) == 3


def test_those_who_wait_for_the_same_bank_do_not_build_it_again():
    cache, started, go_on = answering._Cache(2), threading.Event(), threading.Event()
    built = []

    def build():
        built.append(None)
        started.set()
        go_on.wait(10)
        return object()

    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(cache.get, "key", build) for _ in range(4)]
        assert started.wait(10)
        go_on.set()
        found = {id(future.result()) for future in waiting}
    assert len(found) == len(built) == 1


@pytest.mark.parametrize("prepare", [lambda model: model.train(), lambda model: model.support_bank.clear()])
def test_a_model_that_cannot_answer_is_refused(prepare):
    model = filled()
    prepare(model)
    with pytest.raises(ValueError, match=r"answers from a support bank, in evaluation mode"):
        Demonstration(model, PROCESSOR, {})
