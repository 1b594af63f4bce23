"""Seeds of independent streams of random numbers."""

import hashlib


def seed_of(*parts: object) -> int:
    """A seed from a run's seed and what the stream is for, such as ``seed_of(0, "epoch", 3)``.

    Hashed, as the generator of the CPU uses only 32 bits of a seed, and neighbours would have streams in common.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") % 2**63
