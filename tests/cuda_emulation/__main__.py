"""``python -m tests.cuda_emulation [library] [variant]``: compile what has changed."""

import sys

from .build import build

try:
    print(build(*(sys.argv[1:] or ["pixnorm"])))
except RuntimeError as error:
    sys.exit(str(error))
