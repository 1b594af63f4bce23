"""The processes of a run, as torchrun starts them; without torchrun there is one."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pixnorm.training.cli import UsageError


@dataclass(frozen=True)
class Processes:
    """Attributes:
    rank, world: of this process, and how many there are.
    device: of this process.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list[object]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        found: list[object] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def start(device: str = "auto") -> Processes:
    """Join the processes of torchrun, if it started this one.

    Args:
        device: "auto" (the GPU of the process's local rank, else the CPU), or the name of one.

    Raises:
        UsageError: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", "0")) if found.index is None else found.index
            found = torch.device("cuda", index)
            torch.cuda.set_device(found)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    rank = dist.get_rank() if world > 1 else 0
    return Processes(rank, world, found)


def stop(processes: Processes) -> None:
    """Leave the group of processes."""
    if processes.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
