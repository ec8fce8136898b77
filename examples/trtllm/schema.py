"""The wire facts below `proto_vendor/` -> a `Snapshot`.

The text was written by `tools/vendor.py --root examples/trtllm write-text ...` (docs/adding-a-server.md has the whole command). It is
compiled each time, which takes a tenth of a second and grpcio-tools; a service keeps the compiled bytes instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gaie_codec.proto.compile import compile_folder
from gaie_codec.snapshots import Snapshot

DIALECT: Final = "trtllm.service"
NAME: Final = "smg-0.4.28"
FOLDER: Final = Path(__file__).parent.joinpath("proto_vendor", *DIALECT.split("."), NAME)


def load() -> Snapshot:
    """The snapshot, with a pool of its own: a new one each time."""
    return Snapshot(DIALECT, NAME, [file.SerializeToString() for file in compile_folder(FOLDER).file])
