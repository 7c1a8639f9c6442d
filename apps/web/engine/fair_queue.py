"""A bounded queue in which people take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Queue that serves people round-robin, and each person's items in order. Bounded in all and per person."""

    def __init__(self, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many items wait."""
        return sum(len(line) for line in self._lines.values())

    def full_for(self, who: str) -> str | None:
        """Return why no more is accepted from this person now; None if it is."""
        if len(self._lines.get(who, ())) >= self._most_each:
            return f"{self._most_each} of your images are waiting already"
        if len(self) >= self._most:
            return f"{self._most} images are waiting already"
        return None

    def put(self, who: str, item: T, *, again: bool = False) -> None:
        """Append to the person's line; with `again` put at its head, whatever the bounds."""
        line = self._lines.setdefault(who, deque())
        if again:
            line.appendleft(item)
        else:
            line.append(item)

    def take(self) -> T | None:
        """Remove and return the next item, None if there is none; its owner goes behind all others who wait."""
        if not self._lines:
            return None
        who, line = next(iter(self._lines.items()))
        item = line.popleft()
        if line:
            self._lines.move_to_end(who)
        else:
            del self._lines[who]
        return item

    def discard(self, who: str, item: T) -> bool:
        """Remove an item; return whether it was there."""
        line = self._lines.get(who)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[who]
        return True
