"""Curvature equals that of the explicit Hessian, for head, features and last blocks, and leaves the model as it was."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian as explicit_hessian
from torch.func import functional_call
from torch.testing import assert_close

from modeling_bpgcn.analysis.curvature import Hessian, curvature, hessian_vector_product, top_eigenvalues, trace
from modeling_bpgcn.analysis.fixed_objective import PARTS, fixed_objective, objective_of
from modeling_bpgcn.training.freezing import train_last_blocks
from tests.model_factory import BACKBONES, tiny_backbone, tiny_images, tiny_model

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, -100, -100, -100, -100, 0, 1])
SEED = 3


def double_model(**overrides):
    """In training mode, with dropout everywhere; all parts of the objective."""
    backbone = overrides.pop("backbone_config", None) or tiny_backbone(hidden_size=4, hidden_dropout_prob=0.2)
    fields = {"head_dropout": 0.5, "neighborhood_loss_weight": 0.5, "consistency_loss_weight": 0.2}
    return tiny_model(backbone_config=backbone, **(fields | overrides)).double().train()


def images() -> dict[str, Tensor]:
    return {"pixel_values": tiny_images(len(LABELS)).double(), "labels": LABELS, "node_ids": torch.arange(12) + 40}


def tensors_of(model, batch, part: str) -> dict[str, Tensor]:
    """What a part consists of, by name, written down anew."""
    if part == "features":
        with torch.no_grad():
            return {"features": model.eval().get_image_features(batch["pixel_values"])}
    named = dict(model.named_parameters())
    if part == "head":
        return {name: p.detach() for name, p in named.items() if name.startswith("head.")}
    last = ("backbone.encoder.layer.1.", "backbone.layers.1.", "backbone.layernorm.")
    return {name: p.detach() for name, p in named.items() if any(f".{end}" in f".{name}" for end in last)}


def loss_of_flat(model, batch, part: str):
    """The objective as a function of the part's numbers in one vector [n], by plain attention; and that vector."""
    tensors = tensors_of(model, batch, part)
    model.eval().set_attn_implementation("eager")

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([t.numel() for t in tensors.values()])
        values = {n: piece.view_as(t) for (n, t), piece in zip(tensors.items(), pieces, strict=True)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            inputs = {"labels": batch["labels"], "node_ids": batch["node_ids"], "support": "batch"}
            if part == "features":
                return model(**values, **inputs).loss
            return functional_call(model, values, kwargs={"pixel_values": batch["pixel_values"], **inputs}).loss

    return loss, torch.cat([t.flatten() for t in tensors.values()])


def quadratic(matrix: Tensor) -> Hessian:
    """Of x^T A x / 2, whose Hessian is A."""
    x = torch.randn(len(matrix), dtype=matrix.dtype, requires_grad=True)
    return Hessian(lambda: x @ matrix @ x / 2, [x])


@pytest.fixture(scope="module", params=PARTS)
def known(request) -> tuple[str, Hessian, Tensor]:
    """A part, its Hessian as an operator, and as a matrix [n, n]."""
    torch.manual_seed(0)
    model, batch = double_model(), images()
    operator = Hessian(*objective_of(model, batch, request.param, seed=SEED))
    matrix = explicit_hessian(*loss_of_flat(model, batch, request.param))
    assert matrix.abs().max() > 1e-2
    assert matrix.count_nonzero() > matrix.numel() / 10
    assert_close(matrix, matrix.T)
    return request.param, operator, matrix


# --- products ---------------------------------------------------------------------------------------------------------


def test_products_are_those_with_the_explicit_matrix(known):
    part, hessian, matrix = known
    assert hessian.size == len(matrix) == {"head": 67, "features": 48, "last_blocks": 188}[part]
    for _ in range(3):
        vector = torch.randn(hessian.size, dtype=torch.float64)
        assert_close(hessian @ vector, matrix @ vector, rtol=1e-9, atol=1e-11)


def test_products_keep_the_shapes_of_the_tensors():
    a, b = (
        torch.randn(3, 2, dtype=torch.float64).requires_grad_(),
        torch.randn((), dtype=torch.float64).requires_grad_(),
    )
    vectors = [torch.randn(3, 2, dtype=torch.float64), torch.randn((), dtype=torch.float64)]
    found = hessian_vector_product(lambda: (a**3).sum() * b, [a, b], vectors)
    assert_close(found[0], 6 * a * b * vectors[0] + 3 * a**2 * vectors[1])
    assert_close(found[1], (3 * a**2 * vectors[0]).sum())
    assert found[0].abs().max() > 0


def test_a_linear_loss_and_a_tensor_without_part_in_it_have_no_curvature():
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert torch.equal(Hessian(lambda: 2 * a.sum(), [a, b]) @ torch.ones(5), torch.zeros(5))
    expected = torch.tensor([2.0, 2, 2, 0, 0])
    with torch.no_grad():
        assert torch.equal(Hessian(lambda: (a**2).sum(), [a, b]) @ torch.ones(5), expected)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "fields",
    [
        {"head": "gat", "graph_symmetrization": "mean", "graph_normalization": "symmetric"},
        {"head": "arma", "ranking_relaxation": "entmax"},
        {"head": "appnp", "ranking_normalization": "all", "learn_temperature": True},
        {"head": "sgc", "ranking_metric": "euclidean", "propagation_steps": 0, "ranking_temperature": 3.0},
    ],
    ids=lambda fields: fields["head"],
)
def test_products_are_differences_of_gradients_in_other_models(part, fields):
    model, batch = double_model(**fields), images()
    loss, flat = loss_of_flat(model, batch, part)
    direction = torch.nn.functional.normalize(torch.randn_like(flat), dim=0)
    step = 1e-5
    ends = []
    for sign in (1, -1):
        x = (flat + sign * step * direction).requires_grad_()
        ends.append(torch.autograd.grad(loss(x), x)[0])
    expected = (ends[0] - ends[1]) / (2 * step)
    model.set_attn_implementation("sdpa")
    found = Hessian(*objective_of(model, batch, part, seed=SEED)) @ direction
    assert expected.abs().max() > 1e-3
    assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# --- eigenvalues ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["magnitude", "algebraic"])
@pytest.mark.parametrize("k", [1, 4])
def test_top_eigenvalues_are_those_of_the_explicit_matrix(known, which, k):
    _, hessian, matrix = known
    values = torch.linalg.eigvalsh(matrix)
    expected = values[(values.abs() if which == "magnitude" else values).argsort(descending=True)][:k]
    assert expected.abs().min() > 0.01
    found = top_eigenvalues(hessian, k, which=which, tolerance=1e-7)
    assert found.converged
    assert found.num_products < len(matrix)
    assert_close(found.values, expected, rtol=1e-6, atol=0)
    assert_close(found.vectors @ found.vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    errors = found.vectors @ matrix - found.values[:, None] * found.vectors
    assert_close(found.residuals, errors.norm(dim=1), rtol=1e-4, atol=1e-11)
    assert found.residuals.max() <= 1e-7 * values.abs().max()


def test_too_few_products_are_told(known):
    _, hessian, matrix = known
    found = top_eigenvalues(hessian, 3, tolerance=1e-7, max_products=5)
    assert not found.converged
    assert found.num_products == 5 + 3
    # each residual bounds the distance to an eigenvalue
    values = torch.linalg.eigvalsh(matrix)
    distance = (found.values[:, None] - values).abs().amin(1)
    assert (distance <= found.residuals + 1e-12).all()
    assert distance.max() > 1e-7


@pytest.mark.parametrize(
    ("values", "which", "expected"),
    [
        ([2, 2, 1, 0.5, -3], "algebraic", [2, 2, 1]),
        ([2, 2, 1, 0.5, -3, -3], "magnitude", [-3, -3, 2]),
        ([5, 5, 5, 5], "magnitude", [5, 5, 5]),
        ([4, 0, 0, 0, 0, 0], "magnitude", [4, 0, 0]),
        ([0, 0, 0, 0], "magnitude", [0, 0, 0]),
        ([7, -8], "magnitude", [-8, 7]),
    ],
)
def test_repeated_and_zero_eigenvalues_of_small_matrices_are_found(values, which, expected):
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    found = top_eigenvalues(quadratic(basis * torch.tensor(values) @ basis.T), 3, which=which, tolerance=1e-9)
    assert found.converged
    assert_close(found.values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_close(found.vectors @ found.vectors.T, torch.eye(len(expected), dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_large_spectrum_in_float32():
    values = torch.linspace(-1, 1, 400) ** 3 * 10
    basis = torch.linalg.qr(torch.randn(400, 400)).Q
    found = top_eigenvalues(quadratic(basis * values @ basis.T), 2, tolerance=1e-3, max_products=200)
    assert found.converged
    assert_close(found.values.abs(), torch.tensor([10.0, 10.0]), rtol=1e-4, atol=0)
    assert found.num_products < 200


# --- trace ------------------------------------------------------------------------------------------------------------


def test_the_standard_basis_as_probes_gives_the_trace(known):
    _, hessian, matrix = known
    probes = torch.eye(len(matrix), dtype=torch.float64)
    assert matrix.trace().abs() > 1e-2
    assert trace(hessian, probes=probes).value == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-10)
    # as does any orthogonal basis, of whatever length
    turned = 3 * torch.linalg.qr(torch.randn_like(probes)).Q
    found = trace(quadratic(matrix), probes=turned)
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("sketch_size", [0, 10])
def test_random_probes_are_within_three_standard_errors(known, sketch_size):
    _, hessian, matrix = known
    found = trace(hessian, 50, sketch_size=sketch_size, seed=1)
    assert found.num_products == 50 + 2 * sketch_size
    assert 0 < found.standard_error < 0.2 * matrix.abs().sum()
    assert abs(found.value - float(matrix.trace())) < 3 * found.standard_error
    few = [trace(hessian, 5, sketch_size=sketch_size, seed=seed) for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


@pytest.mark.parametrize("sketch_size", [0, 3])
def test_the_standard_error_is_the_spread_of_estimates(sketch_size):
    matrix = torch.randn(20, 20, dtype=torch.float64)
    hessian = quadratic(matrix + matrix.T)
    found = [trace(hessian, 16, sketch_size=sketch_size, seed=seed) for seed in range(200)]
    errors = [one.value - 2 * float(matrix.trace()) for one in found]
    scores = torch.tensor([error / one.standard_error for error, one in zip(errors, found, strict=True)])
    assert scores.mean().abs() < 0.3
    assert 0.85 < scores.std() < 1.35


def test_a_sketch_of_the_rank_leaves_nothing_to_chance():
    a, b = torch.randn(2, 50, dtype=torch.float64)
    matrix = torch.outer(a, a) - 3 * torch.outer(b, b)
    found = trace(quadratic(matrix), 2, sketch_size=2)
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert found.standard_error < 1e-9
    assert trace(quadratic(matrix), 2).standard_error > 1


# --- of a model -------------------------------------------------------------------------------------------------------


def test_the_curvature_of_a_model_is_that_of_its_parts(known):
    torch.manual_seed(0)
    part, hessian, matrix = known
    found = curvature(double_model(), images(), [part], num_eigenvalues=2, num_probes=50, tolerance=1e-7, seed=SEED)
    assert list(found) == [part]
    one = found[part]
    assert one.num_variables == len(matrix)
    assert one.loss == pytest.approx(float(hessian.loss), rel=1e-12)
    assert one.gradient_norm == pytest.approx(float(hessian.gradient.norm()), rel=1e-9)
    values = torch.linalg.eigvalsh(matrix)
    expected = values[values.abs().argsort(descending=True)][:2]
    assert_close(one.eigenpairs.values, expected, rtol=1e-6, atol=0)
    assert abs(one.trace.value - float(matrix.trace())) < 3 * one.trace.standard_error


def test_model_and_random_numbers_are_left_as_they_were():
    model, batch = double_model(), images()
    model.head.eval()
    model.bpgcn.backbone.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    pixels, state = batch["pixel_values"].clone(), torch.get_rng_state()
    found = curvature(model, batch, num_eigenvalues=1, num_probes=2)
    assert found["last_blocks"].gradient_norm > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch["pixel_values"], pixels)
    assert model.training
    assert not model.head.training
    assert model.bpgcn.backbone.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    assert torch.backends.cuda.flash_sdp_enabled()
    assert model.bpgcn.backbone.config._attn_implementation == "sdpa"


def test_the_seed_says_which_labels_are_revealed():
    model, batch = double_model(), images()
    losses = [float(Hessian(*objective_of(model, batch, "head", seed=s)).loss) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_last_blocks_are_those_that_trainable_blocks_trains(kind, num_blocks):
    model = double_model(backbone_config=tiny_backbone(kind))
    _, tensors = objective_of(model, images(), "last_blocks", num_blocks)
    train_last_blocks(model.bpgcn.backbone, num_blocks)
    trained = [p for p in model.bpgcn.backbone.parameters() if p.requires_grad]
    model.bpgcn.freeze_unused()
    trained = [p for p in trained if p.requires_grad]
    assert len(tensors) == len(trained) > 10
    assert all(torch.equal(a, b) for a, b in zip(tensors, trained, strict=True))


def test_features_will_do_where_no_image_is_asked_for():
    model, batch = double_model(), images()
    with torch.no_grad(), fixed_objective(model, 0):
        features = model.get_image_features(batch["pixel_values"])
    given = {"features": features, "labels": LABELS, "node_ids": batch["node_ids"]}
    options = {"num_eigenvalues": 1, "num_probes": 2}
    found, expected = (curvature(model, b, ["head", "features"], **options) for b in (given, batch))
    for part, one in found.items():
        assert_close(one.eigenpairs.values, expected[part].eigenpairs.values)
    assert features.requires_grad is False
    with pytest.raises(ValueError, match="last_blocks needs pixel_values"):
        curvature(model, given, ["last_blocks"])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    model, batch = double_model(), images()
    with pytest.raises(ValueError, match="of='tail' is unknown: choose from head, features, last_blocks"):
        curvature(model, batch, ["tail"])
    with pytest.raises(ValueError, match="needs labels of 0 or more: the batch has none"):
        curvature(model, batch | {"labels": torch.full_like(LABELS, -100)})
    with pytest.raises(ValueError, match="num_blocks=3 must be 1 to 2"):
        curvature(model, batch, ["last_blocks"], num_blocks=3)
    with pytest.raises(ValueError, match="in half precision: pass at least one"):
        curvature(model.bfloat16(), batch, ["head"])
    model.bpgcn.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' has no second derivative: load the model with 'sdpa'"):
        curvature(model, batch, ["head"])
    with pytest.raises(ValueError, match="head='label_propagation' has no parameters"):
        curvature(double_model(head="label_propagation"), batch, ["head"])


def test_bad_closures_and_vectors_are_named():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"must return a scalar that depends on the tensors; it is \(3,\)"):
        Hessian(lambda: x**2, [x])
    with pytest.raises(ValueError, match="with requires_grad=False"):
        Hessian(lambda: torch.ones(()), [x])
    for wrong in ([], [torch.ones(3)], [x.half().detach().requires_grad_()]):
        with pytest.raises(ValueError, match="ask for no gradient or are in half precision"):
            Hessian(lambda: (x**2).sum(), wrong)
    hessian = Hessian(lambda: (x**2).sum(), [x])
    with pytest.raises(ValueError, match="which='smallest' is unknown: choose magnitude or algebraic"):
        top_eigenvalues(hessian, which="smallest")
    for k, most in ((0, 10), (3, 2)):
        with pytest.raises(ValueError, match=f"k={k} must be 1 or more, and max_products={most}"):
            top_eigenvalues(hessian, k, max_products=most)
    for probes in (torch.ones(1, 3), torch.ones(4, 2)):
        with pytest.raises(ValueError, match="must be two or more vectors of 3 entries"):
            trace(hessian, probes=probes)
    assert math.isclose(trace(hessian, 2).value, 6)
