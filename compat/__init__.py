"""The oldest and the newest supported versions of Python, PyTorch and Triton.

``python -m compat`` (`make compat`) tests both and writes ``compat/result.json``; `make test` warns if that is from
other sources. Other tools build on a stack: the GPU bundle uses the oldest.
"""

from compat.stacks import OLDEST, RESULT, STACKS, Stack, fingerprint, staleness

__all__ = ["OLDEST", "RESULT", "STACKS", "Stack", "fingerprint", "staleness"]
