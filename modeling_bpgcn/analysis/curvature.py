"""Curvature of the objective: products with its Hessian by double backward, its largest eigenvalues, its trace.

The Hessian H [n, n] of a loss, for n numbers in one or more tensors, is never formed: what is here takes products H v,
each of which costs about two backward passes (Pearlmutter 1994, "Fast exact multiplication by the Hessian").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modeling_bpgcn import BPGCNForImageClassification
from .fixed_objective import PARTS, objective_of


class Hessian:
    """The Hessian of `loss_fn()` for `tensors`, where they are now, as an operator on flat vectors: `hessian @ v`.

    The loss runs once; its graph and that of its gradient are held for all products.

    Args:
        loss_fn: returns a scalar, from operations that are differentiable twice.
        tensors: leaves that ask for a gradient, in float32 or float64; their entries in this order are the n rows.

    Raises:
        ValueError: for a loss that is no scalar or depends on none of the tensors, or tensors without gradient or in
            half precision.
    """

    def __init__(self, loss_fn: Callable[[], Tensor], tensors: Sequence[Tensor]):
        self.tensors = list(tensors)
        wrong = [t for t in self.tensors if not t.requires_grad or t.dtype not in (torch.float32, torch.float64)]
        if wrong or not self.tensors:
            raise ValueError(
                f"{len(wrong)} of {len(self.tensors)} tensors ask for no gradient or are in half precision: pass at"
                " least one, with requires_grad, of a model in float32 or float64 (model.float())."
            )
        with torch.enable_grad():
            loss = loss_fn()
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"loss_fn must return a scalar that depends on the tensors; it is {tuple(loss.shape)} with"
                f" requires_grad={loss.requires_grad}."
            )
        self.loss = loss.detach()
        self._gradients = torch.autograd.grad(loss, self.tensors, create_graph=True, materialize_grads=True)
        self.gradient = torch.cat([g.detach().flatten() for g in self._gradients])

    @property
    def size(self) -> int:
        """n, the number of rows."""
        return self.gradient.numel()

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v in the shapes of the tensors, of v in the same shapes."""
        pairs = [(g, v) for g, v in zip(self._gradients, vectors, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear
            return [torch.zeros_like(t) for t in self.tensors]
        outputs, directions = zip(*pairs, strict=True)
        options = {"retain_graph": True, "materialize_grads": True}
        return list(torch.autograd.grad(outputs, self.tensors, directions, **options))

    def __matmul__(self, vector: Tensor) -> Tensor:
        """H v [n] of v [n]."""
        parts = vector.split([t.numel() for t in self.tensors])
        vectors = [part.view_as(t) for part, t in zip(parts, self.tensors, strict=True)]
        return torch.cat([part.flatten() for part in self.product(vectors)])


def hessian_vector_product(
    loss_fn: Callable[[], Tensor], tensors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian of `loss_fn()` for `tensors`, times `vectors` of the same shapes; for many products make one
    `Hessian`, whose arguments these are."""
    return Hessian(loss_fn, tensors).product(vectors)


@dataclass(frozen=True)
class Eigenpairs:
    """`values` [k], the one asked for first; `vectors` [k, n] of length 1; `residuals` [k], |H v - value v|, each an
    upper bound of its value's distance to an eigenvalue; `converged`: all residuals are within the tolerance;
    `num_products` with the Hessian."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    num_products: int


@torch.no_grad()
def top_eigenvalues(
    hessian: Hessian,
    k: int = 1,
    *,
    which: str = "magnitude",
    tolerance: float = 1e-4,
    max_products: int = 100,
    seed: int = 0,
) -> Eigenpairs:
    """The k outermost eigenvalues, by Lanczos with full reorthogonalisation (Golub and Van Loan, section 10.3).

    Args:
        k: how many; at most n come back.
        which: `magnitude`, the largest in absolute value, or `algebraic`, the largest.
        tolerance: of the residuals, relative to the largest absolute eigenvalue found. The error of a value is of the
            order of its residual squared where it stands apart from the others.
        max_products: steps at most, hence vectors [n] held; the k residuals take as many more products.
        seed: of the first vector. Of an eigenvalue that occurs several times in a large Hessian, copies may be missed.

    Raises:
        ValueError: for k below 1, fewer products than k, or another `which`.
    """
    if which not in ("magnitude", "algebraic"):
        raise ValueError(f"which={which!r} is unknown: choose magnitude or algebraic.")
    k, steps = min(k, hessian.size), min(max_products, hessian.size)
    if not 1 <= k <= steps:
        raise ValueError(f"k={k} must be 1 or more, and max_products={max_products} at least as many.")
    like = hessian.gradient
    generator = torch.Generator().manual_seed(seed)
    basis = like.new_empty(steps, hessian.size)  # [m, n]
    projected = torch.zeros(steps, steps, dtype=torch.float64)  # H in the basis
    vector, restarts = _fresh_direction(basis[:0], generator), 0
    for m in range(1, steps + 1):
        basis[m - 1] = vector
        product = hessian @ vector
        coefficients = basis[:m] @ product
        rest = product - coefficients @ basis[:m]
        again = basis[:m] @ rest  # once more: rounding left some of the basis in the rest
        rest = rest - again @ basis[:m]
        projected[m - 1, :m] = projected[:m, m - 1] = (coefficients + again).double().cpu()
        values, rotation = torch.linalg.eigh(projected[:m, :m])
        order = (values.abs() if which == "magnitude" else values).argsort(descending=True)[:k]
        scale, length = values.abs().max(), rest.norm().double().cpu()
        exhausted = length <= max(tolerance, 100 * torch.finfo(like.dtype).eps) * scale
        if exhausted:
            # H maps the basis into itself; what is left may hold further copies of the same eigenvalues
            if m >= k and restarts == k:
                break
            restarts += 1
            vector = _fresh_direction(basis[:m], generator) if m < steps else vector
        else:
            if m >= k and (length * rotation[-1, order].abs() <= tolerance * scale).all():
                break
            vector = rest / length.to(like)
    vectors = rotation[:, order].T.to(like) @ basis[:m]
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    products = torch.stack([hessian @ v for v in vectors])
    values = (vectors * products).sum(1)
    residuals = (products - values[:, None] * vectors).norm(dim=1)
    converged = bool((residuals <= tolerance * scale.to(like)).all())
    return Eigenpairs(values, vectors, residuals, converged, m + len(vectors))


def _fresh_direction(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector [n] orthogonal to the rows of an orthonormal basis [m, n], m < n."""
    vector = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
        vector = vector / vector.norm()
    return vector


@dataclass(frozen=True)
class TraceEstimate:
    """`value`, and its `standard_error` over the random probes; `num_products` with the Hessian."""

    value: float
    standard_error: float
    num_products: int


@torch.no_grad()
def trace(
    hessian: Hessian, num_probes: int = 32, *, sketch_size: int = 0, probes: Tensor | None = None, seed: int = 0
) -> TraceEstimate:
    """The trace of the Hessian: the mean of n v^T H v / |v|^2 over random v of signs (Hutchinson 1990).

    Args:
        num_probes: v to draw, 2 or more.
        sketch_size: with s > 0, Hutch++ (Meyer et al. 2021, algorithm 1): exact on the range of H times s random
            vectors, by probes on its complement, for 2 s more products. It pays where few eigenvalues dominate.
        probes: [m, n] to take instead of random ones; n orthogonal vectors give the trace exactly.
        seed: of the random vectors.

    Raises:
        ValueError: for fewer than two probes, or probes of another width.
    """
    like, generator = hessian.gradient, torch.Generator().manual_seed(seed)
    sketch_size = min(sketch_size, hessian.size)
    sketch = _random_signs(sketch_size, like, generator)
    probes = _random_signs(num_probes, like, generator) if probes is None else probes.to(like)
    if probes.ndim != 2 or len(probes) < 2 or probes.shape[1] != hessian.size:
        raise ValueError(
            f"probes {tuple(probes.shape)} must be two or more vectors of {hessian.size} entries, for a standard error."
        )
    weights = hessian.size / probes.square().sum(1)
    known = like.new_zeros(())
    if sketch_size:
        basis = torch.linalg.qr(torch.stack([hessian @ v for v in sketch], dim=1)).Q.T  # [s, n]
        known = sum(v @ (hessian @ v) for v in basis)
        probes = probes - (probes @ basis.T) @ basis
    estimates = weights * torch.stack([v @ (hessian @ v) for v in probes])
    error = estimates.std() / len(estimates) ** 0.5
    return TraceEstimate(float(known + estimates.mean()), float(error), 2 * sketch_size + len(probes))


def _random_signs(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, (count, like.numel()), generator=generator) - 1).to(like)


@dataclass(frozen=True)
class Curvature:
    """Of the objective as a function of `num_variables` numbers: value, norm of the gradient, and what H is like."""

    loss: float
    gradient_norm: float
    num_variables: int
    eigenpairs: Eigenpairs
    trace: TraceEstimate


def curvature(
    model: BPGCNForImageClassification,
    batch: dict[str, Tensor],
    of: Sequence[str] = PARTS,
    *,
    num_blocks: int = 1,
    num_eigenvalues: int = 5,
    which: str = "magnitude",
    tolerance: float = 1e-4,
    max_products: int = 100,
    num_probes: int = 32,
    sketch_size: int = 0,
    seed: int = 0,
) -> dict[str, Curvature]:
    """The curvature of the model's objective on the graph of a batch; the model stays as it is.

    The loss is that of training without dropout (and with the mean of `gumbel` in place of a draw); `seed` says which
    labels it reveals. Who is a neighbour and which units of a ReLU are on is taken as it is, as in any derivative.

    Args:
        batch: `pixel_values` or `features`, `labels` (-100 unknown), and `node_ids` if there are any.
        of: `head` (its parameters), `features` [N, D] that enter ranking and head, `last_blocks` (the parameters of the
            backbone from its last `num_blocks` blocks on, as `trainable_blocks` counts them).
        num_eigenvalues, which, tolerance, max_products: of `top_eigenvalues`.
        num_probes, sketch_size: of `trace`.

    Raises:
        ValueError: for an unknown part, one that the model or the batch does not have, a batch without labels, or an
            attention that cannot be differentiated twice.
    """
    found = {}
    for part in of:
        hessian = Hessian(*objective_of(model, batch, part, num_blocks, seed))
        found[part] = Curvature(
            float(hessian.loss),
            float(hessian.gradient.norm()),
            hessian.size,
            top_eigenvalues(
                hessian, num_eigenvalues, which=which, tolerance=tolerance, max_products=max_products, seed=seed
            ),
            trace(hessian, num_probes, sketch_size=sketch_size, seed=seed),
        )
    return found
