"""What a run is measured against: frozen features with a linear classifier, and with a graph that is ranked once."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers.utils import logging

from ..graph import RankingGraph
from ..heads import LabelPropagation
from ..objectives import known_classes
from .metrics import classification_metrics
from .run_folder import write_whole
from .trainer import BPGCNTrainer

FIXED_GRAPH_STEPS = 200
FINE_TUNED = "trained backbone, linear head"
# fields of the config that leave a classifier of single images
LINEAR = {
    "head": "linear",
    "propagation_mix": 0.0,
    "head_loss_weight": 1.0,
    "propagation_loss_weight": 0.0,
    "neighborhood_loss_weight": 0.0,
    "average_precision_loss_weight": 0.0,
    "label_embedding": False,
    "consistency_loss_weight": 0.0,
    "propagation_consistency_loss_weight": 0.0,
    "learn_temperature": False,
}


def measure_baselines(trainer: BPGCNTrainer, test_dataset, kinds: str, build_linear: Callable) -> list[dict]:
    """The baselines asked for (`none`, `frozen` or `all`), from `baselines.json` where a run that was killed has
    measured them already. `build_linear` makes the fresh model of `fine_tuned_linear`."""
    if kinds == "none":
        return []
    record = Path(trainer.args.output_dir) / "baselines.json"
    if record.is_file():
        results = json.loads(record.read_text())
        if kinds == "frozen" or any(row["method"] == FINE_TUNED for row in results):
            return results
    results = frozen_baselines(trainer, test_dataset)
    if kinds == "all":
        results += fine_tuned_linear(build_linear(), trainer, test_dataset)
    if trainer.is_world_process_zero():
        write_whole(record, json.dumps(results, indent=2))
    return results


def frozen_baselines(trainer: BPGCNTrainer, test_dataset) -> list[dict]:
    """Before training: a linear classifier, and head and label propagation on the fixed graph of all images.

    All see the features of the backbone as it is now, the same labels, and the same test images; the graph also holds
    the unlabelled and the test images as nodes. Rows of `method`, metrics and `baseline=True`.
    """
    support, classes, ids = trainer.embed(trainer.support_dataset, "Embedding the frozen support images")
    queries, labels, query_ids = trainer.embed(test_dataset, "Embedding the frozen test images")
    new = ~torch.isin(query_ids, ids)
    nodes = torch.cat([support, queries[new]])
    node_ids = torch.cat([ids, query_ids[new]])
    visible = torch.cat([classes, torch.full_like(query_ids[new], -100)])
    order = node_ids.argsort()
    rows = order[torch.searchsorted(node_ids[order], query_ids)]
    linear = classification_metrics(logistic_answers(support, classes, queries), labels)
    results = [{"method": "frozen features, linear", **linear}]
    answers = _fixed_graph(trainer, nodes, visible, node_ids)
    for method, logits in answers.items():
        metrics = classification_metrics(logits[rows], labels)
        results.append({"method": f"frozen features, fixed graph, {method}", **metrics})
    return [{**row, "baseline": True} for row in results]


def logistic_answers(support: Tensor, classes: Tensor, queries: Tensor) -> Tensor:
    """Log-probabilities [Q, C] of a logistic regression on standardised features [M, D] of known `classes` [M] (-100:
    left out); a class without an image gets -100."""
    known = classes >= 0
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(support[known].cpu().numpy(), classes[known].cpu().numpy())
    log_probabilities = torch.full((len(queries), int(classes.max()) + 1), -100.0)
    log_probabilities[:, classifier.classes_] = torch.from_numpy(
        classifier.predict_log_proba(queries.cpu().numpy())
    ).float()
    return log_probabilities


def _fixed_graph(trainer: BPGCNTrainer, nodes: Tensor, visible: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model, config = trainer.bpgcn, trainer.bpgcn.config
    options = {"symmetrization": config.graph_symmetrization, "normalization": config.graph_normalization}
    with torch.no_grad():
        ranking = model.bpgcn.rank(nodes, ids)
        ranking = ranking._replace(weights=ranking.weights.detach())
        label_graph = RankingGraph.from_ranking(ranking, **options, self_weight=0.0)
        known = known_classes(visible, config.num_labels, ranking.weights.dtype)
        z, _ = model.label_propagation(label_graph, known)
    answers = {}
    if model.head is not None:
        loop = {"self_weight": config.self_weight, "self_loop": config.graph_self_loop}
        graph = RankingGraph.from_ranking(ranking, **options, **loop)
        head, rate, progress = copy.deepcopy(model.head), trainer.args.head_learning_rate, not trainer.args.disable_tqdm
        answers[f"{config.head} head"] = train_head(head, nodes, graph, visible, rate, FIXED_GRAPH_STEPS, progress)
    answers["label propagation"] = LabelPropagation.log_probabilities(z)
    return answers


def train_head(
    head: torch.nn.Module,
    nodes: Tensor,
    graph: RankingGraph,
    visible: Tensor,
    learning_rate: float,
    num_steps: int,
    progress: bool = False,
) -> Tensor:
    """Train a head alone, on features [N, D] and a graph that stay as they are, with the classes `visible` [N] (-100
    unknown); its log-probabilities [N, C]."""
    # the random stream of the run must not depend on whether its baselines are measured
    with torch.random.fork_rng(devices=[nodes.device] if nodes.is_cuda else []), torch.enable_grad():
        head.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=5e-4)
        for _ in logging.tqdm(range(num_steps), desc="Fixed-graph baseline", disable=not progress):
            loss = torch.nn.functional.cross_entropy(head(nodes, graph)[0], visible, ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return torch.log_softmax(head.eval()(nodes, graph)[0], dim=-1)


def fine_tuned_linear(model, trainer: BPGCNTrainer, test_dataset) -> list[dict]:
    """The same backbone, steps and batch size with a linear head and cross-entropy on the labelled images alone.

    Args:
        model: a fresh model whose config has `head="linear"` and the head's loss alone.
        trainer: the run to compare with, whose arguments and data are used.
        test_dataset: the test images.
    """
    args = dataclasses.replace(
        trainer.args,
        output_dir=str(Path(trainer.args.output_dir) / "linear_baseline"),
        labeled_batch_fraction=1.0,
        class_balanced_batches=False,
        support_fraction=0.0,
        view_loss_weight=0.0,
        temperature_schedule="constant",
        final_temperature=None,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        transductive_evaluation=False,
        push_to_hub=False,
        report_to=[],
    )
    other = BPGCNTrainer(
        model,
        args,
        train_dataset=trainer.train_dataset,
        support_dataset=trainer.support_dataset,
        data_collator=trainer.data_collator,
    )
    other.train()
    metrics = other.evaluate(test_dataset, metric_key_prefix="test")
    names = ("accuracy", "macro_f1", "ece")
    row = {name: metrics[f"test_{name}"] for name in names}
    return [{"method": FINE_TUNED, "baseline": True, **row}]
