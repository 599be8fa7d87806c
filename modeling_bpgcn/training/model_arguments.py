"""What a recipe and the command line can set of the model: the backbone, LoRA, and the config's own fields."""

import dataclasses
from dataclasses import MISSING, field

from ..configuration_bpgcn import CHOICES, BPGCNConfig


def _model_arguments() -> type:
    """A dataclass of the config's own fields, so that each is declared once."""
    fixed = {"backbone_config", "bank_size", "bank_fingerprint", "learn_temperature"}
    fields = [
        (
            "backbone",
            str | None,
            field(default=None, metadata={"help": "Pretrained backbone: a folder or a Hub name."}),
        ),
        (
            "backbone_revision",
            str | None,
            field(default=None, metadata={"help": "Revision of the backbone on the Hub."}),
        ),
        (
            "backbone_config",
            dict | None,
            field(default=None, metadata={"help": "Backbone to train from scratch (YAML)."}),
        ),
        ("lora_rank", int | None, field(default=None, metadata={"help": "Train LoRA adapters of this rank."})),
        ("lora_alpha", float, field(default=16.0, metadata={"help": "Scale of the LoRA adapters."})),
        ("lora_dropout", float, field(default=0.0, metadata={"help": "Dropout of the LoRA adapters."})),
        (
            "lora_target_modules",
            list[str],
            field(
                default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
                metadata={"help": "Names of the backbone's layers that get adapters."},
            ),
        ),
    ]
    for entry in dataclasses.fields(BPGCNConfig):
        own = entry.name in BPGCNConfig.__annotations__ and entry.name not in fixed and entry.default is not MISSING
        if own:
            choices = {"choices": CHOICES[entry.name]} if entry.name in CHOICES else {}
            help_text = f"See BPGCNConfig.{entry.name}."
            fields.append(
                (entry.name, entry.type, field(default=entry.default, metadata={"help": help_text, **choices}))
            )
    made = dataclasses.make_dataclass("ModelArguments", fields, namespace={"__module__": __name__})
    made.__doc__ = "The backbone, LoRA, and the fields of `BPGCNConfig`."
    return made


ModelArguments = _model_arguments()
CONFIG_FIELDS = [f.name for f in dataclasses.fields(ModelArguments) if f.name in BPGCNConfig.__annotations__]
