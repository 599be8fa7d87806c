"""Configuration of BPGCN: the choices a user can make, checked when they are made."""

import math

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

CHOICES = {
    "pooling": ("cls", "mean", "cls_mean"),
    "ranking_metric": ("cosine", "euclidean"),
    "ranking_relaxation": ("softmax", "straight_through", "lapsum", "threshold", "entmax", "sparsemax", "gumbel"),
    "ranking_normalization": ("all", "selected"),
    "graph_symmetrization": ("none", "mean", "mutual"),
    "graph_normalization": ("row", "symmetric", "none"),
    "graph_self_loop": ("share", "unit"),
    "head": ("gcn", "sgc", "appnp", "gat", "arma", "label_propagation", "linear"),
    "bank_dtype": ("float32", "float16"),
}
# name: (type, lowest, highest, whether the ends themselves are allowed)
RANGES = {
    "num_neighbors": (int, 1, math.inf, True),
    "ranking_temperature": (float, 0.0, math.inf, False),
    "self_weight": (float, 0.0, 1.0, True),
    "head_hidden_size": (int, 1, math.inf, True),
    "head_num_layers": (int, 1, math.inf, True),
    "head_dropout": (float, 0.0, 1.0, True),
    "head_num_attention_heads": (int, 1, math.inf, True),
    "head_num_stacks": (int, 1, math.inf, True),
    "head_propagation_steps": (int, 1, math.inf, True),
    "head_teleport": (float, 0.0, 1.0, True),
    "edge_dropout": (float, 0.0, 0.95, True),
    "head_loss_weight": (float, 0.0, math.inf, True),
    "propagation_loss_weight": (float, 0.0, math.inf, True),
    "neighborhood_loss_weight": (float, 0.0, math.inf, True),
    "average_precision_loss_weight": (float, 0.0, math.inf, True),
    "consistency_loss_weight": (float, 0.0, math.inf, True),
    "propagation_consistency_loss_weight": (float, 0.0, math.inf, True),
    "reveal_ratio": (float, 0.0, 1.0, False),
    "propagation_steps": (int, 0, math.inf, True),
    "propagation_alpha": (float, 0.0, 1.0, False),
    "propagation_mix": (float, 0.0, 1.0, True),
    "bank_size": (int, 0, math.inf, True),
}
LOSS_WEIGHTS = (
    "head_loss_weight",
    "propagation_loss_weight",
    "neighborhood_loss_weight",
    "average_precision_loss_weight",
    "consistency_loss_weight",
    "propagation_consistency_loss_weight",
)


class BPGCNConfig(PreTrainedConfig):
    r"""
    Configuration of [`BPGCNModel`] and [`BPGCNForImageClassification`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `Dinov2Config()`):
            Any vision backbone that `AutoModel` can build and that returns a token sequence.
        pooling (`str`, defaults to `"cls"`):
            Tokens to one feature per image: `cls`, `mean` (of the patch tokens) or `cls_mean` (both, concatenated).
        num_neighbors (`int`, defaults to 10): k, the neighbours of each image; fewer when there are fewer candidates.
        ranking_metric (`str`, defaults to `"cosine"`): `cosine` or `euclidean` (negative squared distance).
        ranking_temperature (`float`, defaults to 0.05): tau; on cosines the useful range is 0.02 to 0.1.
        learn_temperature (`bool`, defaults to `False`): make log tau a parameter.
        ranking_relaxation (`str`, defaults to `"softmax"`): how the top-k is made differentiable.
        ranking_normalization (`str`, defaults to `"selected"`):
            `all`: softmax over all candidates, of which k are kept; `selected`: softmax over the k kept.
        ranking_exclude_self (`bool`, defaults to `True`): an image is not a candidate for its own neighbours.
        graph_symmetrization (`str`, defaults to `"none"`): `none` (directed), `mean` (A + A^T) / 2, or `mutual`.
        graph_normalization (`str`, defaults to `"row"`): `row`, `symmetric` (by both degrees) or `none`.
        graph_self_loop (`str`, defaults to `"share"`):
            `share`: a node keeps `self_weight` of its state in each step; `unit`: A + I before normalisation.
        head (`str`, defaults to `"gcn"`): `gcn`, `sgc`, `appnp`, `gat`, `arma`, `label_propagation` or `linear`.
        self_weight (`float`, defaults to 0.5): share of a node's own state in each propagation step.
        head_hidden_size, head_num_layers, head_dropout (256, 2, 0.5): size of the head.
        head_num_attention_heads (`int`, defaults to 4): of the `gat` head.
        head_num_stacks (`int`, defaults to 2): parallel filters of the `arma` head.
        head_propagation_steps, head_teleport (10, 0.1): K and alpha of the `appnp` head.
        label_embedding (`bool`, defaults to `False`):
            the head reads a learned embedding of each class that is known, added to the feature. In training so many
            labelled images as `reveal_ratio` says show theirs, and the head's loss asks for the others' (masked label
            prediction, Shi et al. 2021); in answers the support images show theirs.
        edge_dropout (`float`, defaults to 0): share of the edges that each step of training goes without (DropEdge,
            Rong et al. 2020); the others of a row take over their weight.
        head_loss_weight, propagation_loss_weight, neighborhood_loss_weight, average_precision_loss_weight
            (0.1, 1, 0, 0): weights of the losses of labelled images, see `objectives.py`. The head's own is small: it
            is fitted within a few steps, and through the messages it would pull the backbone away from what the ranking
            asks for.
        consistency_loss_weight, propagation_consistency_loss_weight (0.1, 1):
            weights of the losses of unlabelled images, on the head's answers and on the propagated labels.
        reveal_ratio (`float`, defaults to 0.5): share of the labelled nodes whose class the masked propagation sees.
        propagation_steps, propagation_alpha (8, 0.9): steps and damping of the label propagation; 0 steps solves it.
        propagation_mix (`float`, defaults to 0.5):
            share of the propagated labels in the answer; 0 is the head alone, 1 pure label propagation.
        bank_size, bank_dtype (0, `"float32"`): the support bank's size and storage; written by the model.
        bank_fingerprint (`dict[str, str]`, *optional*):
            Digests of the backbone's configuration and weights (and of the image processor's settings) that made the
            support bank's features; written by the model, `None` without a bank.

    Raises:
        ValueError: for an unknown choice, a value out of range or two that contradict each other, naming the field.
    """

    model_type = "bpgcn"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")}
    keys_to_ignore_at_inference = ["features", "neighbor_weights", "path_features", "loss_parts"]

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: str = "cls"
    num_neighbors: int = 10
    ranking_metric: str = "cosine"
    ranking_temperature: float = 0.05
    learn_temperature: bool = False
    ranking_relaxation: str = "softmax"
    ranking_normalization: str = "selected"
    ranking_exclude_self: bool = True
    graph_symmetrization: str = "none"
    graph_normalization: str = "row"
    graph_self_loop: str = "share"
    head: str = "gcn"
    self_weight: float = 0.5
    head_hidden_size: int = 256
    head_num_layers: int = 2
    head_dropout: float = 0.5
    head_num_attention_heads: int = 4
    head_num_stacks: int = 2
    head_propagation_steps: int = 10
    head_teleport: float = 0.1
    label_embedding: bool = False
    edge_dropout: float = 0.0
    head_loss_weight: float = 0.1
    propagation_loss_weight: float = 1.0
    neighborhood_loss_weight: float = 0.0
    average_precision_loss_weight: float = 0.0
    consistency_loss_weight: float = 0.1
    propagation_consistency_loss_weight: float = 1.0
    reveal_ratio: float = 0.5
    propagation_steps: int = 8
    propagation_alpha: float = 0.9
    propagation_mix: float = 0.5
    bank_size: int = 0
    bank_dtype: str = "float32"
    bank_fingerprint: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def seed(cls, **overrides) -> "BPGCNConfig":
        """The letter of the note that started the project: self among the candidates, tau 1, k 10, softmax over all,
        a 2-layer GCN with symmetric normalisation and a unit self-loop, and the head's NLL alone."""
        letter = {
            "num_neighbors": 10,
            "ranking_temperature": 1.0,
            "ranking_normalization": "all",
            "ranking_exclude_self": False,
            "graph_normalization": "symmetric",
            "graph_self_loop": "unit",
            "head": "gcn",
            "head_num_layers": 2,
            "head_dropout": 0.0,
            "head_loss_weight": 1.0,
            "propagation_loss_weight": 0.0,
            "consistency_loss_weight": 0.0,
            "propagation_consistency_loss_weight": 0.0,
            "propagation_mix": 0.0,
        }
        return cls(**(letter | overrides))

    def check(self) -> None:
        """Raise a `ValueError` that names the field, its value and what is allowed."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.")
        for name, (kind, lowest, highest, closed) in RANGES.items():
            self._check_range(name, getattr(self, name), kind, lowest, highest, closed)
        for name in ("learn_temperature", "ranking_exclude_self", "label_embedding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        self._check_pairs()

    @staticmethod
    def _check_range(name, value, kind, lowest, highest, closed) -> None:
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        inside = number and (lowest <= value <= highest if closed else lowest < value < highest)
        if not inside or (highest is math.inf and value == math.inf):
            what = "a whole number" if kind is int else "a number"
            least = f"{'at least' if closed else 'above'} {lowest:g}"
            most = "" if highest is math.inf else f" and {'at most' if closed else 'below'} {highest:g}"
            raise ValueError(f"{name}={value!r} must be {what} {least}{most}.")

    def _check_pairs(self) -> None:
        if not any(getattr(self, name) > 0 for name in LOSS_WEIGHTS):
            raise ValueError(f"All of {', '.join(LOSS_WEIGHTS)} are 0: nothing would train. Set one above 0.")
        propagates = self.propagation_loss_weight > 0 or self.propagation_consistency_loss_weight > 0
        ranks = self.neighborhood_loss_weight > 0 or self.average_precision_loss_weight > 0
        if self.head == "label_propagation" and not propagates and not ranks:
            raise ValueError(
                "head='label_propagation' has no parameters, so only the ranking can train: set"
                " propagation_loss_weight, propagation_consistency_loss_weight, neighborhood_loss_weight or"
                " average_precision_loss_weight above 0."
            )
        if self.label_embedding and self.head in ("linear", "label_propagation"):
            raise ValueError(
                f"label_embedding has no effect with head={self.head!r}, which reads no features of neighbours: leave"
                " it out or use another head."
            )
        if self.graph_self_loop == "unit" and self.self_weight != type(self).self_weight:
            raise ValueError(
                f"self_weight={self.self_weight} has no effect with graph_self_loop='unit', where the self-loop"
                " weighs 1: leave self_weight at its default or use graph_self_loop='share'."
            )
        if self.head == "gat" and self.head_hidden_size % self.head_num_attention_heads:
            raise ValueError(
                f"head_hidden_size={self.head_hidden_size} must be a multiple of"
                f" head_num_attention_heads={self.head_num_attention_heads}."
            )
        if self.num_neighbors == 1 and self.ranking_normalization == "selected" and propagates:
            raise ValueError(
                "num_neighbors=1 with ranking_normalization='selected' gives every edge weight 1, so no gradient"
                " reaches the ranking: raise num_neighbors, use ranking_normalization='all', or set"
                " propagation_loss_weight=0 and propagation_consistency_loss_weight=0."
            )

    @property
    def feature_size(self) -> int:
        """D, the width of one image's feature."""
        return self.backbone_config.hidden_size * (2 if self.pooling == "cls_mean" else 1)


__all__ = ["BPGCNConfig"]
