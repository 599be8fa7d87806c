"""What each arm goes without: which gradients are there, and which are gone."""

import pytest
import torch

from modeling_bpgcn.analysis.arms import END_TO_END, ablate
from tests.model_factory import tiny_model

N = 12
IDS = torch.arange(N)
LABELS = torch.tensor([0, 1, 2] * 3 + [-100] * 3)


def features_of(seed: int = 0, size: int = 8) -> torch.Tensor:
    return torch.randn(N, size, generator=torch.Generator().manual_seed(seed))


def gradients(arm: str, **config):
    """The gradient at the features, of the objective and of the head's loss alone."""
    torch.manual_seed(0)
    model = ablate(tiny_model(head_dropout=0.0, **config), arm).train()
    features = features_of(size=model.config.feature_size).requires_grad_()
    output = model(features=features, labels=LABELS, node_ids=IDS, output_path_features=True)
    paths = torch.autograd.grad(output.loss, output.path_features, allow_unused=True)
    return model, output, paths


def norms(paths):
    return [0.0 if gradient is None else float(gradient.norm()) for gradient in paths]


def test_full_has_gradient_on_both_paths():
    ranking, feature = norms(gradients("full")[2])
    assert ranking > 1e-4
    assert feature > 1e-4


@pytest.mark.parametrize("arm", ["detached", "uniform"])
def test_without_the_ranking_gradient_only_the_messages_carry_any(arm):
    ranking, feature = norms(gradients(arm)[2])
    assert ranking == 0.0
    assert feature > 1e-4


def test_ranking_only_has_no_gradient_through_the_messages():
    ranking, feature = norms(gradients("ranking_only")[2])
    assert ranking > 1e-4
    assert feature == 0.0


def test_detached_answers_as_full_does():
    detached, full = (gradients(arm)[1] for arm in ("detached", "full"))
    assert torch.equal(detached.neighbor_weights, full.neighbor_weights)
    assert torch.equal(detached.logits, full.logits)


def test_uniform_keeps_the_neighbors_and_levels_their_weights():
    uniform, full = (gradients(arm)[1] for arm in ("uniform", "full"))
    assert torch.equal(uniform.neighbor_indices, full.neighbor_indices)
    assert (uniform.neighbor_weights == 1 / full.neighbor_weights.shape[1]).all()
    assert full.neighbor_weights.std() > 1e-3


def test_random_draws_neighbors_but_never_the_image_itself():
    model, output, paths = gradients("random")
    assert norms(paths)[0] > 1e-4
    assert not (output.neighbor_indices == IDS[:, None]).any()
    with torch.no_grad():
        features = features_of(size=model.config.feature_size)
        draws = torch.stack([model.bpgcn.rank(features, IDS).indices.sort().values for _ in range(4)])
        assert (draws[0] != draws[1:]).any()
        weights = model.bpgcn.rank(features, IDS).weights
        torch.testing.assert_close(weights.sum(-1), torch.ones(N))
        # at a bank too, the image is not its own neighbour
        among = model.bpgcn.rank(features[:3], IDS[:3], features, IDS)
        assert not (among.indices == IDS[:3, None]).any()


def test_an_arm_in_two_stages_is_refused():
    with pytest.raises(ValueError, match=r"arm='ce' is not trained end to end: choose one of uniform, detached, full"):
        ablate(tiny_model(), "ce")


def test_every_arm_trains_the_backbone():
    for arm in END_TO_END:
        assert sum(norms(gradients(arm)[2])) > 1e-4, arm
