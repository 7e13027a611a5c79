"""A round-robin schedule of pairs: no two pairs of a round share a rank."""

from __future__ import annotations

from collections.abc import Sequence

Meeting = tuple[int, int]


def rounds(players: Sequence[int]) -> list[list[Meeting]]:
    """Returns n - 1 rounds of n/2 pairs in which every two players meet once.

    For odd n there are n rounds, and one player is left out of each. The circle method: the first player keeps its
    place, and the others move by one place after each round.
    """
    circle: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def representatives(addresses: Sequence[str]) -> list[int]:
    """Returns the first rank on each host. On a single host: its first two ranks, which meet over loopback."""
    first: dict[str, int] = {}
    for rank, address in enumerate(addresses):
        first.setdefault(address, rank)
    return list(first.values()) if len(first) > 1 else list(range(min(2, len(addresses))))
