"""carla_digr: a live driving explainer by policy distillation with selective input-gradient regularisation."""

__version__ = "0.1.0"
