"""Does an EPP keep to what data planes rely on? Streams of ext_proc, driven or recorded -> every rule: passed, failed by this message, or
not to be seen.

    transcript = await drive(Options(ext_proc="127.0.0.1:9002", endpoints=("10.0.0.1:8000",)))
    outcomes = check(transcript, pool=("10.0.0.1:8000",))

`transcript`  what was said, and its JSON lines
`exchange`    a stream of it, as request and response
`rules`       the table: P1 to P14, E1 to E5, G1 to G20
`scripts`     what is played
`answers`     what the model server behind says to it
`driver`      plays it (needs grpcio; the rest does not)
"""

from ._rule import Rule, RuleOutcome
from .exchange import Fault
from .rules import RULES, check
from .transcript import HealthAnswer, Line, StreamEnd, StreamStart, Transcript, decode_transcript, encode_line

__all__ = [
    "RULES",
    "Fault",
    "HealthAnswer",
    "Line",
    "Rule",
    "RuleOutcome",
    "StreamEnd",
    "StreamStart",
    "Transcript",
    "check",
    "decode_transcript",
    "encode_line",
]
