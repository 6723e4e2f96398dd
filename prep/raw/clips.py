"""What the names of a folder's frames say about their order, their numbers, and the clips that they come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

_DIGITS = re.compile(r"(\d+)")
_SHORTEST_CLIP = 3
"""Mean length below which names that differ are names, and no clips."""


def natural(stem: str) -> list[tuple[int, int | str]]:
    """Sort key: `frame2` before `frame10`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in _DIGITS.split(stem) if part]


def _groups(stem: str) -> tuple[str, list[str]]:
    """What is not digits, and the groups of digits."""
    return _DIGITS.sub("#", stem), _DIGITS.findall(stem)


def _counter_column(rows: Sequence[list[str]]) -> int | None:
    """Which group of digits counts the frames: the last one that is not the same in all names."""
    varying = [i for i in range(len(rows[0])) if len({row[i] for row in rows}) > 1]
    return varying[-1] if varying else None


def counter_of(stems: Sequence[str]) -> list[int | None]:
    """The number in each name that counts frames; the last number in names of different form."""
    texts, rows = zip(*(_groups(stem) for stem in stems), strict=True)
    column = _counter_column(rows) if len(set(texts)) == 1 and rows[0] else None
    if column is None:
        return [int(row[-1]) if row else None for row in rows]
    return [int(row[column]) for row in rows]


def clip_starts(stems: Sequence[str]) -> list[int]:
    """Positions in the sorted names where another clip begins, by two signs.

    The text of the names changes (`day_0001`, `night_0001`), or the numbers before the frame counter do
    (`000000_000029`, `000001_000000`) while the counter does not continue. It continues if it follows at the usual
    distance, also by a carry, as seconds do after 59 and fractions after .999.
    """
    if len(stems) < 2:
        return []
    texts, rows = zip(*(_groups(stem) for stem in stems), strict=True)
    starts = [i for i in range(1, len(stems)) if texts[i] != texts[i - 1]]
    if (len(starts) + 1) * _SHORTEST_CLIP > len(stems):
        starts = []
    found = []
    for first, last in zip([0, *starts], [*starts, len(stems)], strict=True):
        if len(set(texts[first:last])) == 1:
            found += [first + i for i in _restarts(rows[first:last])]
    return sorted({*starts, *found})


def _restarts(rows: Sequence[list[str]]) -> list[int]:
    """Positions where the numbers before the counter change and the counter starts anew."""
    column = _counter_column(rows) if rows[0] else None
    if not column:
        return []
    changes = [i for i in range(1, len(rows)) if rows[i][:column] != rows[i - 1][:column]]
    steps = [int(b[column]) - int(a[column]) for a, b in pairwise(rows) if a[:column] == b[:column]]
    if not changes or not steps or (len(changes) + 1) * _SHORTEST_CLIP > len(rows):
        return []
    step = median(steps)

    def continues(before: str, after: str) -> bool:
        modulus = [0, 10 ** len(before)] + ([60] if len(before) == 2 else [])
        return any(abs(int(before) + step - m - int(after)) <= abs(step) / 2 for m in modulus)

    return [i for i in changes if not continues(rows[i - 1][column], rows[i][column])]
