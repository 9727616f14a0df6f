"""Score Distillation via Inversion on fused kernels."""

__version__ = "0.1.0"
