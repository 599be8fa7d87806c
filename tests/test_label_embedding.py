"""Classes as inputs of the head: what it computes, that no class asked for is read, and the bank that knows them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from modeling_bpgcn import BPGCNForImageClassification
from modeling_bpgcn.analysis.influence import removal_influence
from modeling_bpgcn.label_embedding import LabelInformedHead, classes_to_read, run_head
from modeling_bpgcn.objectives import known_classes
from tests.model_factory import CLASSES, only, tiny_model

N = 12
LABELS = torch.tensor([0, 1, 2, 0, 1, -100, 0, 2, 1, -100, 2, 0])
HEADS = ("gcn", "sgc", "appnp", "gat", "arma")


def informed(**overrides) -> BPGCNForImageClassification:
    """The head alone answers."""
    return tiny_model(label_embedding=True, propagation_mix=0.0, **overrides).double()


def feature_rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 8, dtype=torch.float64)


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_the_head_reads_the_feature_and_the_embedding_of_the_known_class(head):
    model, x = informed(head=head), feature_rows()
    graph = model._graph(model.bpgcn.rank(x))
    rows = model.head.embedding.weight.T  # [C, D]
    inputs = torch.stack([f + rows[c] if c >= 0 else f for f, c in zip(x, LABELS.tolist(), strict=True)])
    scores, states = run_head(model.head, x, graph, known=known_classes(LABELS, CLASSES, torch.float64))
    expected, expected_states = model.head.head(inputs, graph)
    assert_close(scores, expected)
    assert_close(states, expected_states)
    assert (scores - run_head(model.head, x, graph)[0]).abs().max() > 1e-3
    [gradient] = torch.autograd.grad(scores.square().sum(), model.head.embedding.weight)
    assert (gradient.abs().sum(0) > 0).all()


@pytest.mark.parametrize("head", [*HEADS, "linear", "label_propagation"])
def test_without_the_option_the_head_and_its_weights_are_as_ever(head):
    torch.manual_seed(0)
    model = tiny_model(head=head)
    built = model.head
    assert not isinstance(built, LabelInformedHead)
    assert not any("embedding.weight" in name for name in model.state_dict() if name.startswith("head."))
    x = feature_rows().float()
    graph = model._graph(model.bpgcn.rank(x))
    if built is None:
        assert run_head(None, x, graph) == (None, [])
    else:
        known = known_classes(LABELS, CLASSES, torch.float32)
        assert torch.equal(run_head(built, x, graph, known=known)[0], built(x, graph)[0])


def test_a_head_that_peft_wraps_reads_the_classes_too():
    model, x = tiny_model(label_embedding=True), feature_rows().float()
    plain = model(features=x, support="batch").logits
    shown = model(features=x, support="batch", support_classes=LABELS).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["head"])).get_base_model()
    assert not isinstance(adapted.head, LabelInformedHead)
    assert (shown - plain).abs().max() > 1e-3
    assert_close(adapted(features=x, support="batch", support_classes=LABELS).logits, shown)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_in_training_a_share_of_the_labels_is_read_and_the_loss_asks_for_the_others():
    torch.manual_seed(0)
    read = classes_to_read(LABELS, None, True, 0.5, 0)
    assert int((read >= 0).sum()) == 5
    assert (read[read >= 0] == LABELS[read >= 0]).all()
    context = classes_to_read(LABELS, None, True, 0.0, 6)
    assert torch.equal(context, torch.cat([torch.full((6,), -100), LABELS[6:]]))
    assert classes_to_read(LABELS, None, False, 0.5, 0) is None
    assert torch.equal(classes_to_read(LABELS, LABELS.flip(0), True, 0.5, 0), LABELS.flip(0))


def test_a_class_that_is_asked_for_is_no_input_of_any_answer():
    model, x = informed(**only("head_loss")).train(), feature_rows()

    def run(labels: Tensor):
        torch.manual_seed(7)
        return model(features=x, labels=labels, support="batch")

    torch.manual_seed(7)
    read = classes_to_read(LABELS, None, True, 0.5, 0)
    asked = ((LABELS >= 0) & (read < 0)).nonzero()[:, 0].tolist()
    first = run(LABELS)
    assert_close(first.loss, -first.logits[asked, LABELS[asked]].mean())
    for i in asked:
        changed = LABELS.clone()
        changed[i] = (changed[i] + 1) % CLASSES
        assert torch.equal(run(changed).logits, first.logits)
    shown = int((read >= 0).nonzero()[0])
    changed = LABELS.clone()
    changed[shown] = (changed[shown] + 1) % CLASSES
    assert (run(changed).logits - first.logits).abs().max() > 1e-3


def test_the_embedding_learns_and_the_ranking_with_it():
    model, x = informed(**only("head_loss")).train(), feature_rows().requires_grad_()
    output = model(features=x, labels=LABELS, support="batch", output_path_features=True)
    gradients = torch.autograd.grad(output.loss, (model.head.embedding.weight, output.path_features[0]))
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients)


def test_labels_are_not_read_outside_training_but_support_classes_are():
    model, x = informed(), feature_rows()
    plain = model(features=x, support="batch").logits
    assert torch.equal(model(features=x, labels=LABELS, support="batch").logits, plain)
    shown = model(features=x, support="batch", support_classes=LABELS).logits
    assert (shown - plain).abs().max() > 1e-3


# --- the bank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_query_at_the_bank_is_answered_as_in_a_directed_graph_with_the_support(head):
    model, x = informed(head=head), feature_rows()
    model.set_support_bank(x[1:], LABELS[1:])
    model.bpgcn.support_bank.double()
    answer = model(features=x[:1], support="bank").logits
    model.train()  # no dropout: the context shows its classes
    labels = torch.cat([torch.tensor([-100]), LABELS[1:]])
    whole = model(features=x, labels=labels, support="batch", num_context=N - 1, support_apart=True).logits
    assert_close(answer, whole[:1], rtol=1e-5, atol=1e-6)


def test_the_banks_classes_reach_the_answer_and_survive_saving(tmp_path):
    model, x = informed().float(), feature_rows().float()
    model.set_support_bank(x, LABELS)
    query = torch.randn(3, 8)
    answer = model(features=query).logits
    model.save_pretrained(tmp_path)
    loaded = BPGCNForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(features=query).logits, answer)
    model.relabel_support(list(range(N)), (LABELS.clamp_min(0) + 1) % CLASSES)
    assert (model(features=query).logits - answer).abs().max() > 1e-3


def test_removal_counts_what_the_head_loses_with_a_class():
    model, x = informed().float(), feature_rows().float()
    model.set_support_bank(x, torch.full((N,), -100))
    query = torch.randn(2, 8)
    without = removal_influence(model, features=query)
    model.set_support_bank(x, LABELS)
    assert (removal_influence(model, features=query) - without).abs().max() > 1e-3
