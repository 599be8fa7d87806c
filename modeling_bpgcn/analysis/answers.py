"""The ways to answer from features [N, D] of all images: log-probabilities [N, C] by the names of the evidence report.

Answers named `inductive` come from a support bank of the rows `split.graph`, the others from one graph of all images.
"""

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ..graph import RankingGraph
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.baselines import logistic_answers, train_head
from .protocol import UNKNOWN, Split

WEIGHTS = ("uniform", "softmax")
IMAGE_ANSWERS = {"knn", "logistic", "linear"}  # of each image by itself: the same for images in and out of the graph
HEAD_STEPS = 100
NUM_NEIGHBORS = 5
FIXED_GRAPH_NAMES = {"head": "gcn", "propagation": "lp", "transductive": "mix"}
FIXED_GRAPH_NAMES |= {"inductive_head": "inductive_gcn", "inductive_propagation": "inductive_lp"}
FIXED_GRAPH_NAMES["inductive"] = "inductive_mix"


@torch.no_grad()
def graph_answers(model: BPGCNForImageClassification, features: Tensor, split: Split) -> dict[str, Tensor]:
    """The model's own answers, those of its head alone, and propagated labels alone."""
    model.eval()
    ids = torch.arange(len(features))
    model.set_support_bank(features[split.graph], split.visible[split.graph], ids[split.graph])
    share, answers = model.label_propagation.share, {}
    for name, model.label_propagation.share in (("", share), ("head", 0.0), ("propagation", 1.0)):
        transductive = model(features=features, node_ids=ids, support="batch", support_classes=split.visible)
        answers[name or "transductive"] = transductive.logits
        inductive = model(features=features, node_ids=ids, support="bank")
        answers[f"inductive_{name}" if name else "inductive"] = inductive.logits
    model.label_propagation.share = share
    return answers


def fixed_graph_answers(
    models: dict[str, BPGCNForImageClassification], features: Tensor, split: Split, learning_rate: float
) -> dict[str, Tensor]:
    """A fresh head, label propagation and their mix, on the graph of features that no longer train.

    Args:
        models: a fresh model for each of `WEIGHTS`, whose head is trained here.
    """
    answers = {}
    for weights, model in models.items():
        nodes, visible = features[split.graph], split.visible[split.graph]
        with torch.no_grad():
            ranking = model.bpgcn.rank(nodes, split.graph)
        config = model.config
        graph = RankingGraph.from_ranking(
            ranking,
            symmetrization=config.graph_symmetrization,
            normalization=config.graph_normalization,
            self_weight=config.self_weight,
            self_loop=config.graph_self_loop,
        )
        train_head(model.head, nodes, graph, visible, learning_rate, HEAD_STEPS)
        suffix = "_uniform" if weights == "uniform" else ""
        own = graph_answers(model, features, split)
        answers |= {f"{new}{suffix}": own[name] for name, new in FIXED_GRAPH_NAMES.items()}
    return answers


def frozen_answers(features: Tensor, split: Split) -> dict[str, Tensor]:
    """Logistic regression, and the 5 nearest labelled images by cosine, the nearer ones counting more."""
    labeled = (split.visible != UNKNOWN).nonzero()[:, 0]
    known = split.visible[labeled]
    nearest = KNeighborsClassifier(min(NUM_NEIGHBORS, len(labeled)), weights="distance", metric="cosine")
    nearest.fit(features[labeled].numpy(), known.numpy())
    shares = torch.zeros(len(features), int(known.max()) + 1)
    shares[:, nearest.classes_] = torch.from_numpy(nearest.predict_proba(features.numpy())).float()
    return {
        "knn": (shares + 1e-4).log().log_softmax(-1),
        "logistic": logistic_answers(features[labeled], known, features),
    }
