"""One fault under way: where its chance comes from, and whether it has struck."""

import random
import time
from dataclasses import dataclass


@dataclass
class Strike:
    """One fault that is under way."""

    chance: random.Random
    at: float | None = None
    """When it struck, on the monotonic clock. None: it found nothing to strike, and does not count."""

    def lands(self) -> None:
        """It strikes now."""
        self.at = self.at or time.monotonic()
