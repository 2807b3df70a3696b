"""What `benchmarks.latency` prints is read back by rate and line."""

from __future__ import annotations

from benchmarks.latency_vs_echo import parsed

PRINTED = """\
20 requests/s                                 p50 ms  p99 ms
  bare echo                                        1.7     5.9
  request to prediction                           22.4    41.0
200 requests/s                                 p50 ms  p99 ms
  bare echo                                        2.1    12.5
  to inference.requests.v1                         6.0    20.0
"""


def test_lines_are_read_under_their_rate() -> None:
    assert parsed(PRINTED) == {
        (20.0, "bare echo"): (1.7, 5.9),
        (20.0, "request to prediction"): (22.4, 41.0),
        (200.0, "bare echo"): (2.1, 12.5),
        (200.0, "to inference.requests.v1"): (6.0, 20.0),
    }


def test_lines_before_any_rate_are_nobodys() -> None:
    assert parsed("  bare echo   1.0   2.0\n") == {}
