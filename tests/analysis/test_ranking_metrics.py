"""Ranking metrics: each equals a plain loop over its definition and, where there is one, the library's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from modeling_bpgcn.analysis.ranking_metrics import edge_churn, effective_neighbors, hubness, ranking_quality


@st.composite
def rankings(draw):
    """Features, classes, queries and candidates; some features are copies of others, some queries are candidates."""
    N, C = draw(st.integers(3, 24)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    # One coordinate each: similarities are exactly -1, 0 or 1, so that ties abound and rounding cannot break them.
    directions = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    tied = draw(st.booleans())
    features = (
        directions[torch.randint(6, (N,), generator=generator)]
        if tied
        else torch.randn(N, 3, dtype=torch.float64, generator=generator)
    )
    classes = torch.randint(C, (N,), generator=generator)
    order = torch.randperm(N, generator=generator)
    queries, candidates = order[: draw(st.integers(1, N))], order.flip(0)[: draw(st.integers(2, N))]
    return features, classes, queries, candidates, draw(st.integers(1, 12))


def _naive(features, classes, query, candidates):
    """Same-class flags and scores of a query's candidates, nearest first."""
    pairs = []
    for candidate in candidates.tolist():
        if candidate != query:
            score = F.cosine_similarity(features[query], features[candidate], dim=0).item()
            pairs.append((score, candidate, classes[candidate] == classes[query]))
    return sorted(pairs, key=lambda pair: -pair[0])


@given(rankings())
@settings(max_examples=80, deadline=None)
def test_each_query_gets_what_a_plain_loop_and_scikit_learn_give_it(case):
    features, classes, queries, candidates, k = case
    result = ranking_quality(features, classes, queries, candidates, k)
    smallest = min(len(_naive(features, classes, query, candidates)) for query in queries.tolist())
    assert result["neighbors"].shape == (len(queries), min(k, smallest))

    for row, query in enumerate(queries.tolist()):
        pairs = _naive(features, classes, query, candidates)
        relevant = [bool(same) for _, _, same in pairs]
        scores = [round(score, 12) for score, _, _ in pairs]
        if any(relevant):
            expected = average_precision_score(relevant, scores)
            assert result["average_precision"][row].item() == pytest.approx(expected, abs=1e-9)
        else:
            assert math.isnan(result["average_precision"][row])

        nearest = result["neighbors"][row].tolist()
        assert query not in nearest
        assert len(set(nearest)) == len(nearest)
        chosen = {candidate: (score, same) for score, candidate, same in pairs}
        # among ties any choice is right: the scores are those of the best k, nearest first
        assert [chosen[j][0] for j in nearest] == pytest.approx(scores[: len(nearest)], abs=1e-9)
        same = [bool(chosen[j][1]) for j in nearest]
        assert result["homophily"][row].item() == pytest.approx(sum(same) / len(same))
        assert result["recall"][row].item() == float(any(same))


def test_a_ranking_by_hand():
    features = torch.tensor([[1.0, 0.0], [4.0, 0.4], [1.0, 0.5], [1.0, 1.0], [0.0, 1.0]])
    result = ranking_quality(features, torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0]), torch.arange(5), 2)
    assert result["neighbors"].tolist() == [[1, 2]]
    assert result["average_precision"].item() == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert result["homophily"].item() == 0.5
    assert result["recall"].item() == 1


def test_rows_in_parts_equal_rows_at_once(monkeypatch):
    features, classes, nodes = torch.randn(50, 8).double(), torch.randint(3, (50,)), torch.arange(50)
    whole = ranking_quality(features, classes, nodes, nodes)
    monkeypatch.setattr("modeling_bpgcn.analysis.ranking_metrics.ROWS_AT_ONCE", 7)
    parts = ranking_quality(features, classes, nodes, nodes)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_half_precision_is_computed_in_float32():
    features, nodes = torch.randn(40, 8).bfloat16(), torch.arange(40)
    half = ranking_quality(features, nodes % 4, nodes, nodes)
    torch.testing.assert_close(half, ranking_quality(features.float(), nodes % 4, nodes, nodes))
    assert half["average_precision"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": torch.zeros(5).long()}, "shapes"),
        ({"classes": torch.tensor([0, 0, 1, -100])}, "unknown"),
        ({"features": torch.full((4, 2), torch.nan)}, "diverged"),
        ({"queries": torch.tensor([4])}, "0 to 3"),
        ({"queries": torch.tensor([True, False, True, False])}, "nonzero"),
        ({"candidates": torch.tensor([], dtype=torch.int64)}, "at least one"),
        ({"candidates": torch.tensor([1, 1])}, "twice"),
        ({"queries": torch.tensor([1]), "candidates": torch.tensor([1])}, "itself"),
        ({"num_neighbors": 0}, "num_neighbors"),
    ],
)
def test_bad_input_names_itself(change, message):
    arguments = {
        "features": torch.randn(4, 2),
        "classes": torch.tensor([0, 0, 1, 1]),
        "queries": torch.tensor([0]),
        "candidates": torch.arange(4),
    }
    with pytest.raises(ValueError, match=message):
        ranking_quality(**(arguments | change))


# --- hubness ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_hubness_is_the_skewness_of_how_often_each_node_is_chosen(seed, num_nodes):
    indices = torch.randint(num_nodes, (9, 3), generator=torch.Generator().manual_seed(seed))
    counts = [sum(row.count(node) for row in indices.tolist()) for node in range(num_nodes)]
    mean = sum(counts) / num_nodes
    variance = sum((count - mean) ** 2 for count in counts) / num_nodes
    third = sum((count - mean) ** 3 for count in counts) / num_nodes
    assert hubness(indices, num_nodes) == pytest.approx(third / variance**1.5 if variance else 0.0)


def test_one_hub_gives_a_large_hubness_and_a_ring_none():
    assert hubness(torch.zeros(50, 1).long(), 50) == pytest.approx(48 / 49**0.5)
    assert hubness((torch.arange(50) + 1)[:, None] % 50, 50) == 0


@pytest.mark.parametrize("indices", [[[5]], [[-1]], [[]]])
def test_hubness_refuses_neighbors_outside_of_the_nodes(indices):
    with pytest.raises(ValueError, match="0 to 4"):
        hubness(torch.tensor(indices, dtype=torch.int64), 5)


# --- edges ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_edge_churn_is_the_share_of_new_edges(seed, k):
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.rand(2, 7, 9, generator=generator).argsort(-1)[..., :k]
    new = [len(set(new) - set(old)) for old, new in zip(before.tolist(), after.tolist(), strict=True)]
    assert edge_churn(before, after) == pytest.approx(sum(new) / (7 * k))
    assert edge_churn(before, before.flip(-1)) == 0


def test_edge_churn_refuses_graphs_of_different_shape():
    with pytest.raises(ValueError, match="alike"):
        edge_churn(torch.zeros(3, 2), torch.zeros(3, 4))


def test_effective_neighbors_count_equal_weights_and_ignore_scale():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(effective_neighbors(weights), torch.tensor([4.0, 1.0, 2.0, 0.0]))
    uneven = torch.rand(5, 6, dtype=torch.float64)
    share = uneven / uneven.sum(-1, keepdim=True)
    torch.testing.assert_close(effective_neighbors(7 * uneven), torch.exp(-(share * share.log()).sum(-1)))


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_effective_neighbors_refuses_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="negative or NaN"):
        effective_neighbors(torch.tensor([[0.5, weight]]))
