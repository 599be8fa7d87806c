"""The rankings of rows spread over processes equal that of one process, in value and gradient."""

import os
import re
import time
import weakref
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_bpgcn import tiled
from modeling_bpgcn.ranking import soft_topk
from modeling_bpgcn.training import sharded_ranking
from modeling_bpgcn.training.sharded_ranking import rank_ring, rank_rows
from tests.distributed.processes import error_of, run_processes
from tests.distributed.ranking_cases import CASES, SHARDS, Case, loss

FUNCTIONS = {"rows": rank_rows, "ring": rank_ring}
PATIENCE = 3.0
FEW = partial(dict, num_neighbors=2, temperature=0.1)


def _rank(case: Case, rank: int, world: int) -> tuple:
    sizes = SHARDS[case.shards][world]
    own = case.features(world).split(sizes)[rank].clone().requires_grad_()
    ids, temperature = case.node_ids(world), case.temperature()
    ids = None if ids is None else ids.split(sizes)[rank]
    torch.manual_seed(7)
    ranking = FUNCTIONS[case.function](own, ids, temperature=temperature, **case.options())
    loss(ranking.weights).backward()
    return ranking.indices, ranking.weights.detach(), own.grad, temperature.grad, torch.rand(())


def _own(rank: int) -> Tensor:
    return torch.randn(30, 64, generator=torch.Generator().manual_seed(rank))


def _errors(rank: int) -> dict[str, str]:
    x, options = torch.randn(3, 4), FEW()
    errors = {}
    for name, function in FUNCTIONS.items():
        errors |= {
            f"{name} width": error_of(function, torch.randn(3, 4 + rank), **options),
            f"{name} ids": error_of(function, x, torch.arange(3 + rank), **options),
            f"{name} k": error_of(function, x, **FEW(num_neighbors=0)),
            f"{name} temperature": error_of(function, x, **FEW(temperature=0.0)),
            f"{name} metric": error_of(function, x, metric="angle", **options),
            f"{name} shape": error_of(function, torch.randn(3), **options),
        }
    errors["ring relaxation"] = error_of(rank_ring, x, relaxation="entmax", **options)
    errors["ring threshold"] = error_of(rank_ring, x, relaxation="threshold", normalization="all", **options)
    errors["ring normalization"] = error_of(rank_ring, x, normalization="some", **options)
    x = x.double().requires_grad_()
    [first] = torch.autograd.grad(rank_ring(x, **options).weights.square().sum(), x, create_graph=True)
    errors["ring twice"] = error_of(first.sum().backward)
    return errors


def _work(rank: int, world: int) -> dict:
    tiled.TILE = 8
    results = {"cases": {tuple(case): _rank(case, rank, world) for case in CASES}}
    results["errors"] = _errors(rank)
    options = FEW(normalization="all")
    x = _own(rank).requires_grad_()
    results["one"] = [tuple(function(x[: rank == 0], **options)) for function in FUNCTIONS.values()]
    results["without candidates"] = []
    for function in FUNCTIONS.values():
        weights = function(x[:3], torch.ones(3, dtype=torch.long), **options).weights
        results["without candidates"].append((weights, *torch.autograd.grad(weights.sum(), x)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results["half"] = [tuple(function(x.detach().bfloat16(), **FEW())) for function in FUNCTIONS.values()]
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What so many processes found."""
    return run_processes(_work, request.param, tmp_path_factory.mktemp("ranks"))


def _name(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_ranking_of_shards_equals_that_of_one_process(ranks, case):
    world = len(ranks)
    sizes = SHARDS[case.shards][world]
    x, temperature = case.features(world).requires_grad_(), case.temperature()
    torch.manual_seed(7)
    options = case.options() | {"backend": "dense", "query_ids": case.node_ids(world)}
    expected = soft_topk(x, temperature=temperature, **options)
    loss(expected.weights).backward()
    assert x.grad.norm() > 1e-4
    assert temperature.grad.abs() > 1e-6

    found = [result["cases"][tuple(case)] for result in ranks]
    for indices, weights, _, _, following in found:
        torch.testing.assert_close(weights, expected.weights, rtol=0, atol=1e-10)
        neighbors = expected.weights > 0
        assert torch.equal(indices[neighbors], expected.indices[neighbors])
        # draws, too, leave all processes in one state
        assert following == found[0][-1]
    # a loss that every process has counts as often
    gradient = torch.cat([own for _, _, own, _, _ in found]) / world
    torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-10)
    assert [len(own) for _, _, own, _, _ in found] == list(sizes)
    mean = torch.stack([own for _, _, _, own, _ in found]).mean()
    torch.testing.assert_close(mean, temperature.grad, rtol=0, atol=1e-10)


def test_the_cases_with_ties_have_some_across_processes():
    case = Case("ring", "power", data="ties")
    scores = case.features(2) @ case.features(2).T
    best = scores.fill_diagonal_(-100.0).topk(6).values
    assert (best[:, 4] == best[:, 5]).float().mean() > 0.3


def test_a_single_row_and_rows_without_candidates_rank_nothing(ranks):
    for result in ranks:
        for indices, weights in result["one"]:
            assert indices.shape == weights.shape == (1, 0)
        for weights, gradient in result["without candidates"]:
            assert weights.shape == (3 * len(ranks), 2)
            assert not weights.any()
            assert not gradient.any()


def test_half_precision_is_ranked_in_single_precision(ranks):
    x = torch.cat([_own(rank) for rank in range(len(ranks))]).bfloat16()
    expected = soft_topk(x, **FEW())
    for result in ranks:
        for indices, weights in result["half"]:
            assert torch.equal(indices, expected.indices)
            torch.testing.assert_close(weights, expected.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("width", "ValueError: All processes must gather rows of one shape"),
        ("ids", "ValueError: Each row needs one id: the processes have"),
        ("k", "ValueError: num_neighbors=0 must be at least 1"),
        ("temperature", "ValueError: .*temperature=0.0 "),
        ("metric", "ValueError: metric='angle' is unknown"),
        ("shape", "ValueError: .*two-dimensional"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_process_says_what_is_wrong(ranks, function, fault, words):
    for result in ranks:
        assert re.match(words, result["errors"][f"{function} {fault}"])


def test_the_ring_names_what_to_use_for_other_relaxations_and_has_no_second_order(ranks):
    for result in ranks:
        for fault in ("relaxation", "threshold", "normalization"):
            assert result["errors"][f"ring {fault}"].startswith("ValueError: rank_ring has no relaxation=")
            assert "use rank_rows" in result["errors"][f"ring {fault}"]
        assert "once_differentiable" in result["errors"]["ring twice"]


def test_one_process_alone_gets_the_ranking_of_its_rows():
    x = torch.randn(20, 4, dtype=torch.float64)
    expected = soft_topk(x, **FEW())
    for function in FUNCTIONS.values():
        found = function(x, **FEW())
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.weights, expected.weights)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return result


class _Counted(sharded_ranking._Exchange):
    """The most tensors that have come from other processes, or are coming, at a time."""

    most = 0
    received: ClassVar[list[weakref.ref]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.received.append(weakref.ref(self._received))
        _Counted.most = max(self.most, sum(reference() is not None for reference in self.received))


def _measure(rank: int, world: int) -> dict[str, int]:
    tiled.TILE = 8
    sharded_ranking._Exchange = _Counted
    x, results = _own(rank).requires_grad_(), {}
    for name, function in FUNCTIONS.items():
        with _Largest() as largest:
            weights = function(x, num_neighbors=1, temperature=0.1, normalization="all").weights
            if name == "ring":
                results["forward"] = _Counted.most
            weights.square().sum().backward()
        results[name] = largest.elements
    return results | {"backward": _Counted.most}


def test_the_ring_holds_two_shards_of_others_and_one_gradient_and_never_more(tmp_path: Path):
    for result in run_processes(_measure, 4, tmp_path):
        assert result["ring"] <= 30 * 64
        assert result["rows"] >= 4 * 30 * 64
        assert result["forward"] == 2
        assert result["backward"] == 3


def _lose_one(way: str, rank: int, world: int) -> tuple[str, float]:
    def leave(*args):
        if way == "ends":
            os._exit(3)
        time.sleep(600)

    if rank == 1:
        sharded_ranking.search = leave  # in the middle of a round
    start = time.monotonic()
    return error_of(rank_ring, torch.randn(9, 4), **FEW()), time.monotonic() - start


@pytest.mark.parametrize("way", ["ends", "stays silent"])
def test_the_others_end_with_an_error_when_a_process_is_lost(way, tmp_path: Path):
    for error, seconds in run_processes(partial(_lose_one, way), 3, tmp_path, patience=PATIENCE, lost=1):
        assert error.startswith("RuntimeError")
        assert seconds < 10 * PATIENCE
