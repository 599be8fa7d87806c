"""From arguments to a model and its image processor."""

import re

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_bpgcn import BPGCNConfig
from ..modeling_bpgcn import BPGCNForImageClassification
from .arguments import BPGCNTrainingArguments
from .images import build_image_processor
from .model_arguments import CONFIG_FIELDS


def read_backbone_config(arguments):
    """The backbone's config, from its folder, the Hub, or the recipe."""
    if (arguments.backbone is None) == (arguments.backbone_config is None):
        raise ValueError("Give either backbone (a folder or a Hub name) or backbone_config (to train from scratch).")
    if arguments.backbone is not None:
        return AutoConfig.from_pretrained(arguments.backbone, revision=arguments.backbone_revision)
    return AutoConfig.for_model(**arguments.backbone_config)


def build_processor(arguments, image_size: int | None) -> tuple[BaseImageProcessor, int]:
    """The processor that belongs to the backbone, at the image size asked for, and the side of a patch."""
    patch_size = getattr(read_backbone_config(arguments), "patch_size", 1)
    return build_image_processor(arguments.backbone, image_size, patch_size), patch_size


def build_model(arguments, training: BPGCNTrainingArguments, label_names: list[str], **overrides):
    """The model of a run (a PEFT model with `lora_rank`); `overrides` replace fields of its config."""
    config = {name: getattr(arguments, name) for name in CONFIG_FIELDS if name != "backbone_config"}
    config["learn_temperature"] = training.temperature_schedule == "learned"
    config["id2label"] = dict(enumerate(label_names))
    config["label2id"] = {name: i for i, name in enumerate(label_names)}
    config |= overrides
    backbone_config = read_backbone_config(arguments)
    if arguments.backbone is None:
        model = BPGCNForImageClassification(BPGCNConfig(backbone_config=backbone_config, **config))
    else:
        revision = arguments.backbone_revision
        model = BPGCNForImageClassification.from_backbone_pretrained(arguments.backbone, revision=revision, **config)
    return model if arguments.lora_rank is None else _add_adapters(model, arguments)


def _add_adapters(model: BPGCNForImageClassification, arguments):
    names = "|".join(map(re.escape, arguments.lora_target_modules))
    pattern = rf".*\.backbone\..*\.({names})"
    layers = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if not layers:
        linear = (name for name, module in model.bpgcn.backbone.named_modules() if hasattr(module, "in_features"))
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ValueError(
            f"lora_target_modules={arguments.lora_target_modules} matches no layer of the backbone; its linear layers"
            f" are {', '.join(known)}."
        )
    # what is not a change of the backbone is saved in full with the adapters: what trains, and the bank, whose features
    # they made; peft works on a copy, which a schedule of the temperature would not reach
    in_full = ["head"] * (model.head is not None) + ["ranking_temperature"] * model.config.learn_temperature
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=pattern,
        modules_to_save=[*in_full, "support_bank"],
    )
    return get_peft_model(model, settings)
