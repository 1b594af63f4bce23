"""What the commands share: errors of one line, imports of the packages that the extras install."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

Result = TypeVar("Result")


class UsageError(ValueError):
    """Input that cannot be used: missing files, labels or packages, options that do not go together.

    The message is one line for the person who typed the command. Raised before work starts wherever that is possible.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def extra(module: str, name: str = "train") -> ModuleType:
    """The module that the extra ``name`` of pixnorm installs.

    Raises:
        UsageError: it is not there; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and lacks something itself
        raise UsageError(f"{error.name} is not installed: pip install 'pixnorm[{name}]'") from error


def run(main: Callable[..., Result], *arguments: object) -> Result:
    """Call ``main(*arguments)``. One line on stderr is left of a UsageError, of a file or a disk that fails (exit
    status 2), and of Ctrl-C (130)."""
    try:
        return main(*arguments)
    except UsageError as error:
        message, status = str(error), 2
    except OSError as error:
        if error.strerror is None:  # not of the operating system
            raise
        message, status = f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    module = main.__module__
    if module == "__main__" and sys.modules[module].__spec__ is not None:  # python -m
        module = sys.modules[module].__spec__.name
    print(f"{module.replace('.', '-')}: {message}", file=sys.stderr)
    raise SystemExit(status)
