"""Which ranks meet when: a round-robin tournament, so that the pairs of a round do not share a rank."""

from __future__ import annotations

from collections.abc import Sequence

Meeting = tuple[int, int]


def rounds(players: Sequence[int]) -> list[list[Meeting]]:
    """Every two meet once, in n - 1 rounds of n/2 pairs (n even; one is left out of each round otherwise).

    The circle method: one stands still, the others move on by a place after each round."""
    circle: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def representatives(addresses: Sequence[str]) -> list[int]:
    """The first rank on each host; when there is one host only, its first two ranks, which meet over loopback."""
    first: dict[str, int] = {}
    for rank, address in enumerate(addresses):
        first.setdefault(address, rank)
    return list(first.values()) if len(first) > 1 else list(range(min(2, len(addresses))))
