"""`BPGCNTrainer`: the batch is the graph, the support bank answers."""

import copy
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from .arguments import BPGCNTrainingArguments
from .callbacks import CurvesCallback, SamplerEpoch, TemperatureSchedule
from .freezing import GROUPS, freeze_by_pattern, group_of, train_last_blocks
from .metrics import classification_metrics
from .run_folder import explained_writing
from .sampler import MixedBatchSampler, RepeatableRows

logger = logging.get_logger(__name__)


class BPGCNTrainer(Trainer):
    """`Trainer` for `BPGCNForImageClassification`.

    Rows of its data sets are `pixel_values`, `labels` (-100 unknown) and `node_ids`. Evaluation embeds the support
    images, fills the bank, and answers from it; metrics are accuracy, macro-F1, ECE and neighbour homophily.

    Args:
        model: `BPGCNForImageClassification`, or a PEFT model around it.
        args: `BPGCNTrainingArguments`.
        support_dataset: the images of the bank, without random augmentation; the training images unless given.
        train_classes: class of each training image, for the batches; read from the data set's `labels` unless given.
    """

    def __init__(
        self,
        model,
        args: BPGCNTrainingArguments,
        *,
        support_dataset=None,
        train_classes: Sequence[int] | None = None,
        **kwargs,
    ):
        self.bpgcn = model.get_base_model() if isinstance(model, PeftModel) else model
        config = self.bpgcn.config
        if args.trainable_blocks is not None:
            train_last_blocks(self.bpgcn.bpgcn.backbone, args.trainable_blocks)
        freeze_by_pattern(model, args.freeze)
        if (args.temperature_schedule == "learned") != config.learn_temperature:
            raise ValueError(
                f"temperature_schedule={args.temperature_schedule!r} but the model has learn_temperature="
                f"{config.learn_temperature}: they must agree."
            )
        super().__init__(model, args, **kwargs)
        if self.compute_metrics is None:
            self.compute_metrics = self._metrics
        self.support_dataset = self.train_dataset if support_dataset is None else support_dataset
        self.train_classes = train_classes
        self._running: dict[str, list[Tensor]] = {}
        self._temperature_schedule = None
        if args.temperature_schedule in ("linear", "cosine"):
            self._temperature_schedule = TemperatureSchedule(
                config.ranking_temperature, args.final_temperature, args.temperature_schedule
            )
            self.add_callback(self._temperature_schedule)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.add_callback(CurvesCallback())

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `MixedBatchSampler`: their make-up is that of the graph."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset.")
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = MixedBatchSampler(
            self._read_classes(),
            batch_size=min(self._train_batch_size, len(self.train_dataset)),
            labeled_batch_fraction=args.labeled_batch_fraction,
            class_balanced=args.class_balanced_batches,
            seed=seed,
        )
        self.pop_callback(SamplerEpoch)
        self.add_callback(SamplerEpoch(sampler))
        loader = DataLoader(
            RepeatableRows(self.train_dataset, seed),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=lambda worker: seed_worker(worker, args.dataloader_num_workers, args.process_index),
        )
        return self.accelerator.prepare(loader)

    def _read_classes(self) -> Sequence[int]:
        if self.train_classes is not None:
            return self.train_classes
        if isinstance(self.train_dataset, datasets.Dataset):
            for column in ("labels", "label"):
                if column in self.train_dataset.column_names:
                    return self.train_dataset.with_format(None)[column]
        if self.args.labeled_batch_fraction is not None:
            raise ValueError("labeled_batch_fraction needs to know which images are labelled: pass train_classes.")
        return [0] * len(self.train_dataset)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with a learning rate for the backbone, the head and the temperature."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        names = {p: n for n, p in (self.model if model is None else model).named_parameters()}
        rates = dict.fromkeys(GROUPS, self.args.learning_rate)
        rates |= {"head": self.args.head_learning_rate, "temperature": self.args.temperature_learning_rate}
        if self.args.backbone_learning_rate is not None:
            rates["backbone"] = self.args.backbone_learning_rate
        groups = []
        for old in optimizer.param_groups:
            for name in GROUPS:
                members = [p for p in old["params"] if group_of(names[p]) == name]
                if members:
                    decay = 0.0 if name == "temperature" else old["weight_decay"]
                    groups.append({**old, "params": members, "lr": rates[name], "weight_decay": decay, "name": name})
        if not groups:
            raise ValueError("No parameter trains: freeze fewer of them, or raise trainable_blocks.")
        optimizer.param_groups[:] = groups
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """A step of `Trainer`; a bank built before it is dropped, since the step makes it stale."""
        self.bpgcn.support_bank.clear()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; in training also what the logs say of the ranking and of the gradient's two paths."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        head_only = self.state.global_step < self.args.head_only_steps
        # by a hook on the model itself: DDP hands on copies of its outputs, which no gradient passes
        with self.bpgcn.register_forward_hook(self._watch_paths):
            outputs = model(**inputs, train_backbone=not head_only, output_path_features=True)
        self._watch(outputs, inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def _watch(self, outputs, labels: Tensor) -> None:
        weights, neighbors = outputs.neighbor_weights.detach(), labels[outputs.neighbor_indices]
        share = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        entropy = torch.special.entr(share).sum(-1)
        known = (labels[:, None] >= 0) & (neighbors >= 0)
        same = (neighbors == labels[:, None])[known].float()
        values = dict(outputs.loss_parts) | {"effective_neighbors": entropy.exp().mean()}
        if len(same):
            values["homophily"] = same.mean()
        if self.bpgcn.config.learn_temperature:
            values["temperature"] = self.bpgcn.bpgcn.ranking_temperature()
        for name, value in values.items():
            self._running.setdefault(name, []).append(value)

    def _watch_paths(self, module, args, outputs) -> None:
        for name, path in zip(("ranking", "feature"), outputs.path_features, strict=True):
            if path.requires_grad:
                path.register_hook(self._norm_recorder(f"{name}_gradient_norm"))

    def _norm_recorder(self, name: str):
        def record(gradient: Tensor) -> None:
            self._running.setdefault(name, []).append(gradient.detach().norm())

        return record

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; training logs also carry the means since the last one and each group's learning rate."""
        if "loss" in logs and self._running:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._running.items()}
            logs.setdefault("temperature", self.bpgcn.config.ranking_temperature)
            for group in self.optimizer.param_groups:
                logs[f"{group['name']}_learning_rate"] = group["lr"]
            self._running.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # a loader draws a seed: the random stream of training goes on as without it
    def embed(self, dataset, description: str) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, D], classes [N] and ids [N] of a data set, on every process, with a progress bar."""
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        training = model.training
        model.eval()
        parts = []
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        bar = logging.tqdm(desc=description, total=len(dataset), disable=hidden, unit=" images")
        for batch in self.get_test_dataloader(dataset):
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                # through forward, the only door that every wrapper knows
                features = model(pixel_values=batch["pixel_values"], support="none").features
            rows = (features, batch["labels"], batch["node_ids"])
            parts.append(self.accelerator.gather_for_metrics(rows))
            bar.update(len(parts[-1][0]))
        bar.close()
        model.train(training)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def build_support_bank(self) -> None:
        """Embed the support images and fill the model's bank."""
        if self.support_dataset is None:
            raise ValueError("Evaluation answers from a support bank: pass support_dataset or train_dataset.")
        self.bpgcn.set_support_bank(*self.embed(self.support_dataset, "Building the support bank"))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Build the bank and answer from it; with `transductive_evaluation` also as one graph with the support set."""
        self.build_support_bank()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.args.transductive_evaluation:
            extra = self._evaluate_transductively(self.eval_dataset if eval_dataset is None else eval_dataset)
            extra = {f"{metric_key_prefix}_transductive_{name}": value for name, value in extra.items()}
            self.log(dict(extra))
            metrics |= extra
        return metrics

    @torch.no_grad()
    def _evaluate_transductively(self, dataset) -> dict[str, float]:
        features, labels, ids = self.embed(dataset, "Embedding the queries")
        self.bpgcn.eval()
        outputs = self.bpgcn(features=features, node_ids=ids, support="transductive")
        classes = self.bpgcn.support_bank.classes
        neighbors = torch.cat([classes, classes.new_full((len(ids),), -100)])[outputs.neighbor_indices]
        return classification_metrics(outputs.logits, labels, neighbors)

    def _metrics(self, prediction) -> dict[str, float]:
        logits, neighbor_indices = prediction.predictions
        classes = self.bpgcn.support_bank.classes.cpu().numpy()
        return classification_metrics(logits, prediction.label_ids, classes[neighbor_indices])

    def create_model_card(self, *args, **kwargs) -> None:
        """Trainer's card, unless the run's own report has written one."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, with a bank, so that the model can answer; of a PEFT model the merged one, which loads like
        any other, and beside it the `adapter`. Checkpoints stay as `Trainer` makes them."""
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.bpgcn.support_bank.size == 0 and self.support_dataset is not None:
            self.build_support_bank()
        with explained_writing(folder, self.args.output_dir):
            if not isinstance(self.model, PeftModel):
                super().save_model(output_dir, _internal_call)
            elif self.args.should_save:
                self.model.save_pretrained(folder / "adapter")
                copy.deepcopy(self.model).merge_and_unload().save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with explained_writing(folder, self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        # what the best checkpoint need not hold: the bank (PEFT) and the temperature of its step
        self.bpgcn.support_bank.clear()
        super()._load_best_model()
        if self._temperature_schedule is not None:
            self._temperature_schedule.apply(self.model, self.state.best_global_step - 1, self.state.max_steps)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the state, written next, says that the checkpoint is whole: it is when every process has written its part
        self.accelerator.wait_for_everyone()
