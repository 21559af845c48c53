"""The front-end's log: lines arrive in order, and a standard error that nobody reads stops nothing."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest

from kvlite.fleet import log as fleet_log

LOG = logging.getLogger("kvlite.fleet")


def test_lines_are_written_in_order_and_none_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with fleet_log.log_to_stderr():
        for number in range(100):
            LOG.info("line %d", number)
    assert [line.split(" ", 1)[1] for line in written.getvalue().splitlines()] == [f"line {n}" for n in range(100)]


def test_a_standard_error_that_nobody_reads_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            begun.set()
            free.wait()
            return len(text)

    begun, free = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", Stuck())
    monkeypatch.setattr(fleet_log, "LAST_LINES_S", 0.01)
    with fleet_log.log_to_stderr():
        LOG.info("stuck")
        assert begun.wait(60)
        for number in range(2 * fleet_log.QUEUED_MAX):
            LOG.info("line %d", number)
        handler = LOG.handlers[-1]
        assert isinstance(handler, fleet_log._Dropping)
        assert handler.queue.qsize() == fleet_log.QUEUED_MAX
    free.set()
