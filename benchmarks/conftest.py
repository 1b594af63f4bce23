"""Laps: the contenders of a comparison take turns, so that a machine that slows down slows them all."""

import math

import pytest

LAP_SECONDS = 0.1
MAX_ROUNDS = 10
TOO_SLOW = 1.5


def pytest_configure(config):
    config.shortest = {}  # seconds of a contender's shortest round so far


@pytest.fixture
def time_lap(request, benchmark):
    """``time_lap(where, contender, prepare)``: add one lap of a contender to the results.

    ``where`` is what its record says besides; ``prepare()`` gives the function to time, and what else to record.
    The first lap is one round, after one that is not timed: ``torch.compile`` compiles in it, for each pass and grad
    mode anew. Later ones have as many rounds as fit ``LAP_SECONDS``, at least one. With
    ``rivals``, of which only the fastest will count, those that take longer than a lap should, and ``TOO_SLOW`` times
    as long as the fastest, sit out the later laps.
    """
    shortest = request.config.shortest

    def run(where, contender, prepare, rivals=()):
        key, fastest = tuple(where.values()), math.inf
        for rival in rivals:
            fastest = min(fastest, shortest.get((*key, rival), math.inf))
        before = shortest.get((*key, contender), math.inf)
        if max(LAP_SECONDS, TOO_SLOW * fastest) < before < math.inf:
            pytest.skip("much slower than the best of its kind: one lap is enough")
        function, found = prepare()
        if function is None:
            pytest.skip("nothing to time")
        rounds = max(1, min(MAX_ROUNDS, int(LAP_SECONDS / before)))
        benchmark.extra_info.update({**where, "contender": contender, **found})
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=int(rounds > 1 or before == math.inf))
        if benchmark.stats:
            shortest[(*key, contender)] = min(before, benchmark.stats.stats.min)

    return run
