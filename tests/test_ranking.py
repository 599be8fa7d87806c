"""The differentiable neighbour ranking: its gradient, its hard limit, plain-loop oracles, precision, and its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from modeling_bpgcn.ranking import RELAXATIONS, Ranking, similarity, soft_topk

SMOOTH = ("softmax", "lapsum", "threshold", "entmax")  # whose gradient is the derivative of their value
METRICS = ("cosine", "euclidean")
NORMALIZATIONS = ("all", "selected")


def features(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- the gradient is the derivative ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relaxation", [*SMOOTH, "gumbel"])
def test_gradcheck_among_themselves(relaxation, metric, normalization, exclude_self):
    def weights(x, tau):
        torch.manual_seed(3)  # gumbel: the same draw at every evaluation
        return soft_topk(
            x,
            num_neighbors=3,
            temperature=tau,
            metric=metric,
            relaxation=relaxation,
            normalization=normalization,
            exclude_self=exclude_self,
        ).weights

    x = features(6, 3).requires_grad_()
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert max(g.abs().max() for g in torch.autograd.grad(weights(x, tau)[:, 0].sum(), (x, tau))) > 1e-3
    assert gradcheck(weights, (x, tau))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relaxation", SMOOTH)
def test_gradcheck_of_queries_against_keys(relaxation, metric, normalization):
    def weights(query, key, tau):
        return soft_topk(
            query,
            key,
            num_neighbors=3,
            temperature=tau,
            metric=metric,
            relaxation=relaxation,
            normalization=normalization,
            query_ids=torch.arange(4),
            key_ids=torch.arange(2, 9),
        ).weights

    inputs = (features(4, 3), features(7, 3, seed=1), torch.tensor(0.7, dtype=torch.float64))
    inputs = tuple(x.requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(weights(*inputs)[:, 0].sum(), inputs)
    assert all(g.abs().max() > 1e-3 for g in gradients)
    assert gradcheck(weights, inputs)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relaxation", ["softmax", "threshold", "entmax"])
def test_the_derivative_can_be_differentiated(relaxation, metric, normalization):
    def weights(x):
        options = {"metric": metric, "relaxation": relaxation, "normalization": normalization}
        return soft_topk(x, num_neighbors=3, temperature=0.7, **options).weights

    assert gradgradcheck(weights, features(6, 3).requires_grad_())


def test_lapsum_has_its_gradient_where_tied_scores_meet_its_threshold():
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)  # symmetric: b is at 1
    assert gradcheck(lambda s: RELAXATIONS["lapsum"](s, 2, "all").weights[:, 0], (scores,))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_straight_through_is_one_kth_forward_and_softmax_backward(normalization):
    x = features(7, 3).requires_grad_()
    direction = features(7, 3, seed=1)
    hard, soft = (
        soft_topk(x, num_neighbors=3, temperature=0.5, relaxation=r, normalization=normalization)
        for r in ("straight_through", "softmax")
    )
    assert torch.equal(hard.indices, soft.indices)
    assert torch.equal(hard.weights, torch.full_like(hard.weights, 1 / 3))
    expected = torch.autograd.grad(soft.weights, x, direction, retain_graph=True)[0]
    assert expected.abs().max() > 1e-3
    assert_close(torch.autograd.grad(hard.weights, x, direction)[0], expected)


@pytest.mark.parametrize(("normalization", "reached"), [("all", True), ("selected", False)])
def test_only_softmax_over_all_reaches_candidates_that_were_not_chosen(normalization, reached):
    query, key = features(1, 3), features(8, 3, seed=1).requires_grad_()
    ranking = soft_topk(query, key, num_neighbors=3, temperature=0.5, normalization=normalization)
    ranking.weights[0, 0].backward()
    chosen = torch.zeros(8, dtype=torch.bool).index_fill(0, ranking.indices[0], True)
    assert (key.grad[chosen].norm(dim=-1) > 1e-4).all()
    assert ((key.grad[~chosen].norm(dim=-1) > 1e-6) == reached).all()


# --- the hard limit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_at_temperature_zero_the_ranking_is_hard(relaxation, metric, normalization):
    x = features(20, 5)
    ranking = soft_topk(
        x, num_neighbors=4, temperature=1e-6, metric=metric, relaxation=relaxation, normalization=normalization
    )
    scores = similarity(x, x, metric).fill_diagonal_(-math.inf)
    assert torch.equal(ranking.indices, scores.topk(4).indices)
    alike = {"straight_through", "lapsum", "threshold"}  # they choose a set; the others weigh by rank
    limit = torch.full((20, 4), 0.25) if relaxation in alike else torch.eye(4)[0].expand(20, 4)
    assert_close(ranking.weights, limit.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("relaxation", SMOOTH)
def test_at_infinite_temperature_all_neighbours_weigh_the_same(relaxation):
    options = {"num_neighbors": 4, "temperature": 1e9, "relaxation": relaxation}
    selected = soft_topk(features(20, 5), normalization="selected", **options)
    over_all = soft_topk(features(20, 5), normalization="all", **options)
    assert_close(selected.weights, torch.full((20, 4), 1 / 4, dtype=torch.float64))
    assert_close(over_all.weights, torch.full((20, 4), 1 / 19, dtype=torch.float64))


def test_lower_temperature_is_sharper():
    best = [soft_topk(features(20, 5), num_neighbors=4, temperature=tau).weights[:, 0] for tau in (1.0, 0.1, 0.01)]
    assert (best[0] < best[1]).all()
    assert (best[1] < best[2]).all()


# --- a plain loop finds the same -------------------------------------------------------------------------------------


def bisect(excess, low: float, high: float) -> float:
    """The root of a decreasing function."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return middle


def softmax_oracle(s: list[float], k: int) -> list[float]:
    return [math.exp(x - max(s)) for x in s]


def lapsum_oracle(s: list[float], k: int) -> list[float]:
    def cdf(x):
        return 1 - math.exp(-x) / 2 if x > 0 else math.exp(x) / 2

    if len(s) <= k:
        return [1.0] * len(s)
    b = bisect(lambda b: sum(cdf(x - b) for x in s) - k, min(s) - 50, max(s) + 50)
    chances = [cdf(x - b) for x in s]
    assert math.isclose(sum(chances), k, rel_tol=1e-9)  # what gives it its name
    return chances


def threshold_oracle(s: list[float], k: int) -> list[float]:
    ordered = sorted(s, reverse=True)
    theta = (ordered[k - 1] + ordered[k]) / 2 if len(s) > k else ordered[-1]
    return [1 / (1 + math.exp(theta - x)) for x in s]


def entmax_oracle(s: list[float], k: int) -> list[float]:
    def weights(t):
        return [max(x / 2 - t, 0.0) ** 2 for x in s]

    return weights(bisect(lambda t: sum(weights(t)) - 1, max(s) / 2 - 1, max(s) / 2))


ORACLES = {
    "softmax": softmax_oracle,
    "lapsum": lapsum_oracle,
    "threshold": threshold_oracle,
    "entmax": entmax_oracle,
}


def plain_similarity(a: list[float], b: list[float], metric: str) -> float:
    if metric == "euclidean":
        return -sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def plain_soft_topk(query, key, k, tau, metric, relaxation, normalization, excluded) -> Ranking:
    """One query at a time, one candidate at a time; `excluded(i, j)` says that j is no candidate for i."""
    all_indices, all_weights = [], []
    for i, row in enumerate(query.tolist()):
        candidates = [j for j in range(len(key)) if not excluded(i, j)]
        scores = [plain_similarity(row, key[j].tolist(), metric) / tau for j in candidates]
        weights = ORACLES[relaxation](scores, k)
        best = sorted(range(len(candidates)), key=lambda c: -scores[c])[:k]
        total = sum(weights[c] for c in best) if normalization == "selected" else sum(weights)
        all_indices.append([candidates[c] for c in best])
        all_weights.append([weights[c] / total for c in best])
    return Ranking(torch.tensor(all_indices), torch.tensor(all_weights, dtype=torch.float64))


SETTINGS = {
    "seed": st.integers(0, 10_000),
    "size": st.integers(2, 9),
    "width": st.integers(1, 4),
    "k": st.integers(1, 9),
    "tau": st.sampled_from([0.05, 0.3, 1.0]),
    "metric": st.sampled_from(METRICS),
    "normalization": st.sampled_from(NORMALIZATIONS),
}


@pytest.mark.parametrize("relaxation", SMOOTH)
@settings(max_examples=25, deadline=None)
@given(exclude_self=st.booleans(), **SETTINGS)
def test_a_plain_loop_ranks_images_among_themselves_alike(
    relaxation, seed, size, width, k, tau, metric, normalization, exclude_self
):
    # width 1 has cosines of exactly 1: distinct scores are needed for one order
    x = features(size, width + 1, seed=seed)
    ranking = soft_topk(
        x,
        num_neighbors=k,
        temperature=tau,
        metric=metric,
        relaxation=relaxation,
        normalization=normalization,
        exclude_self=exclude_self,
    )
    k = min(k, size - exclude_self)
    expected = plain_soft_topk(x, x, k, tau, metric, relaxation, normalization, lambda i, j: exclude_self and i == j)
    assert torch.equal(ranking.indices, expected.indices)
    assert_close(ranking.weights, expected.weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("relaxation", SMOOTH)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), with_ids=st.booleans(), **SETTINGS)
def test_a_plain_loop_ranks_keys_for_queries_alike(
    relaxation, seed, rows, size, width, k, tau, metric, normalization, with_ids
):
    query, key = features(rows, width + 1, seed=seed), features(size, width + 1, seed=seed + 1)
    k = min(k, size - 1)
    query_ids, key_ids = torch.arange(rows) + 3, torch.arange(size)
    ids = {"query_ids": query_ids, "key_ids": key_ids} if with_ids else {}
    options = {"metric": metric, "relaxation": relaxation, "normalization": normalization}
    ranking = soft_topk(query, key, num_neighbors=k, temperature=tau, **options, **ids)
    expected = plain_soft_topk(query, key, k, tau, excluded=lambda i, j: with_ids and i + 3 == j, **options)
    assert torch.equal(ranking.indices, expected.indices)
    assert_close(ranking.weights, expected.weights, rtol=1e-7, atol=1e-9)


def test_gumbel_draws_neighbours_as_often_as_softmax_weighs_them():
    query, key = features(1, 3), features(4, 3, seed=1)
    drawn = soft_topk(query.expand(20_000, 3), key, num_neighbors=1, temperature=0.5, relaxation="gumbel")
    chances = torch.softmax(similarity(query, key)[0] / 0.5, dim=0)
    frequency = torch.bincount(drawn.indices[:, 0], minlength=4) / 20_000
    assert chances.max() - chances.min() > 0.2
    assert_close(frequency.double(), chances, atol=0.015, rtol=0)


def test_gumbel_repeats_with_the_seed_and_only_then():
    def draw(seed):
        torch.manual_seed(seed)
        return soft_topk(features(20, 4), num_neighbors=4, temperature=0.5, relaxation="gumbel")

    assert torch.equal(draw(1).weights, draw(1).weights)
    assert not torch.equal(draw(1).indices, draw(2).indices)


def test_similarity_is_cosine_or_negative_squared_distance():
    a, b = features(4, 3), features(5, 3, seed=1)
    assert_close(similarity(a, b, "cosine"), torch.cosine_similarity(a[:, None], b[None], dim=-1))
    assert_close(similarity(a, b, "euclidean"), -torch.cdist(a, b).square())


# --- half precision in, float32 inside -------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", [*SMOOTH, "straight_through"])
def test_half_precision_features_are_ranked_in_float32(relaxation):
    x = features(200, 32).bfloat16()
    half = soft_topk(x, num_neighbors=10, temperature=0.05, relaxation=relaxation)
    full = soft_topk(x.float(), num_neighbors=10, temperature=0.05, relaxation=relaxation)
    assert half.weights.dtype == torch.float32
    assert torch.equal(half.indices, full.indices)
    assert torch.equal(half.weights, full.weights)
    # the comparison means something: similarities in bfloat16 would have been ranked otherwise
    in_half = similarity(x, x).fill_diagonal_(-math.inf).topk(10).indices
    assert (in_half != full.indices).float().mean() > 0.01


def test_autocast_does_not_reach_the_ranking():
    x = features(50, 32, dtype=torch.float32)
    plain = soft_topk(x, num_neighbors=10, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        cast = soft_topk(x, num_neighbors=10, temperature=0.05)
    assert torch.equal(cast.indices, plain.indices)
    assert torch.equal(cast.weights, plain.weights)


@pytest.mark.parametrize("relaxation", SMOOTH)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_float32_is_close_to_float64(relaxation, temperature):
    x = features(100, 16)
    double, single = (
        soft_topk(v, num_neighbors=10, temperature=temperature, relaxation=relaxation) for v in (x, x.float())
    )
    same = (double.indices == single.indices).all(-1)
    assert same.float().mean() > 0.9
    assert_close(single.weights[same].double(), double.weights[same], atol=2e-5, rtol=0)


# --- who is a candidate ----------------------------------------------------------------------------------------------


def test_without_ids_no_row_is_its_own_neighbour_even_among_duplicates():
    x = features(4, 3).repeat(2, 1)  # rows i and i + 4 are the same picture
    ranking = soft_topk(x, num_neighbors=3, temperature=0.1)
    assert not (ranking.indices == torch.arange(8)[:, None]).any()
    assert torch.equal(ranking.indices[:, 0], (torch.arange(8) + 4) % 8)


def test_identical_features_under_other_ids_are_neighbours():
    x = features(4, 3).repeat(2, 1)
    ranking = soft_topk(x, num_neighbors=3, temperature=0.1, query_ids=torch.arange(8) + 100)
    assert torch.equal(ranking.indices[:, 0], (torch.arange(8) + 4) % 8)


def test_the_same_id_twice_excludes_both():
    x = features(6, 3)
    x = torch.cat([x, x[:2]])
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    ranking = soft_topk(x, num_neighbors=4, temperature=0.1, query_ids=ids)
    assert not (ids[ranking.indices] == ids[:, None]).any()
    assert torch.equal(ranking.weights[0], ranking.weights[6])


def test_self_is_a_candidate_when_asked_for():
    x = features(6, 3)
    ranking = soft_topk(x, num_neighbors=3, temperature=0.1, exclude_self=False)
    assert torch.equal(ranking.indices[:, 0], torch.arange(6))
    scores = similarity(x, x) / 0.1
    assert_close(ranking.weights, torch.softmax(scores.topk(3).values, -1))


def test_a_query_is_not_its_own_neighbour_among_the_keys_by_id():
    key, key_ids = features(6, 3), torch.tensor([10, 11, 12, 13, 14, 15])
    query, query_ids = key[[4, 1]], torch.tensor([14, 99])
    by_id = soft_topk(query, key, num_neighbors=5, temperature=0.1, query_ids=query_ids, key_ids=key_ids)
    assert 4 not in by_id.indices[0]
    assert by_id.indices[1, 0] == 1  # the same features under an id of its own
    anonymous = soft_topk(query, key, num_neighbors=5, temperature=0.1)
    assert anonymous.indices[:, 0].tolist() == [4, 1]
    allowed = soft_topk(
        query, key, num_neighbors=5, temperature=0.1, query_ids=query_ids, key_ids=key_ids, exclude_self=False
    )
    assert torch.equal(allowed.indices, anonymous.indices)


@pytest.mark.parametrize(("exclude_self", "candidates"), [(True, 4), (False, 5)])
def test_more_neighbours_than_candidates_gives_every_candidate(exclude_self, candidates):
    ranking = soft_topk(features(5, 3), num_neighbors=50, temperature=0.1, exclude_self=exclude_self)
    assert ranking.indices.shape == ranking.weights.shape == (5, candidates)
    assert ranking.indices.sort(-1).values.diff().min() >= 1
    assert_close(ranking.weights.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rows_with_fewer_candidates_get_weight_zero_for_the_missing(relaxation, normalization, metric, scale):
    x = (scale * features(6, 3)).requires_grad_()
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([7, 7, 7, 7, 8, 9])  # rows 0 to 3 have two candidates
    ranking = soft_topk(
        x,
        num_neighbors=4,
        temperature=tau,
        relaxation=relaxation,
        normalization=normalization,
        metric=metric,
        query_ids=ids,
    )
    missing = ids[ranking.indices] == ids[:, None]
    assert missing.sum(-1).tolist() == [2, 2, 2, 2, 0, 0]
    assert (ranking.weights[missing] == 0).all()
    assert (ranking.weights[:, 0] > 0).all()
    if normalization == "selected":
        assert_close(ranking.weights.sum(-1), torch.ones(6, dtype=torch.float64))
    (ranking.weights * features(6, 4, seed=2)).sum().backward()
    assert x.grad.isfinite().all()
    assert tau.grad.isfinite()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_row_without_any_candidate_gets_zeros_and_leaves_the_others_alone(relaxation, normalization):
    def rank(query, query_ids):
        torch.manual_seed(0)
        return soft_topk(
            query,
            key,
            num_neighbors=3,
            temperature=tau,
            relaxation=relaxation,
            normalization=normalization,
            query_ids=query_ids,
            key_ids=torch.full((5,), 1),
        )

    query, key = features(3, 4).requires_grad_(), features(5, 4, seed=1).requires_grad_()
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ranking = rank(query, torch.tensor([2, 3, 1]))
    assert (ranking.weights[2] == 0).all()
    assert torch.equal(ranking.weights[:2], rank(query, torch.tensor([2, 3, 4])).weights[:2])
    (ranking.weights * features(3, 3, seed=2)).sum().backward()
    assert (query.grad[2] == 0).all()
    assert query.grad[:2].abs().max() > 1e-3
    assert all(v.grad.isfinite().all() for v in (query, key, tau))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_zero_features_give_finite_weights_and_gradients(relaxation, metric, normalization):
    x = features(6, 3)
    x[:4] = 0
    for rows in (x, torch.zeros(6, 3, dtype=torch.float64)):
        leaf = rows.clone().requires_grad_()
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        ranking = soft_topk(
            leaf, num_neighbors=3, temperature=tau, metric=metric, relaxation=relaxation, normalization=normalization
        )
        (ranking.weights * features(6, 3, seed=1)).sum().backward()
        assert ranking.weights.isfinite().all()
        assert (ranking.weights > 0).any(-1).all()
        assert leaf.grad.isfinite().all()
        assert tau.grad.isfinite()


def test_a_zero_vector_is_at_cosine_0_and_gets_no_gradient():
    x = features(3, 3)
    x[1] = 0
    x.requires_grad_()
    scores = similarity(x, x)
    assert (scores[1] == 0).all()
    scores.sum().backward()
    assert (x.grad[1] == 0).all()
    assert x.grad[0].abs().max() > 1e-3


def test_a_learned_temperature_gets_a_finite_gradient_beside_excluded_candidates():
    # an excluded candidate's score is -inf: divided by tau after masking, it would make this gradient NaN
    for normalization in NORMALIZATIONS:
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        soft_topk(features(6, 3), num_neighbors=3, temperature=tau, normalization=normalization).weights[
            0, 0
        ].backward()
        assert tau.grad.isfinite()
        assert tau.grad.abs() > 1e-3


def test_a_single_image_has_no_neighbours_but_keeps_its_place_in_the_graph():
    x = features(1, 3).requires_grad_()
    ranking = soft_topk(x, num_neighbors=3, temperature=0.1)
    assert ranking.indices.shape == ranking.weights.shape == (1, 0)
    assert ranking.indices.dtype == torch.int64
    ranking.weights.sum().backward()
    assert (x.grad == 0).all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0: on cosines 0.02 to 0.1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
        ({"num_neighbors": 0}, "num_neighbors=0 must be at least 1"),
        ({"relaxation": "hard"}, "relaxation='hard' is unknown: choose one of softmax, straight_through, lapsum"),
        ({"normalization": "none"}, "normalization='none' is unknown: choose all or selected"),
        ({"metric": "dot"}, "metric='dot' is unknown: choose cosine or euclidean"),
        ({"query": torch.zeros(3)}, r"query \[N, D\] and key \[M, D\] must be two-dimensional .* got \(3,\)"),
        ({"key": torch.zeros(4, 5)}, r"with one width; got \(6, 3\) and \(4, 5\)"),
        ({"key": torch.zeros(3)}, r"got \(6, 3\) and \(3,\)"),
        ({"key": torch.zeros(4, 3), "query_ids": torch.arange(6)}, "exclude each other by id: give both or neither"),
        ({"key": torch.zeros(4, 3), "key_ids": torch.arange(4)}, "exclude each other by id: give both or neither"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"query": torch.zeros(6, 3), "num_neighbors": 2, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        soft_topk(arguments.pop("query"), arguments.pop("key", None), **arguments)


def test_sparsemax_is_the_projection_onto_the_simplex():
    query, key = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    scores = similarity(query, key) / 0.5
    low, high = scores.amin(1, keepdim=True) - 1, scores.amax(1, keepdim=True)
    for _ in range(100):
        theta = (low + high) / 2
        above = (scores - theta).clamp_min(0).sum(1, keepdim=True) > 1
        low, high = torch.where(above, theta, low), torch.where(above, high, theta)
    expected = (scores - theta).clamp_min(0)
    assert (expected == 0).any(), "nothing is left out"
    options = {"num_neighbors": 9, "temperature": 0.5, "relaxation": "sparsemax", "normalization": "all"}
    found = soft_topk(query, key, **options)
    assert_close(found.weights, expected.gather(1, found.indices))
    query.requires_grad_()
    wide = options | {"num_neighbors": 4, "temperature": 2.0}
    weights = soft_topk(query, key, **wide).weights
    assert torch.autograd.grad(weights.square().sum(), query)[0].abs().max() > 1e-3
    assert gradcheck(lambda x: soft_topk(x, key, **wide).weights, (query,))
