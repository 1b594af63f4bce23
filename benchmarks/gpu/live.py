"""Results that are there while they are made: a run may be ended at any second."""

import os
import threading
from pathlib import Path

from benchmarks.gpu.parts import told
from benchmarks.gpu.processes import FOLDER, Part
from benchmarks.gpu.section import read_records
from benchmarks.records import Records
from benchmarks.report import markdown

EVERY = 3.0  # seconds between two looks at what is new
MOST = 12 << 20  # bytes of the log: what is carried home from a lent machine is limited


class Live:
    """``<stem>.json``, ``<stem>.md`` and ``<stem>-log.txt`` in a folder, kept up to date in a thread of its own.

    Args:
        base: the folder, and the stem.
        parts: of the run, which say what became of them.
    """

    def __init__(self, base: Path, parts: list[Part]):
        self.base, self.parts = base, parts
        base.parent.mkdir(parents=True, exist_ok=True)
        self.log = Path(f"{base}-log.txt").open("w", buffering=1)  # noqa: SIM115 (as long as this lives)
        self.written: object = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._keep_up, daemon=True)

    def __enter__(self) -> "Live":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        self.refresh()
        self.log.close()

    def hear(self, line: str) -> None:
        print(line, end="", flush=True)
        if self.log.tell() < MOST:
            self.log.write(line)

    def records(self) -> Records:
        files = sorted(FOLDER.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
        entries = [entry for file in files for entry in read_records(file) if entry["what"] != "start"]
        facts = next((entry["facts"] for entry in entries if entry["what"] == "facts"), {})
        return Records(facts, told(self.parts), [entry for entry in entries if entry["what"] != "facts"])

    def refresh(self, picture: str | None = None) -> Records:
        """Write what there is, each file whole or not at all."""
        records = self.records()
        now = [(part["name"], part["state"]) for part in records.parts], len(records.entries), records.facts, picture
        if now != self.written:
            replace(self.base.with_suffix(".json"), records.text())
            replace(self.base.with_suffix(".md"), markdown(records, picture))
            self.written = now
        return records

    def _keep_up(self) -> None:
        while not self.ended.wait(EVERY):
            try:
                self.refresh()
            except Exception as error:  # the parts go on; what is wrong with the page shows in the log
                self.hear(f"the results could not be written: {type(error).__name__}: {error}\n")


def replace(path: Path, text: str) -> None:
    """At no time is there half a file."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.replace(new, path)
