"""Values and texts that nobody writes by mistake alone: what readers of others' files have to end in a sentence for."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

LAUGHS = "a0: &a0 ha\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
"""10⁹ leaves."""
CHAIN = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))
"""Deep only once its aliases are expanded."""
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
YAML_BOMBS = {
    "laughs": LAUGHS,
    "chain": CHAIN,
    "merges": MERGES,
    "deep lists": "a: " + "[" * 20000,
    "deep mappings": "a: " + "{a: " * 20000,
    "deep blocks": "- " * 20000,
    "itself": "a: &a [*a]\n",
    "a long number": "a: " + "9" * 5000,
}
JSON_BOMBS = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep and whole": "[" * 500 + "]" * 500,
    "a long number": "9" * 5000,
    "not finite": "NaN",
    "too large": "1e999",
    "half a pair": '"\\ud800"',
    "twice": '{"a": 1, "a": 2}',
    "two values": "1 2",
    "empty": "",
    "nul": "\0",
}
BYTES = {"not utf-8": b"\xff\xfe\x00", "utf-16": "{}".encode("utf-16"), "a mark alone": b"\xef\xbb\xbf"}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["", "\0", "../x", "9" * 400, -1, 2**63, 1e308, 10**99, True, 0])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=6
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of the value and of everything inside it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inside for found in paths_of(child, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with ``new`` at the path."""
    if not path:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return whole


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy without what stands at the path."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return whole


def changed(value: Any) -> st.SearchStrategy[Any]:
    """``value`` with any JSON value in the place of any part of it, or without that part."""
    paths = paths_of(value)
    mistyped = st.builds(lambda path, new: put(value, path, new), st.sampled_from(paths), VALUES)
    return mistyped | st.sampled_from([without(value, path) for path in paths if path])


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
