"""Rows of all processes: the values, the adjoint, and processes that do not fit together."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_bpgcn.training.gather import DTYPES, gather_rows, gather_sizes
from tests.distributed.processes import error_of, run_processes

SIZES = {"even": (2, 2, 2), "uneven": (3, 1, 4), "empty": (2, 0, 3), "none": (0, 0, 0)}
SHAPES = {"two": (5,), "one": (), "four": (2, 3, 2), "no width": (0,)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def _rows(sizes: tuple, shape: tuple, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)).to(dtype)


def _loss(x: Tensor) -> Tensor:
    """Each element has its own gradient, which depends on the others."""
    scale = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
    return (x * scale).sum() + (x * x.sum(0)).sum() / 10


def _network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class _Graph(nn.Module):
    """A backbone for each process's rows, and a head on those of all."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = _network(), nn.Linear(3, 2).double()

    def forward(self, x):
        features = gather_rows(self.backbone(x))
        return self.head(torch.softmax(features @ features.T, dim=1) @ features)


def _gradients_of(graph: nn.Module, x: Tensor) -> dict[str, Tensor]:
    graph(x).square().sum().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in graph.named_parameters()}


def _work(rank: int, world: int) -> dict:
    results = {"values": {}, "gradients": {}}
    for case, sizes in SIZES.items():
        for shape_name, shape in SHAPES.items():
            for dtype in DTYPES:
                own = _rows(sizes, shape, dtype).split(sizes)[rank]
                results["values"][case, shape_name, dtype] = gather_rows(own)
        for dtype in TOLERANCE:
            own = _rows(sizes, (5,), dtype).split(sizes)[rank].detach().requires_grad_()
            _loss(gather_rows(own)).backward()
            results["gradients"][case, dtype] = own.grad
    # every second element: neither the rows nor their gradient are contiguous
    wide = _rows((4, 4, 4), (6,), torch.float64).split(4)[rank].requires_grad_()
    _loss(gather_rows(wide.T[::2].T).T).backward()
    results["strided"] = wide.grad
    results["sizes"] = gather_sizes(torch.zeros(rank + 1))

    ten = torch.zeros(2, 3)
    results["errors"] = {
        "width": error_of(gather_rows, torch.zeros(2, 3 + (rank == 2))),
        "dimensions": error_of(gather_rows, torch.zeros(2, 3) if rank else torch.zeros(2)),
        "dtype": error_of(gather_rows, ten.double() if rank == 1 else ten),
        "gradient": error_of(gather_rows, ten.clone().requires_grad_(rank == 0)),
        "unknown": error_of(gather_rows, ten.to(torch.int16) if rank else ten),
        "scalar": error_of(gather_rows, torch.tensor(1.0) if rank else ten),
    }
    own = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    [first] = torch.autograd.grad(gather_rows(own).pow(3).sum(), own, create_graph=True)
    results["twice"] = error_of(first.sum().backward)
    # after all these errors the processes still understand each other
    results["after"] = gather_rows(torch.tensor([rank]))

    torch.manual_seed(2)
    images = _rows((2, 1, 4), (4,), torch.float64).split((2, 1, 4))[rank]
    results["ddp"] = _gradients_of(DistributedDataParallel(_Graph()), images)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What three processes found."""
    return run_processes(_work, 3, tmp_path_factory.mktemp("gather"))


def test_all_processes_hold_the_rows_of_all_in_rank_order(ranks):
    for result in ranks:
        assert len(result["values"]) == len(SIZES) * len(SHAPES) * len(DTYPES)
        for (case, shape, dtype), value in result["values"].items():
            expected = _rows(SIZES[case], SHAPES[shape], dtype)
            assert value.dtype == dtype
            assert torch.equal(value, expected), (case, shape, dtype)
        assert result["sizes"] == [1, 2, 3]


def test_the_gradient_is_the_sum_over_the_processes_of_that_of_the_own_rows(ranks):
    for (case, dtype), _ in ranks[0]["gradients"].items():
        x = _rows(SIZES[case], (5,), dtype).double().requires_grad_()
        _loss(x).backward()
        assert case == "none" or x.grad.norm() > 1
        for result, expected in zip(ranks, x.grad.split(SIZES[case]), strict=True):
            found = result["gradients"][case, dtype]
            assert found.dtype == dtype
            bound = TOLERANCE[dtype] * (x.grad.abs().max().item() if x.numel() else 1)
            torch.testing.assert_close(found.double() / 3, expected, rtol=0, atol=2 * bound)


def test_rows_and_gradients_need_not_be_contiguous(ranks):
    x = _rows((4, 4, 4), (6,), torch.float64).requires_grad_()
    _loss(x.T[::2].T.T).backward()
    for result, expected in zip(ranks, x.grad.split(4), strict=True):
        torch.testing.assert_close(result["strided"] / 3, expected)


def test_under_ddp_backbone_and_head_get_the_gradient_of_one_process(ranks):
    torch.manual_seed(2)
    expected = _gradients_of(_Graph(), _rows((2, 1, 4), (4,), torch.float64))
    for result in ranks:
        assert result["ddp"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-6, name
            torch.testing.assert_close(result["ddp"][name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("width", "process 1 has float32 [rows, 3]; process 2 has float32 [rows, 4]"),
        ("dimensions", "process 0 has float32 [rows]; process 1 has float32 [rows, 3]"),
        ("dtype", "process 0 has float32 [rows, 3]; process 1 has float64 [rows, 3]"),
        ("gradient", "process 0 has float32 [rows, 3] with a gradient; process 1 has float32 [rows, 3];"),
        ("unknown", "process 1 has a tensor of no dimension, more than 6, or an unknown dtype"),
        ("scalar", "process 1 has a tensor of no dimension, more than 6, or an unknown dtype"),
    ],
)
def test_processes_that_do_not_fit_together_all_say_so(ranks, fault, words):
    for result in ranks:
        assert result["errors"][fault].startswith("ValueError: All processes must gather rows of one shape and dtype")
        assert words in result["errors"][fault]
        assert result["after"].tolist() == [0, 1, 2]


def test_a_gradient_of_the_gradient_is_refused(ranks):
    for result in ranks:
        assert "once_differentiable" in result["twice"]


def test_one_process_gets_its_own_rows_back():
    x = torch.ones(3, 2, requires_grad=True)
    assert gather_rows(x) is x
    assert gather_sizes(x) == [3]
