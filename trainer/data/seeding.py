"""Random numbers as a pure function of a named tuple, equal on every machine and with every version of numpy.

The sha256 of a tuple is the key of a Philox generator. Only the generator's raw 64-bit output is used: numpy guarantees
that the raw stream never changes, whereas the methods of ``Generator`` may.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.types import Ints

Words = npt.NDArray[np.uint64]


def hash_parts(*parts: str | int | float) -> str:
    """Returns the sha256 (hex) of a tuple. Types matter: 1 and "1" differ."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def permutation(count: int, *name: str | int) -> Ints:
    """Returns a permutation of range(count) that depends only on the name."""
    bits = np.random.Philox(key=int(hash_parts(*name)[:32], 16))
    raw = np.asarray(bits.random_raw(count), dtype=np.uint64)
    return np.argsort(raw, kind="stable").astype(np.int64)


def uniforms(columns: tuple[npt.NDArray[np.integer[Any]], ...], *name: str | int) -> npt.NDArray[np.float64]:
    """Returns one number in [0, 1) per row of the columns: a pure function of the name and of that row's values."""
    state = np.full(len(columns[0]), int(hash_parts(*name)[:16], 16), dtype=np.uint64)
    for column in columns:
        state = _splitmix(state ^ _splitmix(column.astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: Words) -> Words:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64-bit words."""
    # uint64 arithmetic wraps.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
