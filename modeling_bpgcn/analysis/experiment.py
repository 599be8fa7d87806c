"""One cell of the evidence benchmark: train an arm on one split and score its answers. No test class comes near it."""

import dataclasses
import math
import resource
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..configuration_bpgcn import BPGCNConfig
from ..modeling_bpgcn import BPGCNForImageClassification
from ..training.arguments import BPGCNTrainingArguments
from ..training.callbacks import CurvesCallback
from ..training.freezing import train_last_blocks
from ..training.images import build_image_processor, image_transform
from ..training.metrics import classification_metrics
from ..training.prefix_cache import CachedPrefix, cache_prefix
from ..training.trainer import BPGCNTrainer
from .answers import IMAGE_ANSWERS, WEIGHTS, fixed_graph_answers, frozen_answers, graph_answers
from .arms import END_TO_END, NO_GRAPH, TWO_STAGE, ablate
from .evidence_cells import pack_bits, pack_floats
from .protocol import UNKNOWN, Split
from .ranking_metrics import edge_churn, hubness, ranking_quality

NUM_TRACED = 10  # points of the curves of a run
CHUNK = 256
# what every arm goes by, unless the settings of a cell say otherwise; chosen on labelled images alone
CONFIG = {"num_neighbors": 20, "graph_symmetrization": "mean"}
TRAINING = {
    "max_steps": 30,
    "per_device_train_batch_size": 256,
    "labeled_batch_fraction": 0.25,
    "learning_rate": 5e-4,
    "head_learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
    "trainable_blocks": 2,
    "bf16": True,
}


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set whose images the backbone's frozen blocks have read already."""

    states: CachedPrefix
    classes: np.ndarray  # [N], for scoring
    num_classes: int


def read_images(folder: str, backbone: str, image_size: int, trainable_blocks: int, cache: Path) -> Images:
    """The images of a folder with one sub-folder a class, up to the first block that trains.

    Raises:
        ValueError, OSError: as `prefix_cache.cache_prefix` and `datasets.load_dataset`.
    """
    rows = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    classes = np.array(rows["label"])
    rows = rows.add_column("node_id", range(len(rows)))
    model = BPGCNForImageClassification.from_backbone_pretrained(backbone, num_labels=int(classes.max()) + 1)
    train_last_blocks(model.bpgcn.backbone, trainable_blocks)
    patch_size = model.config.backbone_config.patch_size
    transform = image_transform(build_image_processor(backbone, image_size, patch_size))
    states = cache_prefix(model, rows.with_transform(transform), cache, batch_size=64)
    return Images(states, classes, int(classes.max()) + 1)


def run_cell(
    images: Images,
    backbone: str,
    split: Split,
    arm: str,
    seed: int,
    settings: dict,
    trace: bool,
    features_file: Path | None = None,
) -> dict:
    """Train `arm` on the classes that `split` shows, answer, and score.

    Args:
        settings: fields of `BPGCNConfig` and of `BPGCNTrainingArguments` that differ from the defaults.
        trace: follow the ranking during training, too.
        features_file: keep the features [N, D] there, with the classes, for a picture.

    Returns:
        `answers` (metrics of each way to answer), `ranking` (its quality), `curve` (by step), `confusion` and `tested`
        (which images).
    """
    started = time.perf_counter()
    answers, features, curve = train_and_answer(images, backbone, split, arm, seed, settings, trace)
    if features_file is not None:
        features_file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(features_file, features=features.half().numpy(), classes=images.classes)
    main = answers["transductive" if arm in END_TO_END else "mix"][split.scored].argmax(-1).numpy()
    counts = np.bincount(images.classes[split.scored] * images.num_classes + main, minlength=images.num_classes**2)
    return {
        "answers": _score(answers, images.classes, split),
        "ranking": {"after": _rank_scores(features, images.classes, split)},
        "curve": curve,
        "confusion": counts.reshape(images.num_classes, -1).tolist(),
        "tested": {"transductive": _mask(split.scored, features), "inductive": _mask(split.held_out, features)},
        "seconds": time.perf_counter() - started,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def train_and_answer(
    images: Images, backbone: str, split: Split, arm: str, seed: int, settings: dict, trace: bool = False
) -> tuple[dict[str, Tensor], Tensor, list[dict]]:
    """Answers [N, C] by name, features [N, D] of all images, and the curve; arguments as in `run_cell`."""
    set_seed(seed)
    fields = {f.name for f in dataclasses.fields(BPGCNConfig)}
    config = CONFIG | {"num_labels": images.num_classes} | {n: v for n, v in settings.items() if n in fields}
    training = TRAINING | {n: v for n, v in settings.items() if n not in fields}
    watched, curve = split if trace else None, []
    if arm in END_TO_END:
        model = ablate(_build(backbone, images, training, config), arm)
        curve = _train(model, images, split.visible, split.graph, seed, training, watched)
    else:
        model = _build(backbone, images, training, config | NO_GRAPH | (TWO_STAGE[arm] or {}))
        if arm != "frozen":
            labeled = split.graph[split.visible[split.graph] != UNKNOWN]
            alone = {"per_device_train_batch_size": min(training["per_device_train_batch_size"], len(labeled))}
            alone |= {"labeled_batch_fraction": None, "graph_scope": "batch"}
            alone |= {"support_fraction": 0.0, "view_loss_weight": 0.0}
            curve = _train(model, images, split.visible, labeled, seed, training | alone, watched)
    features = embed(model, images.states, training["bf16"])
    if arm in END_TO_END:
        answers = graph_answers(model, features, split)
    else:
        fresh = {weights: _fresh_model(backbone, images, training, config, weights, seed) for weights in WEIGHTS}
        answers = fixed_graph_answers(fresh, features, split, training["head_learning_rate"])
    if arm == "ce":
        with torch.no_grad():
            answers["linear"] = model.eval()(features=features, support="batch").logits
    elif arm == "frozen":
        answers |= frozen_answers(features, split)
    for name in IMAGE_ANSWERS & answers.keys():
        answers[f"inductive_{name}"] = answers[name]
    return answers, features, curve


def _build(backbone: str, images: Images, training: dict, config: dict) -> BPGCNForImageClassification:
    config = config | {"learn_temperature": training.get("temperature_schedule") == "learned"}
    model = BPGCNForImageClassification.from_backbone_pretrained(backbone, **config)
    model.bpgcn.prefix_blocks = model.config.backbone_config.num_hidden_layers - training["trainable_blocks"]
    return model


def _fresh_model(backbone: str, images: Images, training: dict, config: dict, weights: str, seed: int):
    set_seed(seed)
    model = _build(backbone, images, training, config)
    return ablate(model, "uniform") if weights == "uniform" else model


def _mask(rows: Tensor, features: Tensor) -> str:
    return pack_bits(torch.zeros(len(features), dtype=torch.bool).index_fill(0, rows, True))


def _train(
    model, images: Images, visible: Tensor, rows: Tensor, seed: int, training: dict, watched: Split | None
) -> list[dict]:
    """Train on some rows of the data set, whose classes are the visible ones: its own are not even passed on."""
    ids = list(range(len(images.states)))
    dataset = Subset(CachedPrefix(images.states.path, visible.tolist(), ids), rows.tolist())
    with tempfile.TemporaryDirectory(prefix="bpgcn-evidence-") as folder:
        args = BPGCNTrainingArguments(
            output_dir=folder,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            use_cpu=not torch.cuda.is_available(),
            **training,
        )
        trainer = BPGCNTrainer(model, args, train_dataset=dataset, train_classes=visible[rows].tolist())
        for callback in (PrinterCallback, CurvesCallback):
            trainer.remove_callback(callback)
        trace = None
        if watched is not None:
            trace = RankingTrace(images, watched, max(1, args.max_steps // NUM_TRACED), args.bf16)
            trainer.add_callback(trace)
        trainer.train()
    return _curve(trainer.state.log_history, trace)


class RankingTrace(TrainerCallback):
    """The quality of the ranking every few steps; it reads classes of test images, and training never reads it."""

    def __init__(self, images: Images, split: Split, every: int, bf16: bool):
        self.images, self.split, self.every, self.bf16 = images, split, every, bf16
        self.points: dict[int, dict] = {}
        self._edges: Tensor | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._measure(model, state.global_step)

    @torch.random.fork_rng(devices=[])
    def _measure(self, model, step: int) -> None:
        training = model.training
        features = embed(model, self.images.states, self.bf16)
        model.train(training)
        scores = _rank_scores(features, self.images.classes, self.split)
        edges = _nearest(features, model.config.num_neighbors)
        churn = 0.0 if self._edges is None else edge_churn(self._edges, edges)
        self._edges = edges
        self.points[step] = {n: scores[n] for n in ("homophily", "map", "hubness")} | {"edge_churn": churn}


def _curve(history: list[dict], trace: RankingTrace | None) -> list[dict]:
    points = {} if trace is None else {step: {"step": step, **values} for step, values in trace.points.items()}
    for entry in history:
        if "loss" in entry:
            ranking, feature = (entry.get(f"{path}_gradient_norm", 0.0) for path in ("ranking", "feature"))
            point = points.setdefault(entry["step"], {"step": entry["step"]})
            point |= {n: entry[n] for n in ("loss", "effective_neighbors") if n in entry}
            if ranking + feature > 0:
                point["ranking_gradient_share"] = ranking / (ranking + feature)
    return [points[step] for step in sorted(points)]


@torch.no_grad()
def embed(model: BPGCNForImageClassification, states: CachedPrefix, bf16: bool) -> Tensor:
    """Features [N, D] of all images, in evaluation mode."""
    model.eval()
    parts = []
    for start in range(0, len(states), CHUNK):
        rows = states.__getitems__(list(range(start, min(start + CHUNK, len(states)))))
        hidden = torch.stack([row["hidden_states"] for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            parts.append(model(hidden_states=hidden, support="none").features.float())
    return torch.cat(parts)


def _nearest(features: Tensor, num_neighbors: int) -> Tensor:
    normed = F.normalize(features, dim=-1)
    return (normed @ normed.T).fill_diagonal_(-2.0).topk(num_neighbors).indices


def _rank_scores(features: Tensor, classes: np.ndarray, split: Split) -> dict:
    truth = torch.from_numpy(classes)
    scores = ranking_quality(features, truth, split.scored, split.known)
    labeled = (split.visible != UNKNOWN).nonzero()[:, 0]
    to_labeled = ranking_quality(features, truth, split.scored, labeled)
    return {
        "map": float(scores["average_precision"].mean()),
        "homophily": float(scores["homophily"].mean()),
        "recall": float(scores["recall"].mean()),
        "map_labeled": float(to_labeled["average_precision"].mean()),
        "homophily_labeled": float(to_labeled["homophily"].mean()),
        "hubness": float(hubness(_nearest(features, 10), len(features))),
        "map_per_image": pack_floats(scores["average_precision"]),
        "homophily_per_image": pack_floats(scores["homophily"]),
    }


def _score(answers: dict[str, Tensor], classes: np.ndarray, split: Split) -> dict[str, dict]:
    scored = {}
    for name, logits in answers.items():
        rows = split.held_out if name.startswith("inductive") else split.scored
        own, truth = logits[rows], torch.from_numpy(classes)[rows]
        metrics = classification_metrics(own, truth)
        nll = float(F.nll_loss(own.clamp_min(math.log(1e-6)), truth))
        scored[name] = metrics | {"nll": nll, "correct": pack_bits(own.argmax(-1) == truth)}
    return scored
