"""Positions: where in a job's stream an entry stands, and every reader's cursor."""

from typing import NamedTuple

from deltafan._errors import InvalidPosition


class Position(NamedTuple):
    """`<attempt>-<seq>`: the entry's id in Redis. Positions compare in stream order.

    `attempt` is the server's clock in ms when the attempt began, above every earlier one and never issued twice;
    `seq` counts the attempt's entries 0, 1, 2 … without holes. `Position.parse(str(p)) == p`.
    """

    attempt: int
    seq: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    @classmethod
    def parse(cls, text: "str | bytes | Position") -> "Position":
        """Read what `str(position)` or Redis gave.

        Raises:
            InvalidPosition: not two non-negative integers of 64 bits joined by one hyphen.
        """
        raw = text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)
        attempt, hyphen, seq = raw.partition("-")
        if not (hyphen and attempt.isascii() and attempt.isdigit() and seq.isascii() and seq.isdigit()):
            raise InvalidPosition(raw)
        # Redis keeps both as unsigned 64 bit; the length first, since int() itself refuses what is absurdly long.
        if max(len(attempt), len(seq)) > 20 or max(int(attempt), int(seq)) >= 1 << 64:
            raise InvalidPosition(raw)
        return cls(int(attempt), int(seq))
