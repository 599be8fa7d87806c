"""Publishing a run: which files of its folder go to the Hub, and when."""

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer, TrainingArguments

from .thumbnails import THUMBNAILS_FILE

# What others need, and no more: no pickle, no optimizer, no second copy of the weights, and nothing that tells of this
# machine's folders (Trainer's arguments and state, the recipe).
PUBLISHED = [
    "README.md",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "preprocessor_config.json",
    "*.py",
    "results.json",
    "*.png",
]


def check_hub_strategy(arguments: TrainingArguments) -> None:
    """Refuse to publish checkpoints."""
    if arguments.push_to_hub and arguments.hub_strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy={arguments.hub_strategy.value!r} would publish checkpoints: pickles, with the paths of this"
            " machine. Choose 'end'; a run is gone on with from its output_dir."
        )


def publish(
    trainer: Trainer,
    commit_message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card,
) -> CommitInfo | Future | None:
    """Save the model and upload it with its code, bank, processor, card and pictures, those of its support images only
    where `push_thumbnails` says so; arguments and errors as in `Trainer.push_to_hub`. Every process calls it, the first
    one uploads; the others return None."""
    arguments, folder = trainer.args, Path(trainer.args.output_dir)
    token = token or arguments.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**card)
    page = folder / "README.md"
    # a card written before the repository had a name loads the folder
    named = page.read_text(encoding="utf-8").replace(f'"{folder.as_posix()}"', f'"{trainer.hub_model_id}"')
    page.write_text(named, encoding="utf-8")
    return HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=commit_message,
        token=token,
        revision=revision or arguments.hub_revision,
        run_as_future=not blocking,
        allow_patterns=PUBLISHED + [THUMBNAILS_FILE] * arguments.push_thumbnails,
        ignore_patterns=["*/*"],  # a pattern's star also spans folders
    )
