"""`BPGCNTrainer`: a batch, a batch and its memory, or all images are the graph; the support bank answers."""

import contextlib
import copy
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback
from transformers.utils import logging

from ..ranking import Ranking
from .adapters import name_base, save_run
from .arguments import BPGCNTrainingArguments
from .callbacks import CurvesCallback, SamplerEpoch, TemperatureSchedule
from .feature_memory import FeatureMemory
from .freezing import freeze_by_pattern, split_groups, train_last_blocks
from .gather import gather_rows, touch
from .gradient_cache import GradientCache, WholeSet, split_rows
from .gradient_flow_callback import GradientFlowCallback
from .loading import graph_sampler, read_classes, training_loader
from .prefix_cache import cache_prefix
from .publishing import check_hub_strategy, publish
from .random_state import get_random_state, seeded, set_random_state
from .run_folder import explained_writing
from .sharded_ranking import rank_ring, rank_rows
from .sharpness import check_sharpness_runs, gradient_penalty, perturbed
from .statistics import StepStatistics
from .support_apart import check_support_graph, set_support_apart
from .view_consistency import view_loss
from .weight_averaging import AveragingTrainer


class BPGCNTrainer(AveragingTrainer):
    """`Trainer` for `BPGCNForImageClassification`; with several processes, one graph spans what all of them embed.

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
        check_hub_strategy(args)
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
        check_support_graph(args, config.graph_symmetrization)
        super().__init__(model, args, **kwargs)
        check_sharpness_runs(self)
        if self.compute_metrics is None:
            self.compute_metrics = self._metrics
        self.support_dataset = self.train_dataset if support_dataset is None else support_dataset
        self.train_classes = train_classes
        self._statistics = StepStatistics()
        self._memory = FeatureMemory(args.memory_size, args.memory_warmup_steps) if args.memory_size else None
        self._micro_step = (-1, 0)  # optimizer step and which of its batches
        self._temperature_schedule = None
        if args.temperature_schedule in ("linear", "cosine"):
            self._temperature_schedule = TemperatureSchedule(
                config.ranking_temperature, args.final_temperature, args.temperature_schedule
            )
            self.add_callback(self._temperature_schedule)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.add_callback(CurvesCallback())
        self.add_callback(GradientFlowCallback(self._statistics))

    def get_train_dataloader(self) -> DataLoader | WholeSet:
        """This process's part of the batches of `MixedBatchSampler`: their make-up is that of the graph."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset.")
        classes = read_classes(self.args, self.train_dataset) if self.train_classes is None else self.train_classes
        sampler = graph_sampler(self.args, classes, self._train_batch_size)
        self.pop_callback(SamplerEpoch)
        self.add_callback(SamplerEpoch(sampler))
        return training_loader(self.args, self._training_rows(), sampler, self._train_batch_size, self.data_collator)

    def _training_rows(self):
        """The training images, or what the backbone's frozen blocks have made of them."""
        args = self.args
        if args.prefix_cache is None:
            return self.train_dataset
        return cache_prefix(
            self.bpgcn,
            self.train_dataset,
            args.prefix_cache,
            dtype=args.prefix_cache_dtype,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, with a learning rate for the backbone, the head and the temperature."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        args = self.args
        backbone = args.learning_rate if args.backbone_learning_rate is None else args.backbone_learning_rate
        rates = {"backbone": backbone, "head": args.head_learning_rate, "temperature": args.temperature_learning_rate}
        split_groups(optimizer, self.model if model is None else model, rates)
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """A step of `Trainer`; with `sam_rho` the gradient is that of another, of equal noise at perturbed weights."""
        if not self.args.sam_rho:
            return self._backpropagate(model, inputs, num_items_in_batch)
        noise, before = get_random_state(self.args.device), (self._micro_step, copy.copy(self._memory))
        loss = self._backpropagate(model, inputs, num_items_in_batch)
        after = self._memory, self._statistics  # both tell of the weights as they are
        (self._micro_step, self._memory), self._statistics = before, StepStatistics()
        set_random_state(noise, self.args.device)
        with perturbed(model.parameters(), self.args.sam_rho):
            sam_loss = self._backpropagate(model, inputs, num_items_in_batch)
        self._memory, self._statistics = after
        self._statistics.add("sam_loss", sam_loss)
        return loss

    def _backpropagate(self, model, inputs, num_items_in_batch) -> Tensor:
        """Loss and gradient, of images in chunks by gradient caching; a bank built before them is dropped as stale."""
        self.bpgcn.support_bank.clear()
        size, trains = self.args.gradient_cache_chunk_size, self._backbone_trains()
        chunks = inputs["chunks"] if "chunks" in inputs else split_rows(inputs, size) if size else None
        if chunks is not None:
            model.train()
            cache = GradientCache(chunks, partial(self._features, model), self._progress)
            inputs = cache.embed(self.args.device, trains)
        no_sync = partial(self.accelerator.no_sync, model)
        again = chunks is not None and trains
        with no_sync() if again else contextlib.nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if again:
            cache.backward(inputs["features"].grad, no_sync, partial(touch, model))
        if not trains:  # an exchange between processes leaves gradients of 0, under which weights would decay
            for parameter in self.bpgcn.bpgcn.backbone.parameters():
                parameter.grad = None
        return loss

    def _progress(self, chunks: Collection, description: str) -> Collection:
        hidden = self.args.disable_tqdm or self.args.graph_scope != "full" or not self.is_world_process_zero()
        return logging.tqdm(chunks, desc=description, disable=hidden, leave=False, unit=" chunks")

    def _backbone_trains(self) -> bool:
        late = self.state.global_step >= self.args.head_only_steps
        return late and any(p.requires_grad for p in self.bpgcn.bpgcn.backbone.parameters())

    def _features(self, model, batch: dict[str, Tensor]) -> Tensor:
        """Features [B, D] of a batch, through the forward pass, the only door that every wrapper knows."""
        images = {name: value for name, value in batch.items() if name in ("pixel_values", "hidden_states")}
        with self.compute_loss_context_manager():
            outputs = model(**self._prepare_inputs(images), support="none", train_backbone=self._backbone_trains())
        return outputs.features

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; in training that of the graph over all processes' images, and what the logs say of it."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        features = inputs["features"] if "features" in inputs else self._features(model, inputs)
        local = {"features": features, "labels": inputs["labels"], "node_ids": inputs["node_ids"]}
        nodes = {name: gather_rows(rows) for name, rows in local.items()}
        graph, asked = nodes, len(nodes["labels"])
        if self._memory is not None:
            step = self.state.global_step
            self._statistics.update(self._memory.staleness(nodes["features"], nodes["node_ids"], step))
            graph = self._memory.extend(nodes, step)
        # by a hook on the model itself: DDP hands on copies of its outputs, which no gradient passes
        noise, penalty = self._graph_noise(), gradient_penalty(self.bpgcn, self.args.gradient_norm_penalty)
        with noise, penalty, self.bpgcn.register_forward_hook(self._statistics.watch_paths):
            graph, asked = set_support_apart(graph, asked, self.args.support_fraction)
            outputs = model(
                **graph,
                num_context=len(graph["labels"]) - asked,
                support_apart=self.args.support_fraction > 0,
                ranking=self._sharded_ranking(local),
                output_path_features=True,
            )
        loss = outputs.loss
        if self.args.view_loss_weight:
            noise = seeded((self.args.seed, *self._micro_step, 1), self.args.device)
            embed, share = partial(self._features, model), self.args.view_token_dropout
            consistency = view_loss(model, inputs, nodes, embed, noise, share, self.bpgcn.config)
            self._statistics.add("view_loss", consistency)
            loss = loss + self.args.view_loss_weight * consistency
        self._statistics.add_ranking(outputs.neighbor_indices, outputs.neighbor_weights, graph["labels"], asked)
        self._statistics.update(outputs.loss_parts)
        if self.bpgcn.config.learn_temperature:
            self._statistics.add("temperature", self.bpgcn.bpgcn.ranking_temperature())
        touched = touch(model)
        loss = loss if touched is None else loss + touched
        return (loss, outputs) if return_outputs else loss

    def _sharded_ranking(self, local: dict[str, Tensor]) -> Ranking | None:
        if self.args.ranking_shards == "none":
            return None
        rank = {"rows": rank_rows, "ring": rank_ring}[self.args.ranking_shards]
        return rank(local["features"], local["node_ids"], **self.bpgcn.bpgcn.rank_options())

    def _graph_noise(self) -> contextlib.AbstractContextManager:
        """Dropout and drawn labels of the graph depend on seed and step alone: the same for every process, however many
        there are."""
        step = self.state.global_step
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        return seeded((self.args.seed, *self._micro_step), self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; training logs also carry the means since the last one and each group's learning rate."""
        if "loss" in logs:
            logs |= self._statistics.take()
            logs.setdefault("temperature", self.bpgcn.config.ranking_temperature)
            for group in self.optimizer.param_groups:
                logs[f"{group['name']}_learning_rate"] = group["lr"]
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Trainer's card, unless the run's own report has written one."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """As in `Trainer`, of what others need to use the model: see `publishing.publish`."""
        return publish(self, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing is published before the end: a model in training has no bank to answer from."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, with a bank, so that the model can answer; of a PEFT model the merged one, which loads like
        any other, and beside it the `adapter`. Checkpoints stay as `Trainer` makes them."""
        adapted, run = isinstance(self.model, PeftModel) and self.args.should_save, Path(self.args.output_dir)
        if _internal_call and output_dir is not None:
            if adapted:
                name_base(self.model, run, self.processing_class)
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or run)
        if self.bpgcn.support_bank.size == 0 and self.support_dataset is not None:
            self.build_support_bank()
        with explained_writing(folder, self.args.output_dir):
            if not isinstance(self.model, PeftModel):
                super().save_model(output_dir, _internal_call=True)  # Trainer would push, before there is a card
            elif adapted:
                save_run(self.model, folder, run, self.processing_class)

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
        if self._memory is not None and self.args.should_save:
            self._memory.save(output_dir)
        # the state, written next, says that the checkpoint is whole: it is when every process has written its part
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint) -> None:
        super()._load_rng_state(checkpoint)
        if self._memory is not None and checkpoint is not None:
            self._memory.load(checkpoint, self.args.device)
