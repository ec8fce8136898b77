"""What the fuzz targets share: a mutator with a fixed seed, a loop against the clock, and the verdict.

A target takes one input and a way to cut it, and returns "accepted" or the name of a CodecError. Anything that it raises is a crash,
and so is an outcome that depends on the cut.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence

Cut = Callable[[bytes], list[bytes]]
Target = Callable[[bytes, Cut], object]

ACCEPTED = "accepted"


def whole(data: bytes) -> list[bytes]:
    """Not cut at all."""
    return [data]


def single_bytes(data: bytes) -> list[bytes]:
    """Cut between any two bytes."""
    return [data[place : place + 1] for place in range(len(data))]


def mutate(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One input: an entry of the corpus with a few faults, now and then two of them joined, or nothing but noise."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(64))
    data = bytearray(rng.choice(corpus))
    if rng.random() < 0.2:
        other = rng.choice(corpus)
        data[rng.randint(0, len(data)) :] = other[rng.randint(0, len(other)) :]
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        place = rng.randint(0, len(data))
        match rng.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(data):
                data[place] = rng.choice(b'\x00\x01\x7f\x80\xff"{}[],:0919eE-.\\ud')
            case 2:
                del data[place : place + rng.randint(1, 8)]
            case 3:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
            case 4:
                end = rng.randint(place, min(len(data), place + 32))
                data[place:place] = data[place:end] * rng.choice((1, 1, 2, 50))
            case 5:
                data[place:place] = rng.choice((b"1e999", b"9" * 400, b"null", b"[" * 900, b'"\\ud800"', b"\xff\xff\xff\xff\x0f", b"-0.0"))
            case 6:
                del data[place:]
    return bytes(data)


def run(invariant: str | None, target: Target, corpus: Sequence[bytes], arguments: Sequence[str] | None = None) -> int:
    """Feed mutated inputs to `target` for `--seconds`, each whole and cut twice. The exit status: 1 after a crash."""
    parser = argparse.ArgumentParser(description=invariant, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", type=bytes.fromhex, help="one input, in hex, instead of mutated ones")
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    deadline = time.monotonic() + options.seconds
    pending = [options.input] if options.input is not None else [*corpus]
    while pending or (options.input is None and time.monotonic() < deadline):
        data = pending.pop() if pending else mutate(rng, corpus)
        try:
            outcomes[_outcome(target, data, rng)] += 1
        except Exception:
            traceback.print_exc()
            sys.stdout.write(f"crash; reproduce with --input {data.hex()}\n")
            outcomes["crash"] += 1
            break
    accepted, crashes = outcomes.pop(ACCEPTED, 0), outcomes.pop("crash", 0)
    refused = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
    sys.stdout.write(f"accepted {accepted}; CodecError {outcomes.total()} ({refused}); crash {crashes}\n")
    return 1 if crashes else 0


def _outcome(target: Target, data: bytes, rng: random.Random) -> str:
    cuts = sorted(rng.randint(0, len(data)) for _ in range(3))

    def split(raw: bytes) -> list[bytes]:
        ends = [min(cut, len(raw)) for cut in cuts]
        return [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)]

    seen = [target(data, cut) for cut in (whole, split, single_bytes)]
    assert seen[0] == seen[1] == seen[2], f"the outcome depends on how the input is cut: {seen}"
    outcome = seen[0]
    return outcome if isinstance(outcome, str) else str(outcome[0])  # type: ignore[index]
