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
    """Call ``main(*arguments)``. A UsageError becomes one line on stderr and exit status 2."""
    try:
        return main(*arguments)
    except UsageError as error:
        module = main.__module__
        if module == "__main__" and sys.modules[module].__spec__ is not None:  # python -m
            module = sys.modules[module].__spec__.name
        print(f"{module.replace('.', '-')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
