"""A LoRA run on disk: the base that the adapters stand on, the adapters, and the merged model."""

import copy
from pathlib import Path

from peft import PeftModel

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"


def name_base(model: PeftModel, run: Path, processor, refresh: bool = False) -> None:
    """Let the adapters' config name the model that they stand on, which `from_pretrained` of an adapter starts from.

    A model that was loaded has a name already. One that a run has made is saved in the folder `base` of the run: before
    the first adapters, and again by `refresh`, as a schedule changes the temperature in its config. With it the image
    processor, which a pipeline of an adapter looks for there.
    """
    settings, base = model.peft_config[model.active_adapter], run / BASE_FOLDER
    ours = str(base.absolute())
    if settings.base_model_name_or_path not in (None, ours):
        return
    settings.base_model_name_or_path = ours
    if refresh or not (base / "config.json").is_file():
        plain = copy.deepcopy(model).unload()
        plain.support_bank.clear()  # of features that adapters had a part in
        plain.save_pretrained(base)
        if processor is not None:
            processor.save_pretrained(base)


def save_run(model: PeftModel, folder: Path, run: Path, processor) -> None:
    """The merged model in `folder`, which loads like any other, beside it `adapter`, each with the image processor."""
    name_base(model, run, processor, refresh=True)
    model.save_pretrained(folder / ADAPTER_FOLDER)
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        processor.save_pretrained(folder / ADAPTER_FOLDER)
