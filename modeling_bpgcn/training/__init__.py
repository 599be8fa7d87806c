"""Training: data, sampler, trainer, callbacks, metrics and the model card."""
