"""One file for each op; they are found, not listed."""

import pkgutil
from importlib import import_module

from benchmarks.registry import Op

_modules = [import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
_found = [value for module in _modules for value in vars(module).values() if isinstance(value, Op)]
OPS: dict[str, Op] = {op.spec.name: op for op in sorted(_found, key=lambda op: op.order)}
