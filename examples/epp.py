"""An endpoint picker for Envoy with a picker of its own: long prompts go to servers that are kept for them.

    gaie-codec sim --listen 127.0.0.1:50051 &
    gaie-codec sim --listen 127.0.0.1:50052 &
    python examples/epp.py 127.0.0.1:9002 --short 127.0.0.1:50051 --long 127.0.0.1:50052 &
    gaie-codec envoy-config --listen 127.0.0.1:8080 --ext-proc 127.0.0.1:9002 > envoy.yaml && envoy -c envoy.yaml

Clients speak OpenAI HTTP to Envoy, or the model servers' gRPC. Everything but the choice is gaie-codec's: transcoding, health, deadlines.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Sequence

from gaie_codec import InferenceRequest
from gaie_codec.ext_proc import Candidate, Picker, RequestShedError
from gaie_codec.ext_proc.app import run_ext_proc

LONG_TOKENS = 1000
MAX_QUEUED = 64


def by_length(long_addresses: frozenset[str]) -> Picker:
    """Whoever has the fewest requests, of the servers for prompts of that length. A full queue is for nobody."""

    def pick(request: InferenceRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        is_long = len(request.prompt_token_ids) >= LONG_TOKENS
        right = [one for one in candidates if (one.address in long_addresses) == is_long] or candidates
        ranked = sorted(right, key=lambda one: one.in_flight + one.waiting)
        if ranked[0].waiting >= MAX_QUEUED:
            raise RequestShedError("every model server has a full queue")
        return ranked

    return pick


def main() -> None:
    """Read the arguments, and serve until a signal."""
    parser = argparse.ArgumentParser(description="An endpoint picker that keeps servers for long prompts.")
    parser.add_argument("listen", metavar="HOST:PORT")
    parser.add_argument("--short", action="append", default=[], metavar="IP:PORT")
    parser.add_argument("--long", action="append", default=[], metavar="IP:PORT")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO")
    picker = by_length(frozenset(arguments.long))
    asyncio.run(run_ext_proc(listen=arguments.listen, endpoints=[*arguments.short, *arguments.long], picker=picker))


if __name__ == "__main__":
    main()
