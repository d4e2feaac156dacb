"""What a peer's mistakes cost it: counts, a limit on log lines, quarantine. Pure bookkeeping; never touches a link.

Every mistake is counted under its code. Of the same peer and code, one line a second is logged and says how many were
left out. Mistakes that no accident explains exclude their maker for ten minutes, doubling each time. What others say
of a peer excludes nobody: its own next mistake does, where otherwise it would take three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

LOG_INTERVAL = 1.0  # seconds between two log lines of one peer and code
FIRST_QUARANTINE = 600.0  # seconds
MAX_QUARANTINE = 86_400.0  # seconds: who mended his node comes back within a day without our help
MAX_ENTRIES = 1024  # peers (and codes) remembered; strangers can invent addresses without end

# How many times before quarantine. What the network or an old program can cause is counted, never punished.
STRIKES = {
    "equivocation": 1,  # two different updates signed for one round
    "bad_signature": 1,  # another's update passed off as one's own; the link's encryption rules out an accident
    "bad_value": 3,  # NaN or an absurd norm can be a training run gone wrong, once
    "bad_mass": 1,  # another weight than it announced, or than the experiment allows
    "flood": 1,  # a message without end
}

Key = TypeVar("Key")
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Verdict:
    log: bool  # whether this one gets a line
    suppressed: int  # how many got none since the last line
    quarantine: float  # seconds of exclusion; 0: none


class Conduct:
    """The ledger of everybody's mistakes, kept by one node."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # code → how many, over all peers
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}  # (peer, code) → when, and left out since
        self._strikes: dict[tuple[str, str], int] = {}
        self._quarantines: dict[str, tuple[int, float]] = {}  # peer → how many so far, and when the last one ends
        self._accusers: dict[tuple[str, str], frozenset[str]] = {}  # (peer, code) → who has accused it of that

    def rejected(self, peer: str, code: str, now: float) -> Verdict:
        """Count one mistake of `peer` at time `now` (seconds, monotonic) and say what follows from it."""
        self.counts[code] = self.counts.get(code, 0) + 1
        when, left_out = self._logged.get((peer, code), (-math.inf, 0))
        log = now - when >= LOG_INTERVAL
        _remember(self._logged, (peer, code), (now, 0) if log else (when, left_out + 1))
        return Verdict(log, left_out if log else 0, self._quarantine(peer, code, now))

    def accused(self, by: str, peer: str, code: str) -> bool:
        """Remember that `by` has shut `peer` out for this; False if it has said so before.

        Who is accused without a reason loses nothing: only what is found here is a strike.
        """
        accusers = self._accusers.get((peer, code), frozenset())
        _remember(self._accusers, (peer, code), accusers | {by})
        return by not in accusers

    def was_quarantined(self, peer: str) -> bool:
        """Whether it was ever shut out here."""
        return peer in self._quarantines

    def _quarantine(self, peer: str, code: str, now: float) -> float:
        before, until = self._quarantines.get(peer, (0, now))
        if code not in STRIKES or now < until:  # what was under way when it was shut out is the same offence
            return 0.0
        strikes = self._strikes.get((peer, code), 0) + 1
        enough = strikes >= (1 if (peer, code) in self._accusers else STRIKES[code])
        _remember(self._strikes, (peer, code), 0 if enough else strikes)
        if not enough:
            return 0.0
        seconds = min(FIRST_QUARANTINE * 2.0 ** min(before, 10), MAX_QUARANTINE)
        _remember(self._quarantines, peer, (before + 1, now + seconds))
        return seconds


def _remember(table: dict[Key, Entry], key: Key, entry: Entry) -> None:
    """Set the entry, and drop the oldest one if there are too many."""
    if len(table) >= MAX_ENTRIES and key not in table:
        del table[next(iter(table))]
    table[key] = entry
