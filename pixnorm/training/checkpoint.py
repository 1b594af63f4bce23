"""Checkpoints of runs: complete, written atomically, read without running code (``weights_only``)."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch

from pixnorm.training.cli import UsageError
from pixnorm.training.recipes import Recipe

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

FORMAT = 1  # of the file's contents
_NAME = re.compile(r"step-(\d{8,})\.pt")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in ascending order."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder."""
    steps = steps_in(folder)
    return path_of(folder, steps[-1]) if steps else None


def save(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a file so that at any moment there is either all of it or none, also after a loss of power.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the file's older version, if any, is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save(dict(contents), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of write, which does not know of names
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what interrupted writes have left."""
    for step in steps_in(folder)[: -keep or None]:
        path_of(folder, step).unlink(missing_ok=True)
    for partial in folder.glob(".step-*.pt.*"):
        partial.unlink(missing_ok=True)


def claim(folder: Path) -> IO[bytes]:
    """A lock on the folder, for as long as the file that this returns is open and the process lives.

    Two runs in one folder would remove each other's checkpoints and mix their logs.

    Raises:
        UsageError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("ab")
    if fcntl is not None:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock: workers, which outlive a killed run, inherit it
        except (BlockingIOError, PermissionError):
            file.close()
            raise UsageError(f"another process is training in {folder}") from None
        except OSError:  # a file system without locks
            pass
    return file


def load(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint.

    Raises:
        UsageError: the file is missing, or no checkpoint of a run.
    """
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:  # of unpickling and of archives, of many kinds
        raise UsageError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not {"format", "recipe", "step", "generator"} <= found.keys():
        raise UsageError(f"{path} is not a checkpoint of pixnorm-train")
    if found["format"] != FORMAT:
        raise UsageError(f"{path} has format {found['format']}, this pixnorm reads format {FORMAT}")
    return found


def recipe_of(contents: Mapping[str, Any]) -> Recipe:
    """The recipe in a checkpoint. Fields that are newer than the file have their defaults."""
    known = {field.name for field in fields(Recipe)}
    return Recipe(**{name: value for name, value in contents["recipe"].items() if name in known})


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a run differs from the one that wrote a checkpoint: "name (then, now)" for each value that both have."""
    return [f"{name} ({then[name]}, now {now[name]})" for name in now if name in then and then[name] != now[name]]


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of PyTorch's generators in this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """The inverse; a state of another kind of device has none for this one."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
