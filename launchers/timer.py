"""How long the phases of a cell take."""

import time


class Timer:
    """Seconds of the phases of a cell."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ends(self, phase: str, spent: float | None = None) -> None:
        """The time since the last call was spent on `phase`; or `spent`, where an earlier cell did the work."""
        now = time.perf_counter()
        self.seconds[phase], self._last = round(now - self._last if spent is None else spent, 3), now
