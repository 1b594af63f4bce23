"""A plugin of pytest that tells of tests as they end: ``PIXNORM_GPU_RECORDS=FILE pytest -p benchmarks.gpu.tests``.

What fails is shown at once, and not after hundreds of others; the counts are in the records every second.
"""

import json
import os
from pathlib import Path
from time import monotonic

import pytest

LENGTH = 3000  # characters of a failure that are kept


class Teller:
    """Of the process that collects the reports.

    Args:
        records: the file to write, one JSON object a line.
    """

    def __init__(self, records: Path):
        self.file = records.open("a", buffering=1)
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.part, self.told = records.stem, 0.0

    def add(self, what: str, **record) -> None:
        self.file.write(json.dumps({"what": what, "part": self.part, **record}) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count where something is wrong with them.
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            text = report.longreprtext
            print(f"\nFAILED {report.nodeid}\n{text[-LENGTH:]}\n", flush=True)
            last = next((line for line in reversed(text.splitlines()) if line.startswith("E ")), text[-200:])
            self.add(
                "test failure", test=report.nodeid, error=last.removeprefix("E").strip()[:300], text=text[-LENGTH:]
            )
        if report.failed or monotonic() > self.told + 1:
            self._tell()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.add("test failure", test=report.nodeid, error="not collected", text=report.longreprtext[-LENGTH:])

    def pytest_sessionfinish(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self.add("tests", **self.counts)
        self.told = monotonic()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of xdist, whose workers report to this process
        config.pluginmanager.register(Teller(Path(os.environ["PIXNORM_GPU_RECORDS"])))
