"""What both models share: their outputs, the temperature, how weights start, load and save."""

import difflib
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import load_state_dict
from transformers.utils import ModelOutput, cached_file

from .bank_search import CandidateSearch, check_indexable
from .configuration_bpgcn import BPGCNConfig
from .heads import ARMALayer, GATLayer
from .retrieval import BPGCNRetrievalOutput, retrieve

AUTO_MAP = {
    "AutoConfig": "configuration_bpgcn.BPGCNConfig",
    "AutoModel": "modeling_bpgcn.BPGCNModel",
    "AutoModelForImageClassification": "modeling_bpgcn.BPGCNForImageClassification",
}


@dataclass
class BPGCNModelOutput(ModelOutput):
    """`features` [B, D]; `neighbor_indices` [B, k] int64, rows of the support (the bank, or the batch, or the bank
    followed by those of the batch that it does not hold); `neighbor_weights` [B, k]."""

    features: Tensor | None = None
    neighbor_indices: Tensor | None = None
    neighbor_weights: Tensor | None = None


@dataclass
class BPGCNImageClassifierOutput(ModelOutput):
    """`loss` []; `logits` [B, C], log-probabilities; the rest as in `BPGCNModelOutput`; `loss_parts`, each unweighted;
    `path_features`, the features as the ranking read them and as the messages did, when asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None
    neighbor_indices: Tensor | None = None
    neighbor_weights: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    path_features: tuple[Tensor, Tensor] | None = None


class RankingTemperature(nn.Module):
    """tau: the config's number, or exp of a learned parameter, kept within a useful range."""

    bounds = (1e-3, 100.0)

    def __init__(self, config: BPGCNConfig):
        super().__init__()
        self.config = config
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.ranking_temperature)))

    def forward(self) -> float | Tensor:
        if not self.config.learn_temperature:
            return self.config.ranking_temperature
        low, high = self.bounds
        return self.log_temperature.clamp(math.log(low), math.log(high)).exp()


class BPGCNPreTrainedModel(PreTrainedModel):
    """How BPGCN models start from scratch, from a backbone, and from a checkpoint, and how they are saved."""

    config_class = BPGCNConfig
    base_model_prefix = "bpgcn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the bank's buffers keep the types that it gives them; named here, their int64 ids would become float32
    _keep_in_fp32_modules_strict = ("ranking_temperature",)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, GATLayer):
            init.xavier_uniform_(module.source_attention)
            init.xavier_uniform_(module.target_attention)
            init.zeros_(module.bias)
        elif isinstance(module, ARMALayer):
            # a layer without parameters of its own would count as initialised: init here, not in the head
            for weight in (module.weight, module.root_weight):
                init.normal_(weight, std=math.sqrt(2 / sum(weight.shape[1:])))
            init.zeros_(module.bias)
        elif isinstance(module, RankingTemperature) and self.config.learn_temperature:
            init.constant_(module.log_temperature, math.log(self.config.ranking_temperature))

    @classmethod
    def from_backbone_pretrained(cls, name_or_path: str, *, revision: str | None = None, **config):
        """A new model around a pretrained backbone: `config` are fields of `BPGCNConfig` (and `num_labels` ...).

        Raises:
            ValueError: for a name that `BPGCNConfig` does not know, naming the nearest.
        """
        known = {field.name for field in fields(BPGCNConfig)} | {"num_labels", "id2label", "label2id"}
        for name in config:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]}?" if nearest else ""
                raise ValueError(f"{name}={config[name]!r} is no field of BPGCNConfig.{hint}")
        backbone = AutoModel.from_pretrained(name_or_path, revision=revision)
        model = cls(BPGCNConfig(backbone_config=backbone.config, **config))
        model.base_model.backbone.load_state_dict(backbone.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes=False, **kwargs):
        # sizes are compared here, so that a bank that contradicts the config is named instead of lost
        asked_for_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model.base_model.freeze_unused()  # loading made every parameter anew
        # an empty bank fits any number of classes, and need not be there
        mismatched = [name for name, stored, held in info["mismatched_keys"] if stored.numel() or held.numel()]
        missing = info["missing_keys"] if model.config.bank_size else ()
        wrong = [k for k in [*mismatched, *missing, *info["unexpected_keys"]] if "support_bank." in k]
        if wrong:
            raise ValueError(
                f"The support bank in {pretrained_model_name_or_path} and its config"
                f" (bank_size={model.config.bank_size}) disagree: {', '.join(sorted(wrong)[:3])}. Save the model with"
                " save_pretrained, which keeps them in step, or set bank_size to 0, remove the bank's"
                " tensors and call build_support_bank again."
            )
        if mismatched and not ignore_mismatched_sizes:
            raise RuntimeError(
                f"Sizes in {pretrained_model_name_or_path} differ from its config: {', '.join(mismatched)}. Pass"
                " ignore_mismatched_sizes=True to start these afresh."
            )
        return (model, info) if asked_for_info else model

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As in transformers. The adapter's support bank takes the place of the model's, whose features were made
        without the adapter; an adapter that has none leaves it empty."""
        state, loading = kwargs.get("adapter_state_dict"), kwargs.get("load_config")
        if state is None:
            hub = ({} if loading is None else loading.download_kwargs) | (kwargs.get("adapter_kwargs") or {})
            state = load_state_dict(cached_file(peft_model_id, "adapter_model.safetensors", **hub))
        bank = self.base_model.support_bank
        bank = getattr(bank, "original_module", bank)  # peft wraps a copy of it for each adapter
        rows = {name.rpartition(".")[2]: value for name, value in state.items() if ".support_bank." in name}
        if rows:  # now: transformers takes no other size than the model's
            bank.load_state_dict(rows)
        else:
            bank.clear()
        self.config.bank_size = bank.size
        return super().load_adapter(peft_model_id, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; bank and config are in step, and every Auto class finds its code."""
        bank = self.base_model.support_bank
        self.config.bank_size, self.config.bank_fingerprint = bank.size, bank.fingerprint
        self.config.auto_map = dict(AUTO_MAP)
        # the original key names would lose DINOv2's attention on Trainer's resume (transformers#43701)
        kwargs.setdefault("save_original_format", False)
        # FSDP2 makes a class of its own of this one, and transformers would save that class's code: torch's
        sharded = type(self)
        self.__class__ = next(kind for kind in sharded.__mro__ if not kind.__name__.startswith("FSDP"))
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = sharded

    def retrieve(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        *,
        node_ids: Tensor | None = None,
        num_neighbors: int | None = None,
    ) -> BPGCNRetrievalOutput:
        """The support images nearest to each image [B, channels, height, width] or feature [B, D], best first, with
        their weights, see `retrieval.retrieve`."""
        return retrieve(self.base_model, pixel_values, features, node_ids, num_neighbors)

    def use_search(self, search: CandidateSearch | None) -> None:
        """Let an index propose the neighbours in the support bank, such as `modeling_bpgcn.search.FaissSearch()`; the
        model ranks and weighs what it proposes. None searches exactly. The index follows the bank and is not saved.

        Raises:
            ValueError: for a model whose weights need the scores of all support images.
        """
        if search is not None:
            check_indexable(self.base_model.rank_options())
        self.base_model.support_bank.attach(search)

    def get_input_embeddings(self):
        return self.base_model.backbone.get_input_embeddings()
