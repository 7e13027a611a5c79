"""Plans of fixed made-up windows, whose hashes lie in plans.json: ``python -m tests.golden.plans`` writes them anew.

A run that was begun with one version of the code is resumed with a later one, and two hosts plan for themselves. So a
change of these hashes is a change of the order of every new run, to be made on purpose only and said in the changelog.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from trainer.data.blocks import WindowIndex, WindowMeta
from trainer.data.order.pack_order import PlanSettings, epoch_order, plan_in_order, plan_window
from trainer.data.seeding import permutation, uniforms

FILE = Path(__file__).with_name("plans.json")


def window(samples: int, longest: int) -> WindowIndex:
    """Uneven lengths from 2 to ``longest``, of three sources."""
    n = np.arange(samples, dtype=np.int64)
    length = (2 + n * n * 7919 % (longest - 1)).astype(np.int32)
    zeros = np.zeros(samples, np.int32)
    return WindowIndex(
        WindowMeta("w", [], []), (n % 3).astype(np.int32), zeros, n * 37, length, length - 1, zeros, n.astype(np.int32)
    )


SETTINGS = {
    "packed": PlanSettings("golden", 17, 512, True, (1.0, 1.0, 1.0)),
    "another seed": PlanSettings("golden", 18, 512, True, (1.0, 1.0, 1.0)),
    "weighted": PlanSettings("golden", 17, 512, True, (2.0, 0.5, 1.25)),
    "one per pack": PlanSettings("golden", 17, 512, False, (1.0, 1.0, 1.0)),
}


def digests() -> dict[str, list[str]]:
    found = {
        name: [plan_window(window(997, 512), settings, epoch, w).digest() for epoch in (0, 1) for w in (0, 5)]
        for name, settings in SETTINGS.items()
    }
    found["evaluation"] = [plan_in_order(window(997, 512), 512, packing).digest() for packing in (True, False)]
    found["order of windows"] = [_hash(epoch_order("golden", 17, epoch, 1000)) for epoch in (0, 1, 2)]
    found["permutation"] = [_hash(permutation(count, "a name", 3)) for count in (0, 1, 10_000)]
    found["uniforms"] = [_hash(uniforms((np.arange(1000),), "a name") * 2.0**53)]
    return found


def _hash(values: object) -> str:
    return hashlib.sha256(np.asarray(values).astype("<i8").tobytes()).hexdigest()


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=2) + "\n")
