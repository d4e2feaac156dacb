"""What the owner of a node allows, whatever an experiment asks for: who may receive, which models, when, and how much.

A policy only ever takes away. It is the node's own affair: the others neither see nor sign it, and what all members
agree on stays the experiment's. Everything here is decided from what is passed in; nothing looks at a clock or a file
but `read_policy`. An example, each line of which may be left out:

    members = ["birchwood", "K4QD-7M2X-AZ3B-QW5T"]  # names, or fingerprints of cards, that may receive anything
    schemas = ["9c1e…"]           # models that may be shared, by the digest that `p2pfl inspect` prints
    max_rounds = 50
    max_epsilon = 3.0             # of differential privacy: who has spent it trains no more, and goes on mixing
    hours = "20:00-06:00"         # local time in which rounds may be sent
    max_bytes = "2 GB"            # that one run may send, resumed or not

    [privacy]                     # what this node's own training keeps to, where the experiment asks for less
    dp = "example"
    noise = 1.0                   # at least; or epsilon, at most
    clip = 1.0                    # at most
    sums = "masked"               # the experiment must have them: no node can mask a sum alone
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime, time
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from p2pfl.config import Experiment, PrivacySection, Section, explain, read_toml, validate
from p2pfl.identity import Member, Roster
from p2pfl.messages import BadInput

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # powers of 1000, as sizes are printed elsewhere
SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kKMGT]?B)")
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d) *- *([01]\d|2[0-3]):([0-5]\d)")
DIGEST = re.compile(r"[0-9a-f]{64}")
FINGERPRINT = re.compile(r"[A-Z2-7]{4}(-[A-Z2-7]{4}){3}")  # a member who calls itself so is meant by no name


class PrivacyFloor(Section):
    """The least privacy of this node's own training; the words are those of the experiment's [privacy]."""

    dp: Literal["example", "update"] | None = None
    noise: float | None = Field(None, gt=0)  # at least
    epsilon: float | None = Field(None, gt=0)  # at most, over all rounds
    delta: float | None = Field(None, gt=0, lt=1)  # at most
    clip: float | None = Field(None, gt=0)  # at most
    sums: Literal["masked"] | None = None


class Policy(Section):
    """What is allowed. One without a line allows everything."""

    members: tuple[str, ...] | None = None  # names or fingerprints; None: everybody in the roster
    schemas: tuple[str, ...] | None = None  # SHA-256 in hex; None: any model
    max_rounds: int | None = Field(None, ge=1)
    max_epsilon: float | None = Field(None, gt=0)
    hours: str | None = None  # "20:00-06:00", local time; the end is no longer in it
    max_bytes: int | None = Field(None, ge=1)  # that one run may send; in a file also "2 GB"
    privacy: PrivacyFloor = PrivacyFloor()

    @field_validator("members", "schemas")
    @classmethod
    def _somebody(cls, words: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if words == ():
            raise ValueError("an empty list allows nothing at all: name one, or remove the line")
        return words

    @field_validator("schemas")
    @classmethod
    def _digests(cls, digests: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for digest in digests or ():
            if not DIGEST.fullmatch(digest):
                raise ValueError(f"{digest[:70]!r} is no digest: copy the 64 characters that `p2pfl inspect` prints")
        return digests

    @field_validator("hours")
    @classmethod
    def _window(cls, hours: str | None) -> str | None:
        found = HOURS.fullmatch(hours) if hours is not None else None
        if hours is not None and (found is None or found.group(1, 2) == found.group(3, 4)):
            raise ValueError('write them as "20:00-06:00", from when until when, local time')
        return hours

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _bytes(cls, size: object) -> object:
        if not isinstance(size, str):
            return size
        found = SIZE.fullmatch(size)
        if found is None:
            raise ValueError('write a number of bytes, or "200 kB", "50 MB", "2 GB"')
        return int(float(found[1]) * UNITS[found[2].upper()])

    @model_validator(mode="after")
    def _enough_said(self) -> Policy:
        floor = self.privacy
        if floor.dp is None and (floor.noise, floor.epsilon, floor.delta, floor.clip) != (None, None, None, None):
            raise ValueError("privacy.noise, epsilon, delta and clip belong to privacy.dp: add it, or remove them")
        if floor.dp is not None and (floor.noise, floor.epsilon, self.max_epsilon) == (None, None, None):
            raise ValueError(f"privacy.dp = {floor.dp!r} needs to know how much noise: add privacy.noise or epsilon")
        return self

    # -- Who may receive -------------------------------------------------------------------------------------------

    def admits(self, member: Member) -> bool:
        """Whether this member may receive anything."""
        shown = member.card.fingerprint
        return self.members is None or any(
            word == shown if FINGERPRINT.fullmatch(word) else word == member.name for word in self.members
        )

    def admitted(self, roster: Roster, me: str) -> Roster:
        """The roster without those who may not receive; `me` stays. Nobody else gets past a handshake with it."""
        return Roster(tuple(member for member in roster.members if member.name == me or self.admits(member)))

    # -- What may be trained -----------------------------------------------------------------------------------------

    def objections(self, experiment: Experiment, schema: str, admitted: Collection[str]) -> list[str]:
        """Why this node may not take part, each in one line with what mends it; none: it may.

        `schema`: the digest of the model's tensors in hex; `admitted`: the names of the roster's members who may
        receive, and the node's own.
        """
        found = []
        section, privacy, floor = experiment.topology, experiment.privacy, self.privacy
        # Of a graph over names all are in it: who is no neighbour now becomes one when others die.
        left_out = [name for name in section.names if name not in admitted] if section.is_drawn else []
        if left_out and self.members is not None:
            found.append(
                f"members leaves out {', '.join(left_out[:3])}{' …' if len(left_out) > 3 else ''}, of the experiment's "
                "graph: add them, or ask for a graph without them"
            )
        if self.schemas is not None and schema not in self.schemas:
            found.append(
                f"schemas does not list this model ({schema}): add its digest, once `p2pfl inspect` has shown "
                "what it shares"
            )
        if self.max_rounds is not None and experiment.train.rounds > self.max_rounds:
            found.append(
                f"max_rounds = {self.max_rounds}, and the experiment has {experiment.train.rounds}: set train.rounds, "
                "as all members must, or raise max_rounds"
            )
        if self.max_epsilon is not None and (privacy.dp, floor.dp) == ("none", None):
            found.append(
                f"max_epsilon = {self.max_epsilon:g}, and without differential privacy nothing bounds it: add "
                '[privacy] dp = "example" to the policy, or privacy.dp to the experiment'
            )
        if floor.dp is not None and privacy.dp not in ("none", floor.dp):
            found.append(
                f"privacy.dp = {floor.dp!r}, and the experiment has {privacy.dp!r}, which hides something else: "
                "make them the same"
            )
        if floor.sums is not None and privacy.sums != floor.sums:
            found.append(
                f"privacy.sums = {floor.sums!r}, and the experiment has {privacy.sums!r}: no node can mask a sum "
                "alone, so set it in the experiment, as all members must"
            )
        if privacy.dp == "none" and floor.dp is not None:
            found += _contradictions(experiment, self.stricter(privacy))
        return found

    def stricter(self, privacy: PrivacySection) -> PrivacySection:
        """What this node's own training keeps to: of each number of the experiment and of the policy the stricter one.

        The greater noise, the smaller epsilon, delta, clip and max_epsilon; differential privacy where either has it.
        Where both noise and epsilon stand in it, both hold: the noise is the greater of the two.
        """
        floor = self.privacy
        dp = floor.dp if privacy.dp == "none" and floor.dp is not None else privacy.dp
        if dp == "none":
            return privacy
        epsilon = _least(privacy.epsilon, floor.epsilon)
        if epsilon is not None or (privacy.noise, floor.noise) == (None, None):
            epsilon = _least(epsilon, self.max_epsilon)  # more noise at once, rather than an early end
        return privacy.model_copy(
            update={
                "dp": dp,
                "noise": max((noise for noise in (privacy.noise, floor.noise) if noise is not None), default=None),
                "epsilon": epsilon,
                "delta": min(privacy.delta, floor.delta or privacy.delta),
                "clip": min(privacy.clip, floor.clip or privacy.clip),
                "max_epsilon": _least(privacy.max_epsilon, self.max_epsilon),
            }
        )

    # -- When, and how much ------------------------------------------------------------------------------------------

    def forbids(self, now: datetime, sent: int, following: int) -> str:
        """Why the next round may not be sent, and what mends it; empty: it may.

        `now`: local time; `sent`: bytes that the run has sent so far; `following`: those that the round will
        take. The signs of life while it waits for others, some tens of bytes a second, come on top.
        """
        if self.hours is not None and not self._is_open(now.time()):
            return f"hours = {self.hours!r}, and it is {now:%H:%M}: start it between those hours"
        if self.max_bytes is not None and sent + following > self.max_bytes:
            return (
                f"max_bytes = {self.max_bytes:,}, and with its next round this run would have sent "
                f"{sent + following:,}: raise max_bytes"
            )
        return ""

    def _is_open(self, now: time) -> bool:
        found = HOURS.fullmatch(self.hours or "")
        assert found is not None
        start, end = time(int(found[1]), int(found[2])), time(int(found[3]), int(found[4]))
        return start <= now < end if start < end else now >= start or now < end


EVERYTHING: Final = Policy()


class Allowance:
    """What one run may still send. A round is expected to take what was planned, or what the last one took if more."""

    def __init__(self, policy: Policy, before: int, planned: int) -> None:
        """`before`: bytes that this run has sent in earlier processes; `planned`: of a round's updates."""
        self.policy = policy
        self._before, self._planned, self._last = before, planned, 0

    def forbids(self, now: datetime, sent: int) -> str:
        """Why the next round may not be sent; empty: it may. To be asked once a round; `sent`: by this process."""
        following, self._last = max(self._planned, sent - self._last), sent
        return self.policy.forbids(now, self._before + sent, following)


def _contradictions(experiment: Experiment, privacy: PrivacySection) -> list[str]:
    """Why the experiment cannot hold with this privacy in place of its own; none: it can."""
    wanted = privacy.model_dump(exclude_none=True, exclude=None if privacy.epsilon is None else {"noise"})
    tree = experiment.model_dump(mode="json", exclude_none=True) | {"privacy": wanted}
    try:
        validate(tree, "with it")
    except BadInput as error:
        return [str(error)]
    return []


def _least(*limits: float | None) -> float | None:
    """The smallest of those that are given."""
    return min((limit for limit in limits if limit is not None), default=None)


def read_policy(path: Path) -> Policy:
    """The policy in this file; BadInput in one line, with a suggestion for an unknown key."""
    try:
        return Policy.model_validate(read_toml(path))
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Policy)}") from None
