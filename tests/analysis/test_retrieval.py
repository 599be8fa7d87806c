"""mAP and recall@k of queries against the support bank, held to a plain loop and to scikit-learn."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from modeling_bpgcn.analysis.retrieval import evaluate_retrieval
from modeling_bpgcn.ranking import similarity
from tests.model_factory import CLASSES, tiny_model

M, Q = 30, 12
CLASSES_OF = torch.where(torch.arange(M) % 5 == 4, -100, torch.arange(M) % CLASSES)
WANTED = torch.where(torch.arange(Q) == 3, -100, torch.arange(Q) % CLASSES)


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_metrics_are_those_of_a_plain_loop(metric, by_id):
    model, query = tiny_model(ranking_metric=metric), torch.randn(Q, 8)
    support = torch.cat([query[:6], torch.randn(M - 6, 8)])
    model.set_support_bank(support, CLASSES_OF)
    names = torch.arange(Q) if by_id else None
    found = evaluate_retrieval(model, query, WANTED, names, recall_at=(1, 4))
    precision, hits = [], {1: [], 4: []}
    for q in range(Q):
        if WANTED[q] < 0:
            continue
        kept = [i for i in range(M) if CLASSES_OF[i] >= 0 and not (by_id and i == q)]
        scores = similarity(query[q : q + 1], support, metric)[0, kept]
        relevant = CLASSES_OF[kept] == WANTED[q]
        precision.append(average_precision_score(relevant.numpy(), scores.numpy()))
        order = scores.argsort(descending=True)
        for k in hits:
            hits[k].append(float(relevant[order[:k]].any()))
    assert found["queries"] == Q - 1
    assert found["map"] == pytest.approx(sum(precision) / len(precision), abs=1e-5)
    for k, hit in hits.items():
        assert found[f"recall@{k}"] == pytest.approx(sum(hit) / len(hit))
    assert 0.2 < found["map"] < 0.95


def test_what_cannot_be_evaluated_is_named():
    model, query = tiny_model(), torch.randn(4, 8)
    classes = torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="The support bank is empty"):
        evaluate_retrieval(model, query, classes)
    model.set_support_bank(torch.randn(5, 8), torch.ones(5, dtype=torch.long))
    assert evaluate_retrieval(model, query, classes)["queries"] == 1  # the others have no image of their class
    with pytest.raises(ValueError, match="No query of known class has an image of its class"):
        evaluate_retrieval(model, query[:1], classes[:1])
    with pytest.raises(ValueError, match=r"features \(4, 8\) and classes \(3,\)"):
        evaluate_retrieval(model, query, classes[:3])
    with pytest.raises(ValueError, match="each k must be at least 1"):
        evaluate_retrieval(model, query, classes, recall_at=(0, 1))
