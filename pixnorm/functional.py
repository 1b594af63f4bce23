"""The public functions, in the manner of ``torch.nn.functional``."""

from pixnorm.ops.spn import spn

__all__ = ["spn"]
