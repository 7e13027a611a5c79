"""The pure parts of benchmarks/scale.py: counting, the best checkpoint interval, goodput."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from benchmarks.scale import Meter, Requests, daly_interval_s, goodput, goodput_table, young_interval_s

HOUR_S = 3600.0


def test_young_by_hand() -> None:
    assert young_interval_s(5.0, 1000.0) == pytest.approx(100.0)


def test_daly_is_young_with_higher_orders() -> None:
    # By hand: 100 · (1 + 0.05 / 3 + 0.0025 / 9) - 5.
    assert daly_interval_s(5.0, 1000.0) == pytest.approx(96.694, abs=1e-3)
    assert daly_interval_s(1e-3, 1e9) == pytest.approx(young_interval_s(1e-3, 1e9), rel=1e-5)
    assert daly_interval_s(300.0, 100.0) == 100.0


@pytest.mark.parametrize("mtbf_s", [1 * HOUR_S, 6 * HOUR_S, 100 * HOUR_S])
def test_no_other_interval_gives_more_goodput_than_dalys(mtbf_s: float) -> None:
    best = goodput(daly_interval_s(5.0, mtbf_s), 5.0, 300.0, mtbf_s)
    others = [goodput(s, 5.0, 300.0, mtbf_s) for s in (30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)]
    assert best >= max(others) - 1e-5


def test_goodput_without_failures_loses_the_stalls_alone() -> None:
    assert goodput(95.0, 5.0, 300.0, 1e12) == pytest.approx(0.95, rel=1e-3)
    assert goodput(95.0, 5.0, 0.0, 100.0) == pytest.approx(95 / (100 * math.expm1(1.0)))


def test_the_table_has_a_line_for_each_case() -> None:
    head, _, *lines = goodput_table()
    assert len(lines) == 8
    assert {line.count("|") for line in lines} == {head.count("|")}


def sent(method: str, size: int) -> SimpleNamespace:
    return SimpleNamespace(method=method, headers={"Content-Length": str(size)})


def test_requests_are_counted_by_method_with_the_bytes_of_their_bodies() -> None:
    meter = Meter()
    meter._sent(sent("PUT", 10))
    with meter.counting() as found:
        meter._sent(sent("PUT", 7))
        meter._sent(sent("GET", 0))
        for name in ("GetObject", "HeadObject"):
            reply = {"ResponseMetadata": {"HTTPHeaders": {"content-length": "100"}}}
            meter._received(reply, SimpleNamespace(name=name))
    assert found == Requests({"PUT": 1, "GET": 1, "sent": 7, "received": 100})
    assert found.count == 2
    assert str(found) == "2 (1 GET, 1 PUT)"
