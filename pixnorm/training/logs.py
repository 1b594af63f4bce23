"""What a run writes beside its checkpoints."""

import json
from pathlib import Path

from torch import Tensor

from pixnorm.training.cli import extra
from pixnorm.training.sampling import save_image

LOG, SCORES = "log.jsonl", "scores.jsonl"


class Log:
    """Numbers as lines of JSON, and for TensorBoard; images as files.

    A resumed run drops the lines of steps that it will do again, and one that was cut off. Other files are left alone.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in (LOG, SCORES)):
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                partial = path.with_suffix(
                    ".partial"
                )  # not in place: a process that is killed now would lose all lines
                partial.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
                partial.replace(path)
        self.writer = None
        if tensorboard:
            extra("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float], name: str = LOG) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def image(self, step: int, image: Tensor) -> None:
        save_image(self.folder / "samples" / f"step-{step:08d}.png", image)
        if self.writer:
            self.writer.add_image("samples", image, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut off
        return float("inf")
