"""Responses that outlive their requests: what was written, for those who come back for it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltafan.testing._steps import Cut, Gap, Step, pause
from deltafan.testing.responses import Framing


@dataclass
class Entry:
    """One write. Without data it is a cut, for the first reader who gets there."""

    number: int
    data: bytes | None
    taken: bool = False


class StoredResponse:
    """A response that can be asked for again; in background mode it goes on without anybody reading."""

    def __init__(self, framing: Framing, *, background: bool, streamed: bool) -> None:
        self.framing = framing
        self.background = background
        self.replays = background and streamed
        """Only a background response that was begun as a stream can be streamed again."""
        self._entries: list[Entry] = []
        self._ended = False
        self._grown = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    @property
    def object(self) -> dict[str, Any]:
        """The response as it now is."""
        return self.framing.response

    def start(self, steps: Sequence[Step]) -> None:
        """Run in the background. Whoever starts it stops it."""
        self.framing.response |= {"status": "queued", "background": True}
        self._task = asyncio.create_task(self._run(steps), name=f"background {self.object['id']}")

    async def stop(self, status: str | None = None) -> None:
        """End the run where it is; when it has not ended by itself, the response has this status."""
        if self._task is None or self._task.done():
            return
        if status is not None:
            self.framing.response["status"] = status
        self._task.cancel()
        await asyncio.wait([self._task])
        # A task that was cancelled before its first step ran nothing, not even its finally.
        await self._end()

    async def beyond(self, position: int) -> Sequence[Entry]:
        """What was written after so many entries, as soon as there is any; nothing more will come when it is empty."""
        async with self._grown:
            await self._grown.wait_for(lambda: self._ended or len(self._entries) > position)
            return self._entries[position:]

    async def _run(self, steps: Sequence[Step]) -> None:
        try:
            for step in steps:
                if isinstance(step, Gap | asyncio.Event):
                    await pause(step)
                elif isinstance(step, Cut):
                    await self._add(Entry(self.framing.number, None))
                else:
                    data = self.framing(step)
                    await self._add(Entry(self.framing.number, data))
        finally:
            await self._end()

    async def _end(self) -> None:
        self._ended = True
        async with self._grown:
            self._grown.notify_all()

    async def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        async with self._grown:
            self._grown.notify_all()
