"""Laps: the contenders of a comparison take turns, so that a machine that slows down slows them all."""

import math

import pytest

LAP_SECONDS = 0.1
TOO_SLOW = 1.5


@pytest.fixture
def race(request, benchmark):
    """``race(contender, rivals)``: time one lap of a contender.

    The first lap is one round, from cold. Later ones have as many as fit ``LAP_SECONDS``. Of several rivals (this one
    among them), of which only the fastest will count, those slower than ``TOO_SLOW`` times that sit out later laps.
    """

    parameters = request.node.callspec.id.partition("lap")[0]
    comparison = f"{request.node.originalname.removeprefix('test_')} {parameters}".rstrip(" -")

    def run(contender, rivals=()):
        best = min((rival.seconds for rival in rivals if rival and rival.seconds), default=math.inf)
        if contender.seconds > TOO_SLOW * best:
            pytest.skip("much slower than the best of its kind: one lap is enough")
        rounds = min(10, int(LAP_SECONDS / contender.seconds)) if contender.seconds else 1
        benchmark.group = comparison
        benchmark.extra_info.update(contender.info)
        benchmark.pedantic(contender.run, rounds=max(1, rounds), warmup_rounds=int(rounds > 1))
        if benchmark.stats:
            contender.seconds = benchmark.stats.stats.min

    return run
