"""What the commands share: errors of one line, imports of the packages that extras install, devices and processes."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
import torch.distributed

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


class Processes(NamedTuple):
    """This process, the number of all, and the device that this one uses."""

    rank: int
    world: int
    device: torch.device

    def share(self, total: int) -> range:
        """Which of ``total`` things are this process's."""
        return range(self.rank, total, self.world)


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The process group of torchrun, or this process alone.

    Args:
        device: "auto" is CUDA where there is a GPU. Under torchrun each process takes the GPU of its local rank.

    Raises:
        UsageError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this PyTorch was built without CUDA
        raise UsageError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    if "RANK" not in os.environ:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)  # objects are gathered through the current device
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), chosen)
    finally:
        torch.distributed.destroy_process_group()
