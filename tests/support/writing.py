"""Writers of streams for tests that need no model: an attempt that is open, entries, an end."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deltafan import Producer, Retention
from deltafan._background import background
from deltafan._events import CONTENT, Delta
from deltafan._keys import Keys
from deltafan_worker._interrupt import Interrupt
from deltafan_worker._publisher import Publisher
from deltafan_worker._writer import Begun, Call, RunLimits, Sealed, StreamWriter

CALL = Call("c", '"model":"m"', '"outcome":"lost"')
END = Sealed("completed", b"{}", b"{}", b"{}")


@asynccontextmanager
async def publishing(
    url: str, *, replicas: int = 0, timeout_ms: int = 100, beat_s: float = 1.0
) -> AsyncIterator[Publisher]:
    publisher = Publisher(url, Keys(), beat_s=beat_s, replicas=replicas, replicas_timeout_ms=timeout_ms)
    async with background(publisher.keep_open(), "publisher"):
        yield publisher


async def begun(
    publisher: Publisher, producer: Producer, job_id: str, claim: int = 1, retention: Retention | None = None
) -> StreamWriter:
    """A writer with an attempt that is open."""
    await producer.submit(model="m", messages=[{"role": "user", "content": "Hi"}], job_id=job_id)
    writer = StreamWriter(publisher, job_id, claim, retention or Retention(), Interrupt())
    assert isinstance(await writer.begin(CALL, RunLimits()), Begun)
    return writer


def say(writer: StreamWriter, text: str) -> None:
    writer.extend([Delta(CONTENT, text.encode())])
