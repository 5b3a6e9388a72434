"""The PyTorch engine: needs torch (2.8 or newer) and nothing else."""

from gradreg.extras import needing

with needing("gradreg.torch", "torch"):
    from gradreg.torch.metrics import Metrics
    from gradreg.torch.regularizer import GradientRegularizer

__all__ = ["GradientRegularizer", "Metrics"]
