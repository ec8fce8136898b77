"""Stop strings in a stream of text pieces: which text may go out, and where a stop string ends.

One Knuth-Morris-Pratt state per stop string, because the state is at once the match and the number of characters to hold back, and
one-character pieces cost the same as one long piece. A failure table grows only as far as the text got into its stop string, so a
megabyte of stop string that never begins costs nothing. All results are as if the text had come one character at a time.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Literal

from .._errors import UsageError


class StopMatcher:
    """Finds the stop string that ends first; of two that end together, the longer one.

    `holdback` decides what waits: "prefix" the longest end of the text that a stop string begins with, "window" always one
    character less than the longest stop string, which is how vLLM's own server cuts its chunks. Raises UsageError for no stop
    strings, or an empty one.
    """

    __slots__ = ("_held_length", "_pieces", "_scanners", "_skip", "_starts", "_waiting", "_window", "match_offset", "matched")

    def __init__(self, stops: Sequence[str], *, holdback: Literal["prefix", "window"] = "prefix") -> None:
        if not stops or not all(stops):
            raise UsageError("a StopMatcher needs at least one stop string, none of them empty")
        if holdback not in ("prefix", "window"):
            raise UsageError(f"holdback is {holdback!r}, not 'prefix' or 'window'")
        # Longest first, so that the first of several with the same end is the longest.
        self._scanners = [_Scanner(stop) for stop in sorted(set(stops), key=lambda stop: (-len(stop), stop))]
        self._starts = frozenset(stop[0] for stop in stops)
        self._window = max(map(len, stops)) - 1 if holdback == "window" else 0
        self._pieces: deque[str] = deque()  # held text; the first `_skip` characters of the first piece are already out
        self._skip = 0
        self._held_length = 0
        self._waiting = 0  # characters that a stop string may begin with; just before its last character once one is found
        self.matched: str | None = None  # the stop string found
        self.match_offset = 0  # where in `held`, or in what `flush` then returns, it begins

    @property
    def held(self) -> str:
        """Text kept back. After a match: all text from where it had to be held on, with what was fed later."""
        return "".join(self._pieces)[self._skip :]

    def feed(self, text: str, *, check: bool = True) -> str:
        """Text that is now safe to emit.

        `check=False` passes over stop strings that end in this text (vLLM below min_tokens); one that begins here may still end
        in text that is checked.
        """
        if self.matched is not None:
            return self._keep(text)
        end, stop = len(text), None
        if self._waiting or not self._starts.isdisjoint(text):
            end, stop = self._scan(text, check=check)
        if not (self._held_length or self._waiting or self._window or stop):
            return text
        seen = self._held_length + (end - 1 if stop else end)  # a match is judged by what was held before its last character
        waiting = min(self._window, seen) if self._window else self._waiting
        if stop:
            self.matched, self.match_offset = stop, waiting + 1 - len(stop)
        self._keep(text)
        return self._release(seen - waiting)

    def flush(self) -> str:
        """Release the held text. No stop string reaches across a flush."""
        text = self.held
        self._pieces.clear()
        self._skip = self._held_length = self._waiting = 0
        for scanner in self._scanners:
            scanner.state = 0
        return text

    def _scan(self, text: str, *, check: bool) -> tuple[int, str | None]:
        """Advance every scanner; the end and the stop string of the first match, or the end of the text and None."""
        end, stop = len(text), None
        for scanner in self._scanners:
            # Only an earlier end can win: the scanners are sorted for ties, and the limit is the best end so far.
            found = scanner.scan(text, end if stop is None else end - 1, check=check)
            if found:
                end, stop = found, scanner.stop
        if stop is None:
            self._waiting = max([scanner.state for scanner in self._scanners])
        else:
            self._waiting = max([scanner.state_before(text, end - 1) for scanner in self._scanners])
        return end, stop

    def _keep(self, text: str) -> str:
        if text:
            self._pieces.append(text)
            self._held_length += len(text)
        return ""

    def _release(self, count: int) -> str:
        """Take `count` characters from the front, in time linear in them: the rest is never copied."""
        self._held_length -= count
        released = []
        pieces, skip = self._pieces, self._skip
        while count:
            piece = pieces[0]
            available = len(piece) - skip
            if count < available:
                released.append(piece[skip : skip + count])
                skip += count
                break
            released.append(piece[skip:] if skip else piece)
            pieces.popleft()
            skip = 0
            count -= available
        self._skip = skip
        return released[0] if len(released) == 1 else "".join(released)


class _Scanner:
    """One stop string and how much of it the text ends with."""

    __slots__ = ("_before", "_fallbacks", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0  # characters of `stop` that the text ends with, always fewer than all
        self._before = 0  # the state before the last `scan`
        self._fallbacks = array("I", [0])  # [k]: the state that remains when the character after k+1 matched ones differs

    def scan(self, text: str, limit: int, *, check: bool) -> int:
        """Advance over `text[:limit]`; where the stop string ends, or 0. It goes no further than that end."""
        stop, state = self.stop, self.state
        self._before = state
        position = 0
        while position < limit:
            if not state:
                position = text.find(stop[0], position, limit)
                if position < 0:
                    break
            char = text[position]
            while state and stop[state] != char:
                state = self._fallback(state)
            if stop[state] == char:
                state += 1
            position += 1
            if state == len(stop):
                state = self._fallback(state)
                if check:
                    self.state = state
                    return position
        self.state = state
        return 0

    def state_before(self, text: str, limit: int) -> int:
        """The state after `text[:limit]` of the last scan's text; no match ends there."""
        self.state = self._before
        self.scan(text, limit, check=False)
        return self.state

    def _fallback(self, state: int) -> int:
        """The longest proper prefix of `stop` that `stop[:state]` ends with."""
        table, stop = self._fallbacks, self.stop
        while len(table) < state:
            char, length = stop[len(table)], table[-1]
            while length and stop[length] != char:
                length = table[length - 1]
            table.append(length + (stop[length] == char))
        return table[state - 1]
