"""Invariant tested: FrameDecoder raises only CodecErrors, keeps no more than one frame, and gives the same payloads in any partition.

python fuzz/fuzz_framing.py --seconds 60 --seed 1
"""

from __future__ import annotations

import sys

from harness import ACCEPTED, Cut, run

from gaie_codec import CodecError, FrameDecoder, encode_frame

LIMIT = 4096
CORPUS = [
    b"",
    encode_frame(b""),
    encode_frame(b"hello") * 3,
    encode_frame(bytes(LIMIT)),
    encode_frame(b"hello " * 20, encoding="gzip") + encode_frame(b"plain"),
    encode_frame(bytes(LIMIT), encoding="gzip"),
    encode_frame(bytes(LIMIT + 1), encoding="gzip"),
]


def target(data: bytes, cut: Cut) -> tuple[str, list[bytes]]:
    """The outcome, and the payloads before it."""
    decoder = FrameDecoder(max_message_bytes=LIMIT, encoding="gzip")
    payloads: list[bytes] = []
    try:
        for piece in cut(data):
            for payload in decoder.receive_data(piece):
                assert len(payload) <= LIMIT
                payloads.append(payload)
            assert len(decoder._buffer) < 5 + LIMIT
        decoder.receive_eof()
    except CodecError as error:
        str(error)
        return type(error).__name__, payloads
    return ACCEPTED, payloads


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
