"""BPGCN: train an image backbone through a differentiable neighbour ranking into a graph convolutional network."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_bpgcn import BPGCNConfig
from .modeling_bpgcn import BPGCNForImageClassification, BPGCNModel

AutoConfig.register("bpgcn", BPGCNConfig, exist_ok=True)
AutoModel.register(BPGCNConfig, BPGCNModel, exist_ok=True)
AutoModelForImageClassification.register(BPGCNConfig, BPGCNForImageClassification, exist_ok=True)

__all__ = ["BPGCNConfig", "BPGCNForImageClassification", "BPGCNModel"]
