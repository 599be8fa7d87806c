"""Two views of an unlabelled image: which tokens stay, the divergence of the answers, and training with it."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn.training.random_state import seeded
from modeling_bpgcn.training.view_consistency import second_view, view_loss
from tests.model_factory import tiny_model
from tests.training_factory import arguments, digit_trainer, logged, parameters, tiny_digit_model

N, T = 10, 9
LABELS = torch.tensor([0, -100, 1, 2, -100, -100, 0, 1, 2, -100])
CACHED = {"trainable_blocks": 1, "augmentation": "none"}
ON = {"view_loss_weight": 1.0, "view_token_dropout": 0.5}


def tokens() -> dict[str, Tensor]:
    """Rows whose tokens name row and place."""
    states = 100 * torch.arange(N)[:, None, None] + torch.arange(T)[:, None] + torch.zeros(N, T, 3)
    return {"hidden_states": states, "labels": LABELS, "node_ids": torch.arange(N) + 7}


@pytest.mark.parametrize(("share", "kept"), [(0.5, 3), (0.25, 5), (0.99, 1)])
def test_a_second_view_has_the_special_tokens_and_some_patches_of_unlabelled_rows(share, kept):
    torch.manual_seed(0)
    views = second_view(tokens(), share, 2)
    unlabeled = [1, 4, 5, 9]
    assert views["node_ids"].tolist() == [row + 7 for row in unlabeled]
    assert views["labels"].tolist() == [-100] * 4
    assert views["hidden_states"].shape == (4, 2 + kept, 3)
    for row, states in zip(unlabeled, views["hidden_states"], strict=True):
        places = (states - 100 * row)[:, 0].tolist()
        assert places[:2] == [0, 1]
        assert places[2:] == sorted(set(places[2:]))
        assert all(2 <= place < T for place in places[2:])
    if share == 0.5:
        others = second_view(tokens(), share, 2)
        assert not torch.equal(others["hidden_states"], views["hidden_states"])


def loss_of(model, features: Tensor, seconds: Tensor, labels: Tensor = LABELS) -> Tensor:
    nodes = {"features": features, "labels": labels, "node_ids": torch.arange(N)}
    batch = {"hidden_states": torch.zeros(N, T, 3), "labels": labels, "node_ids": torch.arange(N)}
    noise = seeded((1,), torch.device("cpu"))
    return view_loss(model, batch, nodes, lambda views: seconds, noise, 0.5, model.config)


@pytest.mark.parametrize("symmetrization", ["none", "mean"])
def test_the_loss_is_the_divergence_of_the_answers_that_a_bank_of_the_first_views_gives(symmetrization):
    torch.manual_seed(0)
    model = tiny_model(graph_symmetrization=symmetrization).double()
    first = torch.randn(N, 8, dtype=torch.float64)
    unlabeled = (LABELS < 0).nonzero()[:, 0]
    second = (first[unlabeled] + 0.3 * torch.randn(4, 8, dtype=torch.float64)).requires_grad_()
    loss = loss_of(model, first, second)
    model.set_support_bank(first, LABELS)
    model.bpgcn.support_bank.double()
    q = model(features=second, node_ids=unlabeled, support="bank").logits  # without its own first view
    p = model(features=first, node_ids=torch.arange(N), support="batch", support_classes=LABELS).logits[unlabeled]
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert expected > 1e-3
    assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value, second, retain_graph=True)[0] for value in (loss, expected)]
    assert gradients[1].abs().max() > 1e-4
    assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_the_answer_to_the_first_view_is_a_target_without_gradient():
    torch.manual_seed(0)
    model = tiny_model().double()
    first = torch.randn(N, 8, dtype=torch.float64)
    second = first[LABELS < 0].clone()
    moved = first.clone().requires_grad_()
    loss = loss_of(model, moved, second)
    [gradient] = torch.autograd.grad(loss, moved)
    # an unlabelled node that is nobody's neighbour moves the target alone
    with torch.no_grad():
        read = model(features=first, node_ids=torch.arange(N), support="batch").neighbor_indices
    alone = [i for i in range(N) if LABELS[i] < 0 and i not in read.flatten().tolist()]
    assert gradient.abs().max() > 0
    assert all((gradient[i] == 0).all() for i in alone)


def test_without_an_unlabelled_row_nothing_is_asked():
    model, seconds = tiny_model(), torch.randn(1, 8, requires_grad=True)
    loss = loss_of(model, torch.randn(N, 8), seconds, LABELS.clamp_min(0))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, seconds)[0] == 0).all()


# --- training ---------------------------------------------------------------------------------------------------------


def run(folder, **options):
    """Two steps from a prefix cache."""
    trainer = digit_trainer(
        folder / "run", tiny_digit_model(), prefix_cache=str(folder / "cache"), max_steps=2, **CACHED, **options
    )
    trainer.train()
    return trainer


def test_training_adds_the_weighted_loss_and_draws_as_without_it(tmp_path):
    plain, viewed, strong = run(tmp_path), run(tmp_path, **ON), run(tmp_path, **(ON | {"view_loss_weight": 10.0}))
    [loss, view] = [logged(viewed, name)[0] for name in ("loss", "view_loss")]
    assert view > 1e-3
    assert loss == pytest.approx(logged(plain, "loss")[0] + view, rel=1e-5)
    assert logged(strong, "loss")[0] == pytest.approx(logged(plain, "loss")[0] + 10 * view, rel=1e-5)
    before, after = parameters(plain.model), parameters(viewed.model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".backbone." in name for name in changed)


def test_batches_without_unlabelled_rows_train(tmp_path):
    options = {"prefix_cache": str(tmp_path / "cache"), "labeled_batch_fraction": 1.0, "max_steps": 1, **CACHED, **ON}
    trainer = digit_trainer(tmp_path / "run", tiny_digit_model(), **options)
    trainer.train()
    assert logged(trainer, "view_loss") == [0.0]


def test_images_have_no_tokens_to_drop(tmp_path):
    with pytest.raises(ValueError, match="view_loss_weight needs the tokens of a prefix cache: set prefix_cache"):
        digit_trainer(tmp_path, **ON).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view_loss_weight": -1.0}, "view_loss_weight=-1.0 must be a number of 0 or more"),
        ({"view_loss_weight": float("inf")}, "view_loss_weight=inf must be a number of 0 or more"),
        ({"view_token_dropout": 0.0}, "view_token_dropout=0.0 must be above 0 and below 1"),
        ({"view_token_dropout": 1.0}, "view_token_dropout=1.0 must be above 0 and below 1"),
        (ON | {"gradient_cache_chunk_size": 4}, "view_loss_weight needs a batch that is embedded at once"),
        (ON | {"graph_scope": "full"}, "view_loss_weight needs a batch that is embedded at once"),
    ],
    ids=str,
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_a_mutual_graph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="view_loss_weight needs neighbours that are not mutual"):
        digit_trainer(tmp_path, tiny_digit_model(graph_symmetrization="mutual"), **ON)
