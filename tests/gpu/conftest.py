"""All of this folder runs on one CUDA device, in one process, without Ray, and is skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.support.device import HAS_GPU, NO_GPU

    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not HAS_GPU, reason=NO_GPU))
