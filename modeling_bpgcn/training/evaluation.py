"""Evaluation: embed the support images, fill the bank, answer from it."""

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from .metrics import classification_metrics

logger = logging.get_logger(__name__)


class BankEvaluator(Trainer):
    """`Trainer` whose evaluation answers from the support bank; metrics are accuracy, macro-F1, ECE and neighbour
    homophily. `self.bpgcn` is the model without its wrappers, `self.support_dataset` the images of the bank."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            if self.bpgcn.config.learn_temperature:
                raise ValueError("FSDP shards no single number: use another temperature_schedule than learned.")
            # autocast decides what runs in low precision, as elsewhere; FSDP2's policy would round all that enters and
            # leaves the model, and so rank rounded features
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """As in `Trainer`; accelerate wraps the forward pass of every model but that of FSDP2 in autocast."""
        if self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

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
        rows = self.embed(self.support_dataset, "Building the support bank")
        self.bpgcn.set_support_bank(*rows, image_processor=self.processing_class)

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
