"""Everything that decoding some bytes leads to, for comparing decoders with what they should do."""

from collections.abc import Iterable, Mapping
from typing import Any

from deltafan._events import Event
from deltafan._fold import Generation, fold
from deltafan._position import Position
from deltafan_worker._decoder import Decoder
from deltafan_worker._upstream_error import UpstreamError


class Outcome:
    """The whole of it: deltas, how it ended, the error, usage and id.

    Read as a worker reads it, or with every event parsed.
    """

    def __init__(self, decoder: Decoder, *pieces: bytes, parses_all: bool = False) -> None:
        self.decoder = decoder
        self.deltas: list[tuple[str, bytes]] = []
        self.error: UpstreamError | None = None
        self.finish: str | None = None
        try:
            for piece in pieces:
                if not parses_all and (deltas := self.decoder.read_alike(piece)):
                    self.deltas += deltas
                    continue
                self.decoder.feed(piece)
                self._drain()
            self.decoder.end()
            self._drain()
            self.finish = self.decoder.completion().finish_reason
        except UpstreamError as error:
            self.error = error

    @classmethod
    def of_whole(cls, decoder: Decoder, body: bytes) -> "Outcome":
        """Of the one object of a server that ignored the wish for a stream."""
        decoder.feed_whole(body)
        return cls(decoder)

    def _drain(self) -> None:
        while (item := self.decoder.next_delta()) is not None:
            self.deltas.append((item.type, item.data))

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None

    @property
    def usage(self) -> Mapping[str, Any] | None:
        return self.decoder.usage

    @property
    def generation(self) -> Generation:
        return fold(Event(Position(1, seq), kind, data) for seq, (kind, data) in enumerate(self.deltas, 1))

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        return [(call.id, call.name, call.arguments) for call in self.generation.tool_calls]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        return self._all == other._all

    @property
    def _all(self) -> tuple[Any, ...]:
        of_decoder = self.usage, self.decoder.response_id, self.decoder.frames
        return self.deltas, self.finish, self.code, self.error and self.error.message, *of_decoder

    __hash__ = None  # type: ignore[assignment]


def cut_at(stream: bytes, places: Iterable[int]) -> list[bytes]:
    """The stream in pieces, cut at these places (each taken modulo its length)."""
    at = sorted({place % (len(stream) + 1) for place in places})
    return [stream[start:end] for start, end in zip([0, *at], [*at, len(stream)], strict=True)]
