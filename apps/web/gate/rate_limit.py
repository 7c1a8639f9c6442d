"""Token buckets, which bound how often something may be asked for."""

from __future__ import annotations

import time


class Bucket:
    """Token bucket per key: `burst` at once, one more every `seconds`. The number of keys is bounded."""

    def __init__(self, burst: int, seconds: float, keys: int = 20_000) -> None:
        self._burst, self._seconds, self._keys = burst, seconds, keys
        self._level: dict[str, tuple[float, float]] = {}  # (what is left, when)

    def take(self, key: str, count: int = 1) -> float:
        """Take `count` tokens; return the seconds to wait, 0.0 if they were granted."""
        now = time.monotonic()
        left, at = self._level.pop(key, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) / self._seconds)
        if left >= min(count, self._burst):
            self._level[key] = (left - count, now)
            wait = 0.0
        else:
            self._level[key] = (left, now)
            wait = (min(count, self._burst) - left) * self._seconds
        while len(self._level) > self._keys:
            del self._level[next(iter(self._level))]  # the least recently used
        return wait

    def forget(self, key: str) -> None:
        """Fill a key's bucket again."""
        self._level.pop(key, None)
