"""So many of many, evenly spread."""


def evenly_spaced(n: int, limit: int | None) -> list[int]:
    """At most `limit` of n positions, evenly spread: the first photos of a sorted list are of one class."""
    count = min(n, limit or n)
    return [i * n // count for i in range(count)]
