"""The versions of Python, PyTorch and Triton that pixnorm claims to work with, from end to end.

``python -m compat`` (`make compat`) tries both ends and leaves ``compat/result.json``; `make test` warns where that is
of other sources than these. Other tools build on a stack, as the GPU's bundle does on the oldest one.
"""

from compat.stacks import OLDEST, RESULT, STACKS, Stack, fingerprint, staleness

__all__ = ["OLDEST", "RESULT", "STACKS", "Stack", "fingerprint", "staleness"]
