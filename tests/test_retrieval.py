"""Retrieval from the support bank: exact by default and prepared once, the same through an index that finds enough."""

import copy
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn import BPGCNForImageClassification, BPGCNModel, bank_search
from modeling_bpgcn.ranking import PreparedKeys, similarity, soft_topk
from modeling_bpgcn.relaxations import RELAXATIONS
from modeling_bpgcn.search import DatasetSearch, FaissSearch, bank_dataset
from tests.model_factory import CLASSES, tiny_backbone, tiny_images, tiny_model

M = 40
CLASSES_OF = torch.where(torch.arange(M) % 4 == 3, -100, torch.arange(M) % CLASSES)
IDS = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:M]
METRICS = ("cosine", "euclidean")


def filled(**overrides) -> BPGCNForImageClassification:
    model = tiny_model(**overrides)
    model.set_support_bank(torch.randn(M, 8), CLASSES_OF, IDS)
    return model


class AllRows:
    """An index that proposes every row, in some order."""

    def __init__(self):
        self.built = []

    def build(self, points: Tensor) -> None:
        self.built.append(points.clone())

    def search(self, query: Tensor, count: int) -> Tensor:
        return torch.randperm(len(self.built[-1])).expand(len(query), -1)


# --- retrieving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_images_come_back_by_falling_similarity_with_the_models_weights(metric):
    model, query = filled(ranking_metric=metric), torch.randn(5, 8)
    found = model.retrieve(features=query)
    scores = similarity(query, model.support_bank.features, metric)
    best, rows = scores.topk(3)
    assert torch.equal(found.neighbor_indices, rows)
    assert torch.equal(found.ids, IDS[rows])
    assert torch.equal(found.classes, CLASSES_OF[rows])
    assert_close(found.scores, best)
    assert_close(found.weights, torch.softmax(best / 0.1, -1))
    answer = model(features=query)
    assert torch.equal(answer.neighbor_weights, found.weights)
    everything = model.retrieve(features=query, num_neighbors=1000)
    assert everything.ids.shape == (5, M)
    assert_close(everything.scores, scores.sort(descending=True).values)
    assert (found.classes == -100).any()


def test_base_model_and_classifier_retrieve_alike_from_pixels(tmp_path):
    model, images = filled(), tiny_images(4)
    found = model.retrieve(images, num_neighbors=5)
    model.save_pretrained(tmp_path)
    again = BPGCNModel.from_pretrained(tmp_path).retrieve(images, num_neighbors=5)
    for name, value in found.items():
        assert torch.equal(again[name], value), name
    with pytest.raises(ValueError, match="no support bank"):
        tiny_model().retrieve(images)
    with pytest.raises(ValueError, match="num_neighbors=0 must be at least 1"):
        model.retrieve(images, num_neighbors=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("search", [None, AllRows])
def test_an_image_is_not_found_for_itself_and_a_place_without_an_image_says_so(metric, search):
    model = filled(ranking_metric=metric)
    model.use_search(search and search())
    x = model.support_bank.features
    assert torch.equal(model.retrieve(features=x, num_neighbors=1).ids[:, 0], IDS)
    others = model.retrieve(features=x, node_ids=IDS, num_neighbors=M)
    assert not (others.ids == IDS[:, None]).any()
    assert all(len(set(row)) == M for row in others.ids.tolist())
    last = {"ids": -1, "classes": -100, "weights": 0, "scores": -torch.inf}
    assert all((others[name][:, -1] == value).all() for name, value in last.items())
    assert (others.ids[:, :-1] >= 0).all()
    assert others.scores[:, :-1].isfinite().all()


# --- exact search, prepared once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["all", "selected"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_prepared_keys_rank_as_the_keys_do_in_value_and_gradient(backend, metric, normalization):
    key, results = torch.randn(M, 8), []
    options = {"num_neighbors": 4, "temperature": 0.2, "metric": metric, "normalization": normalization}
    for form in (key, PreparedKeys.prepare(key, metric)):
        torch.manual_seed(1)
        query = torch.randn(6, 8, requires_grad=True)
        indices, weights = soft_topk(query, form, backend=backend, **options)
        weights[:, 0].square().sum().backward()
        results.append((indices, weights.detach(), query.grad))
    assert results[0][2].abs().max() > 1e-3
    assert_close(results[1], results[0], atol=0, rtol=0)


@pytest.mark.parametrize("relaxation", [name for name in RELAXATIONS if name != "gumbel_mean"])
def test_queries_in_chunks_are_answered_as_all_at_once(relaxation, monkeypatch):
    model, query = filled(ranking_relaxation=relaxation), torch.randn(7, 8)
    names = torch.cat([IDS[:3], 2000 + torch.arange(4)])
    whole = [model.bpgcn.rank_in_bank(query, ids) for ids in (None, names)]
    monkeypatch.setattr(bank_search, "SCORES_AT_ONCE", 2 * M)
    for ids, expected in zip((None, names), whole, strict=True):
        ranking = model.bpgcn.rank_in_bank(query, ids)
        assert torch.equal(ranking.indices, expected.indices)
        assert_close(ranking.weights, expected.weights)


def test_features_are_prepared_once_and_again_when_they_change():
    model, query = filled(), torch.randn(3, 8)

    def answer_is_exact() -> Tensor:
        ranking = model.bpgcn.rank_in_bank(query.to(model.dtype))
        expected = soft_topk(query, model.support_bank.features.float(), num_neighbors=3, temperature=0.1)
        assert torch.equal(ranking.indices, expected.indices)
        return model.support_bank.keys("cosine").vectors

    with torch.inference_mode():
        first = answer_is_exact()
    assert answer_is_exact() is first
    features = query.clone().requires_grad_()
    model.bpgcn.rank_in_bank(features).weights[
        :, 0
    ].sum().backward()  # keys of an inference mode can be trained against
    assert features.grad.abs().max() > 0
    changes = (
        lambda: model.support_bank.features.neg_(),
        lambda: model.set_support_bank(torch.randn(M, 8), CLASSES_OF),
        lambda: model.load_state_dict(filled().state_dict()),
        lambda: model.to(torch.float64),
        lambda: model.to(torch.float32),
    )
    for change in changes:
        change()
        second = answer_is_exact()
        assert second is not first
        first = second
    assert model.support_bank.keys("euclidean").width == 8
    assert not [name for name in model.state_dict() if "prepared" in name]
    twin = copy.deepcopy(model)
    twin.support_bank.features.neg_()
    assert not torch.equal(twin.bpgcn.rank_in_bank(query).indices, model.bpgcn.rank_in_bank(query).indices)


@pytest.mark.parametrize("head", ["gcn", "gat", "appnp", "arma"])
def test_an_answer_reads_its_neighbours_rows_alone(head):
    model, query = filled(head=head, graph_normalization="symmetric", ranking_normalization="all"), torch.randn(30, 8)
    many, few = model(features=query).logits, model(features=query[:2]).logits  # 90 edges of 40 rows, and 6
    assert_close(few, many[:2], atol=1e-6, rtol=0)
    rows = model.bpgcn.rank_in_bank(query[:2]).indices
    assert model.support_bank.read(model.bpgcn.rank_in_bank(query[:2])).degree.shape == (6,)
    others = torch.ones(M, dtype=torch.bool).index_fill(0, rows.flatten(), False)
    for name, value in model.support_bank.named_buffers():
        if name.startswith("state_") or name in ("propagated", "degree"):
            value[others] = torch.nan
    assert torch.equal(model(features=query[:2]).logits, few)


# --- an index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["softmax", "straight_through", "threshold"])
@pytest.mark.parametrize("metric", METRICS)
def test_through_an_index_that_finds_all_the_ranking_is_exact_in_value_and_gradient(metric, relaxation):
    model = filled(ranking_metric=metric, ranking_relaxation=relaxation, ranking_temperature=2.0)
    names = torch.cat([IDS[:3], 2000 + torch.arange(3)])
    for ids in (None, names):
        results = []
        for search in (None, AllRows()):
            model.use_search(search)
            torch.manual_seed(1)
            query = torch.cat([model.support_bank.features[:3], torch.randn(3, 8)]).requires_grad_()
            indices, weights = model.bpgcn.rank_in_bank(query, ids)
            weights[:, 0].square().sum().backward()
            results.append((indices, weights.detach(), query.grad))
        assert results[0][2].abs().max() > 1e-3
        assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_sees_points_whose_distances_order_as_the_similarities(metric):
    model, search, query = filled(ranking_metric=metric), AllRows(), 3 * torch.randn(5, 8)
    search.search = lambda points, count: torch.cdist(points, search.built[-1]).topk(3, largest=False).indices
    expected = model.retrieve(features=query).ids
    model.use_search(search)
    assert torch.equal(model.retrieve(features=query).ids, expected)


def test_the_index_follows_the_bank():
    model, search, query = filled(), AllRows(), torch.randn(2, 8)
    model.use_search(search)
    assert not search.built
    model(features=query)
    model(features=query)
    assert len(search.built) == 1
    model.add_support(features=query, classes=[0, 1], ids=[2000, 2001])
    assert model.retrieve(features=query, num_neighbors=1).ids[:, 0].tolist() == [2000, 2001]
    assert [len(points) for points in search.built] == [M, M + 2]
    model.use_search(None)
    model.remove_support(2000)
    model(features=query)
    assert len(search.built) == 2


def test_where_an_index_finds_too_few_all_rows_are_searched():
    model, search, query = filled(), AllRows(), torch.randn(4, 8)
    exact = model(features=query)
    model.use_search(search)
    search.search = lambda points, count: torch.tensor([[5, -1, 7], [1, 2, 3], [-1, -1, -1], [4, 4, -1]])
    found = model(features=query)
    assert torch.equal(found.neighbor_indices[[0, 2, 3]], exact.neighbor_indices[[0, 2, 3]])
    assert sorted(found.neighbor_indices[1].tolist()) == [1, 2, 3]
    assert_close(found.neighbor_weights.sum(-1), torch.ones(4))


@pytest.mark.parametrize("options", [{"ranking_normalization": "all"}, {"ranking_relaxation": "entmax"}])
def test_weights_that_need_all_scores_refuse_an_index(options):
    with pytest.raises(ValueError, match=r"needs the scores of all support images.*model.use_search\(None\)"):
        tiny_model(**options).use_search(AllRows())


# --- FAISS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, "HNSW8,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("metric", METRICS)
def test_faiss_finds_the_exact_neighbours(factory, metric):
    pytest.importorskip("faiss")
    model = tiny_model(ranking_metric=metric)
    model.set_support_bank(torch.randn(300, 8), torch.arange(300) % CLASSES)
    query = torch.randn(20, 8)
    exact = model(features=query)
    model.use_search(FaissSearch(factory, num_probes=4))
    found = model(features=query)
    assert torch.equal(found.neighbor_indices, exact.neighbor_indices)
    assert_close(found.logits, exact.logits, atol=1e-5, rtol=1e-5)


def recall_of(model, search, query) -> float:
    """Share of the exact neighbours that a model finds through an index."""
    model.use_search(None)
    exact = model.retrieve(features=query).ids
    model.use_search(search)
    found = model.retrieve(features=query).ids
    return (found[:, :, None] == exact[:, None]).any(1).float().mean().item()


@pytest.mark.parametrize(
    ("factory", "option", "most"), [("IVF32,Flat", "num_probes", 32), ("HNSW4,Flat", "ef_search", 300)]
)
def test_more_visits_find_more(factory, option, most):
    pytest.importorskip("faiss")
    model, query = tiny_model(), torch.randn(50, 8)
    model.set_support_bank(torch.randn(2000, 8), torch.arange(2000) % CLASSES)
    recall = [recall_of(model, FaissSearch(factory, **{option: visits}), query) for visits in (1, most)]
    assert recall[0] < 0.95
    assert recall[1] > 0.999


def test_the_default_finds_nearly_all_neighbours_where_there_are_no_clusters():
    """Principal components whose variances fall as slowly as those of a backbone's features."""
    pytest.importorskip("faiss")
    model = tiny_model(backbone_config=tiny_backbone(hidden_size=64), num_neighbors=10)
    bank, query = torch.randn(12_100, 64).mul(torch.arange(1, 65) ** -0.55).split([12_000, 100])
    model.set_support_bank(bank, torch.arange(12_000) % CLASSES)
    assert recall_of(model, FaissSearch(num_probes=4), query) < 0.8
    assert recall_of(model, FaissSearch(), query) > 0.95


def test_an_index_of_a_data_set_is_used_while_it_fits_the_bank(tmp_path):
    pytest.importorskip("faiss")
    model, query = filled(ranking_metric="euclidean"), torch.randn(5, 8)
    exact = model(features=query)
    dataset = bank_dataset(model)
    assert dataset["ids"][:] == IDS.tolist()
    assert dataset["classes"][:] == CLASSES_OF.tolist()
    dataset.add_faiss_index("points", string_factory="Flat")
    model.use_search(DatasetSearch(dataset))
    assert torch.equal(model(features=query).neighbor_indices, exact.neighbor_indices)
    model.relabel_support(IDS[:1], 2)
    assert torch.equal(model(features=query).neighbor_indices, exact.neighbor_indices)
    model.remove_support(IDS[:1])
    with pytest.raises(ValueError, match="The 40 rows of the indexed data set are not the 39 of the support bank"):
        model(features=query)


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'bpgcn\[faiss\]'"):
        FaissSearch()
