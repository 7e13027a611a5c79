"""The start of an attempt's servers has an end, also if one of them hangs."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from launcher.attempt import AttemptFailed
from launcher.capacity import Node
from launcher.raytrain.rollout_servers import READY_S, PlacedServer, _ready


def test_a_server_that_never_gets_ready_fails_the_attempt_by_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def nothing_is_done(left: list[Any], *, timeout: float) -> tuple[list[Any], list[Any]]:
        waited.append(timeout)
        return [], left

    monkeypatch.setattr(ray, "wait", nothing_is_done)
    node = Node("1", "gpu-7", "10.0.0.7", True, {})
    with pytest.raises(AttemptFailed, match=r"the vLLM server on gpu-7 .* was not ready within 2 hours") as found:
        _ready([PlacedServer(None, "pending", node)])
    assert found.value.starting
    assert waited == [pytest.approx(READY_S, abs=5)]
