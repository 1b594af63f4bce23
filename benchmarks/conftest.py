"""Laps: the contenders of a comparison take turns, so that a machine that slows down slows them all."""

import math

import pytest

LAP_SECONDS = 0.1
MAX_ROUNDS = 10
TOO_SLOW = 1.5


@pytest.fixture
def time_lap(request, benchmark):
    """``time_lap(contender, rivals)``: add one lap of a contender to the results.

    The first lap is one round, from cold. Later ones have as many rounds as fit ``LAP_SECONDS``, at least one. Where
    only the fastest of some rivals will count, those that take longer than a lap should, and ``TOO_SLOW`` times as long
    as the fastest, sit out the later laps.
    """

    def run(contender, rivals=()):
        fastest = min((rival.seconds for rival in rivals), default=math.inf)
        if contender.seconds < math.inf and contender.seconds > max(LAP_SECONDS, TOO_SLOW * fastest):
            pytest.skip("much slower than the best of its kind: one lap is enough")
        rounds = max(1, min(MAX_ROUNDS, int(LAP_SECONDS / contender.seconds)))
        benchmark.group = f"{test} {parameters}".rstrip(" -")
        benchmark.extra_info.update(contender.info)
        benchmark.pedantic(contender.run, rounds=rounds, warmup_rounds=int(rounds > 1))
        if benchmark.stats:
            contender.seconds = min(contender.seconds, benchmark.stats.stats.min)

    test = request.node.originalname.removeprefix("test_")
    parameters = request.node.callspec.id.partition("lap")[0]
    return run
