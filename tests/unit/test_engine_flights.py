"""An abort ends the calls that began before it, and no later one."""

from __future__ import annotations

from grpo_ds.engine.flights import Flights


def test_an_abort_waits_for_those_in_flight_and_for_no_later_one() -> None:
    flights = Flights()
    assert not flights.any()
    early = flights.take_off()
    assert flights.any() and not flights.aborted(early)
    flights.abort()
    late = flights.take_off()
    assert flights.aborted(early) and not flights.aborted(late)
    assert not flights.wait_aborted(0.01)
    flights.land(early)
    assert flights.wait_aborted(0.01)
    flights.abort()
    assert flights.aborted(late) and not flights.wait_aborted(0.01)
    flights.land(late)
    assert flights.wait_aborted(0.01)


def test_an_abort_of_nothing_is_done_at_once() -> None:
    flights = Flights()
    flights.abort()
    assert flights.wait_aborted(0)
