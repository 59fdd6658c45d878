"""The faults that the suite has to notice are still there to be put in."""

from __future__ import annotations

from mutations import FAULTS, ROOT


def test_every_fault_has_one_place():
    places = {fault.what: len(fault.find(ROOT)) for fault in FAULTS}
    assert {what: count for what, count in places.items() if count != 1} == {}
