"""What a recipe and the command line can set: the model, the data and the training, each a dataclass."""

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .data import DataArguments
from .model_arguments import ModelArguments
from .prefix_cache import DTYPES
from .sharpness import check_sharpness
from .support_apart import check_support
from .view_consistency import check_views
from .weight_averaging import check_averaging

TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine", "learned")
BASELINES = ("none", "frozen", "all")
GRAPH_SCOPES = ("batch", "memory", "full")
RANKING_SHARDS = ("none", "rows", "ring")


@dataclass
class BPGCNTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit images, and what BPGCN adds."""

    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the backbone (or its adapters); --learning_rate unless given."},
    )
    head_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the head."})
    temperature_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of log tau, when learned."})
    trainable_blocks: int | None = field(
        default=None, metadata={"help": "Train only the last n blocks of the backbone (0: none of it)."}
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions: parameters whose name matches one do not train."},
    )
    head_only_steps: int = field(
        default=0, metadata={"help": "Steps at the start in which the backbone does not train."}
    )
    temperature_schedule: str = field(
        default="constant",
        metadata={"help": "The temperature over the steps.", "choices": TEMPERATURE_SCHEDULES},
    )
    final_temperature: float | None = field(
        default=None, metadata={"help": "Where the linear and cosine schedules end."}
    )
    graph_scope: str = field(
        default="batch",
        metadata={
            "help": "What the graph of a step spans: the images of the batch, these and a memory of earlier features,"
            " or all training images (full, by gradient caching: one step an epoch).",
            "choices": GRAPH_SCOPES,
        },
    )
    gradient_cache_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Embed a batch in chunks of so many images, twice, with the activations of one chunk at a time."
            " With graph_scope full the batch size unless given."
        },
    )
    memory_size: int = field(
        default=0, metadata={"help": "Rows of the memory of graph_scope memory (4096 unless set)."}
    )
    memory_warmup_steps: int = field(
        default=0, metadata={"help": "Steps at the start in which the memory fills but takes no part."}
    )
    prefix_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the output of the backbone's frozen first blocks: computed once, read since."},
    )
    prefix_cache_dtype: str = field(
        default="float16", metadata={"help": "How that output is stored.", "choices": DTYPES}
    )
    ranking_shards: str = field(
        default="none",
        metadata={
            "help": "With several processes: each ranks all images (none), its own against all (rows), or its own while"
            " the features travel round the processes (ring).",
            "choices": RANKING_SHARDS,
        },
    )
    sam_rho: float = field(
        default=0.0, metadata={"help": "Take the gradient where the weights have gone so far up the loss (SAM)."}
    )
    gradient_norm_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the squared norm of the loss's own gradient for the features."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and save a moving average of the weights with this decay (0: none)."}
    )
    support_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of each batch that plays the support bank: the other images are ranked against it alone, are"
            " nobody's neighbours, and only they are asked (0: all images are each other's neighbours)."
        },
    )
    view_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence between the answers to two views of an unlabelled image (0: none)."
        },
    )
    view_token_dropout: float = field(
        default=0.5, metadata={"help": "Share of the patch tokens that the second view lacks; from a prefix cache."}
    )
    push_thumbnails: bool = field(
        default=False,
        metadata={"help": "With the model, publish small pictures of its support images, which are training images."},
    )
    labeled_batch_fraction: float | None = field(
        default=None, metadata={"help": "Share of labelled images in each batch; plain shuffled batches unless given."}
    )
    class_balanced_batches: bool = field(
        default=False, metadata={"help": "Draw the labelled part of each batch evenly from the classes."}
    )
    transductive_evaluation: bool = field(
        default=False, metadata={"help": "Evaluate the test images as one graph with the support images, too."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    baselines: str = field(
        default="none",
        metadata={
            "help": "Measure in the same run: a linear classifier and a fixed graph on frozen features (frozen), also a"
            " fine-tuned linear classifier (all).",
            "choices": BASELINES,
        },
    )
    gradient_flow_steps: int = field(
        default=0, metadata={"help": "Every so many steps, log the gradient on each path; draw it at the end (0: no)."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the transform needs the image."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "The inputs that evaluation compares answers with."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        rates = ("backbone_learning_rate", "head_learning_rate", "temperature_learning_rate")
        for name in rates:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative.")
        for name in ("trainable_blocks", "head_only_steps", "gradient_flow_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be 0 or more.")
        if self.temperature_schedule not in TEMPERATURE_SCHEDULES:
            known = ", ".join(TEMPERATURE_SCHEDULES)
            raise ValueError(f"temperature_schedule={self.temperature_schedule!r} is unknown: choose one of {known}.")
        if self.baselines not in BASELINES:
            raise ValueError(f"baselines={self.baselines!r} is unknown: choose one of {', '.join(BASELINES)}.")
        moving = self.temperature_schedule in ("linear", "cosine")
        if moving and (self.final_temperature is None or self.final_temperature <= 0):
            raise ValueError(
                f"temperature_schedule={self.temperature_schedule!r} needs final_temperature above 0;"
                f" it is {self.final_temperature}."
            )
        if not moving and self.final_temperature is not None:
            raise ValueError(
                f"final_temperature={self.final_temperature} has no effect with temperature_schedule="
                f"{self.temperature_schedule!r}: use linear or cosine."
            )
        self._check_graph()
        check_sharpness(self)
        check_support(self)
        check_averaging(self)
        check_views(self)
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end true and an eval_strategy.")

    def _check_graph(self) -> None:
        options = {"graph_scope": GRAPH_SCOPES, "ranking_shards": RANKING_SHARDS, "prefix_cache_dtype": DTYPES}
        for name, choices in options.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(f"gradient_cache_chunk_size={self.gradient_cache_chunk_size} must be 1 or more.")
        if self.memory_size < 0 or self.memory_warmup_steps < 0:
            raise ValueError("memory_size and memory_warmup_steps must be 0 or more.")
        if self.graph_scope == "memory":
            self.memory_size = self.memory_size or 4096
            if self.ranking_shards != "none":
                raise ValueError("graph_scope memory ranks on every process: leave ranking_shards at none.")
        elif self.memory_size or self.memory_warmup_steps:
            raise ValueError(f"memory_size and memory_warmup_steps need graph_scope memory, not {self.graph_scope}.")
        if self.graph_scope == "full":
            if self.labeled_batch_fraction is not None or self.class_balanced_batches:
                raise ValueError(
                    "graph_scope full has no batches to mix: leave labeled_batch_fraction and class_balanced_batches"
                    " out."
                )
            if self.gradient_accumulation_steps != 1:
                raise ValueError("graph_scope full is one step for all images: set gradient_accumulation_steps 1.")
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters true is not needed, as every parameter gets a gradient, and forbids to"
                " embed and to rank in two calls: leave it out."
            )
        self.ddp_find_unused_parameters = False


ARGUMENTS = (ModelArguments, DataArguments, BPGCNTrainingArguments)


def parse_arguments(arguments: list[str] | None = None) -> tuple:
    """RECIPE.yaml [--option value ...] -> (ModelArguments, DataArguments, BPGCNTrainingArguments).

    The recipe sets defaults and the command line wins.

    Raises:
        SystemExit: after naming an unknown option and the nearest known one, as argparse does.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = HfArgumentParser(ARGUMENTS, description=__doc__, usage="train.py RECIPE.yaml [--option value ...]")
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    known = sorted({f.name for kind in ARGUMENTS for f in dataclasses.fields(kind) if f.init})
    settings = {} if recipe is None else _read_recipe(parser, recipe, known)
    options = [argument.split("=")[0].lstrip("-") for argument in arguments if argument.startswith("--")]
    _check_names(parser, [o for o in options if o.removeprefix("no_") not in known], known, "the command line")
    if recipe is None and not arguments:
        parser.error("give a recipe, such as configuration/digits.yaml, or --help.")
    for action in parser._actions:
        # what the recipe sets is no longer required from the command line
        action.required = action.required and action.dest not in settings
        if action.nargs == "+" and isinstance(settings.get(action.dest), str):
            settings[action.dest] = [settings[action.dest]]  # a list of one, written without brackets
    parser.set_defaults(**settings)
    *parsed, stray = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if stray:
        parser.error(f"{' '.join(stray)} belongs to no option; options are written --name value.")
    _, data, training = parsed
    if training.load_best_model_at_end and not (data.validation_split or data.validation_fraction):
        parser.error(
            "load_best_model_at_end would choose on test images: set validation_fraction, or name a validation_split."
        )
    return tuple(parsed)


def _read_recipe(parser: HfArgumentParser, recipe: str, known: list[str]) -> dict:
    path = Path(recipe)
    if not path.is_file():
        parser.error(
            f"the recipe {recipe} does not exist; the first argument is a YAML file, options follow as --name."
        )
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        parser.error(f"the recipe {recipe} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"the recipe {recipe} must hold lines of `name: value`.")
    _check_names(parser, [str(name) for name in settings if name not in known], known, recipe)
    for name, value in settings.items():
        if isinstance(value, str) and name.endswith(("rate", "decay", "temperature")):
            parser.error(f"{recipe}: {name}: {value} is text to YAML; write a number such as 1.0e-4.")
    return settings


def _check_names(parser: HfArgumentParser, unknown: list[str], known: list[str], where: str) -> None:
    for name in unknown:
        if name in ("help", "h"):
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else " --help lists them all."
        parser.error(f"{where}: {name} is no option.{hint}")
