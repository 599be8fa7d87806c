"""Cells of the evidence benchmark without training: answers drawn by lot around known accuracies."""

import numpy as np

from modeling_bpgcn.analysis.evidence_cells import pack_bits, pack_floats

NUM_IMAGES, NUM_FOLDS, NUM_CLASSES = 400, 10, 5
ACCURACY = {
    "frozen": {"logistic": 0.70, "gcn_uniform": 0.74, "gcn": 0.74, "lp": 0.72, "mix": 0.75},
    "ce": {"linear": 0.72, "gcn": 0.75, "lp": 0.76, "mix": 0.77},
    "neighborhood": {"gcn": 0.80, "lp": 0.81, "mix": 0.82},
    "uniform": {"transductive": 0.79, "head": 0.78, "propagation": 0.77},
    "detached": {"transductive": 0.79, "head": 0.78, "propagation": 0.77},
    "full": {"transductive": 0.82, "head": 0.80, "propagation": 0.81},
    "ranking_only": {"transductive": 0.81, "head": 0.79, "propagation": 0.81},
    "random": {"transductive": 0.45, "head": 0.42, "propagation": 0.40},
}
HOMOPHILY = dict(zip(ACCURACY, (0.70, 0.74, 0.80, 0.76, 0.76, 0.81, 0.82, 0.71), strict=True))


def make_cell(arm, fold=0, seed=0, data="digits", budget="10%", noise=0.0, tested=True, **changes):
    """One cell; the same test images are hard for every arm, as they are in truth."""
    difficulty = np.random.default_rng((fold, 7)).random(NUM_IMAGES)
    masks = {
        "transductive": np.arange(NUM_IMAGES) % NUM_FOLDS != fold,
        "inductive": np.arange(NUM_IMAGES) % NUM_FOLDS == (fold + 1) % NUM_FOLDS,
    }
    random = np.random.default_rng((fold, seed, list(ACCURACY).index(arm)))
    labels = int(budget) if budget.isdecimal() else 16
    answers = {}
    for name, accuracy in ACCURACY[arm].items():
        level = accuracy - 0.3 / labels - noise / 4
        right = 0.7 * difficulty + 0.3 * random.random(NUM_IMAGES) < level
        inductive = "inductive" if name == "transductive" else f"inductive_{name}"
        for answer, mask in ((name, masks["transductive"]), (inductive, masks["inductive"])):
            answers[answer] = {
                "accuracy": float(right[mask].mean()),
                "macro_f1": float(right[mask].mean()) - 0.01,
                "nll": 0.8,
                "ece": 0.05,
                "correct": pack_bits(right[mask]),
            }
    num_tested = int(masks["transductive"].sum())
    shares = {
        name: np.clip(
            level + 0.2 * (difficulty[masks["transductive"]] - 0.5) + random.normal(0, 0.05, num_tested), 0, 1
        )
        for name, level in (("homophily", HOMOPHILY[arm]), ("map", HOMOPHILY[arm] - 0.2))
    }
    after = {name: float(values.mean()) for name, values in shares.items()}
    after |= {"homophily_labeled": 0.8, "map_labeled": 0.7, "recall": 0.97, "hubness": 1.5}
    after |= {f"{name}_per_image": pack_floats(values) for name, values in shares.items()}
    share = {"detached": 0.0, "uniform": 0.0, "ranking_only": 1.0}.get(arm, 0.6)
    curve = [
        {
            "step": step,
            "loss": 1 / (1 + step),
            "homophily": 0.7 + (HOMOPHILY[arm] - 0.7) * step / 30,
            "map": 0.5 + (HOMOPHILY[arm] - 0.7) * step / 30,
            "hubness": 2 - step / 60,
            "edge_churn": 0.3 / step if step else 0.0,
            "ranking_gradient_share": share * (1 - step / 100),
        }
        for step in range(0, 31, 3)
    ]
    cell = {
        "arm": arm,
        "data": data,
        "fold": fold,
        "seed": seed,
        "budget": budget,
        "noise": noise,
        "stage": "test",
        "settings": {},
        "seconds": 12.0,
        "rss_mib": 800.0,
        "answers": answers,
        "ranking": {"after": after},
        "curve": curve if arm != "frozen" else [],
        "confusion": (10 * np.eye(NUM_CLASSES, dtype=int) + 1).tolist(),
    }
    if tested:
        cell["tested"] = {name: pack_bits(mask) for name, mask in masks.items()}
    return cell | changes
