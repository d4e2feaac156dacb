"""The ledger of mistakes: what is counted, what gets a log line, who is shut out and for how long."""

from __future__ import annotations

import pytest

from p2pfl.conduct import FIRST_QUARANTINE, MAX_ENTRIES, STRIKES, Conduct, Verdict

LOGGED = Verdict(log=True, suppressed=0, quarantine=0.0)
QUIET = Verdict(log=False, suppressed=0, quarantine=0.0)


def test_every_mistake_is_counted_and_one_a_second_is_logged() -> None:
    conduct = Conduct()
    assert conduct.rejected("a", "stale", 10.0) == LOGGED
    assert [conduct.rejected("a", "stale", t) for t in (10.0, 10.5, 10.999)] == [QUIET] * 3
    assert conduct.rejected("a", "stale", 11.0) == Verdict(log=True, suppressed=3, quarantine=0.0)
    assert conduct.rejected("a", "stale", 12.0) == LOGGED  # none was left out since
    assert conduct.counts == {"stale": 6}


def test_the_limit_is_per_peer_and_code() -> None:
    conduct = Conduct()
    for peer, code in (("a", "stale"), ("b", "stale"), ("a", "future")):
        assert conduct.rejected(peer, code, 0.0) == LOGGED
    assert conduct.counts == {"stale": 2, "future": 1}


@pytest.mark.parametrize("code", STRIKES)
def test_the_quarantine_comes_with_the_last_strike_and_doubles(code: str) -> None:
    conduct = Conduct()
    given = [conduct.rejected("a", code, 1e6 * i).quarantine for i in range(3 * STRIKES[code])]
    before = [0.0] * (STRIKES[code] - 1)
    assert given == [*before, 600.0, *before, 1200.0, *before, 2400.0]
    assert conduct.rejected("b", code, 0.0).quarantine == (FIRST_QUARANTINE if STRIKES[code] == 1 else 0.0)


@pytest.mark.parametrize("code", ["stale", "future", "busy", "duplicate", "bad_chunk", "gate_refused"])
def test_what_a_network_can_cause_is_never_punished(code: str) -> None:
    conduct = Conduct()
    assert not any(conduct.rejected("a", code, float(i)).quarantine for i in range(100))


def test_strikes_of_different_codes_do_not_add_up() -> None:
    conduct = Conduct()
    assert [conduct.rejected("a", "bad_value", float(i)).quarantine for i in range(2)] == [0.0, 0.0]
    assert conduct.rejected("a", "stale", 2.0).quarantine == 0.0
    assert conduct.rejected("b", "bad_value", 2.0).quarantine == 0.0
    assert conduct.rejected("a", "bad_value", 3.0).quarantine == 600.0


def test_strangers_that_invent_addresses_fill_no_memory() -> None:
    conduct = Conduct()
    for i in range(3 * MAX_ENTRIES):
        conduct.rejected(f"10.0.0.1:{i}", "gate_refused", 0.0)
    assert len(conduct._logged) == MAX_ENTRIES
    assert conduct.counts == {"gate_refused": 3 * MAX_ENTRIES}


def test_a_burst_of_mistakes_is_one_quarantine() -> None:
    conduct = Conduct()
    assert [conduct.rejected("a", "bad_signature", 0.0).quarantine for _ in range(2000)] == [600.0] + [0.0] * 1999
    assert conduct.rejected("a", "bad_signature", 600.0).quarantine == 1200.0
