"""A job's stream as its running attempt writes it: begin, extend, compare and heal, finish."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

import orjson

from deltafan._events import Delta
from deltafan._lua import Script, load
from deltafan._position import Position
from deltafan._resp import Argument, Reply, ServerError, ignore, pack
from deltafan._retention import Retention
from deltafan._usage import UsageRecord
from deltafan_worker._interrupt import Interrupt, Reason
from deltafan_worker._log import AttemptLog, append_head

if TYPE_CHECKING:
    from deltafan_worker._publisher import Publisher

log = logging.getLogger("deltafan.writer")

MAX_REPLAYS = 5
"""How often one run writes its stream anew before it gives up: a server that keeps losing keys is not noeviction."""

_BEGIN, _COMPARE, _FINISH, _HAND_OVER, _NOTE, _REST = (
    load(name, "deltafan_worker") for name in ("begin", "compare", "finish", "hand_over", "note", "rest")
)


@dataclass(frozen=True, slots=True)
class Call:
    """A model call about to be made: its id, what `started` tells readers, and the record that stands if we vanish."""

    id: str
    started: str
    """JSON members."""
    lost_note: str
    """JSON members."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What `begin` enforces; a replay is no run, so nothing of it applies there."""

    max_runs: int = 3
    on_interrupt: str = "restart"


@dataclass(frozen=True, slots=True)
class Broken:
    """An answer that broke off: what there is of it, and its last entry."""

    position: Position
    deltas: Sequence[Delta]


@dataclass(frozen=True, slots=True)
class Begun:
    """The attempt is open: call the model."""

    attempt: int
    attempt_no: int
    mode: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The job has its terminal entry, ours or another's."""

    status: str
    notes: tuple[tuple[str, bytes], ...]
    """Usage notes of all its model calls: call id, record."""


@dataclass(frozen=True, slots=True)
class NotOurs:
    """A newer claim or attempt owns the job: leave it alone."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The stream is not as the caller read it: read it again, or begin anew."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What the last entry of an attempt is made of."""

    type: str
    data: bytes = field(repr=False)
    result: bytes = field(repr=False)
    note: bytes


class StreamWriter:
    """One job's stream, written through the process's publisher.

    `extend` never waits. Everything that is added reaches the stream in order and once, whatever the connection
    or the server does, or the run is interrupted: FENCED, ENDED, STREAM_LOST.
    """

    def __init__(
        self, publisher: "Publisher", job_id: str, claim: int, retention: Retention, interrupt: Interrupt
    ) -> None:
        self.job_id = job_id
        self.log = AttemptLog()
        self.attempt = 0
        self.attempt_no = 0
        self.interrupt = interrupt
        self._publisher = publisher
        self._claim = claim
        self._retention = retention
        self._keys = publisher.keys.job(job_id)
        self.events_key, self.state_key, _ = self._keys
        self._append_head = append_head(self.events_key)
        self.ring = pack("PUBLISH", publisher.keys.bell(job_id), "")
        self.live_ms = retention.live_ms
        self.run = ""
        self._call = Call("", "", "")
        self._noted: dict[str, bytes] = {}
        self._sent = 0
        self._flowing = False
        self._doubtful = False
        self._closed = False
        self._replays = 0
        self._asking = 0
        self._has_ended = False
        self._healing = asyncio.Lock()

    @property
    def is_to_be_renewed(self) -> bool:
        """Whether the heartbeat sets its keys' lifetimes: it would undo those that an end has set, or is about to."""
        return self._asking == 0 and not self._has_ended

    async def begin(
        self, call: Call, limits: RunLimits, *, previous_note: bytes = b"", broken: Broken | None = None
    ) -> Begun | Ended | NotOurs | Moved:
        """Open an attempt: the claim's first, or, with the usage note of the call it follows, another one in place.

        With `broken` it goes on after that, and readers keep what they have; else they discard it.
        """
        async with self._healing:
            self._flowing = False
            self.log = AttemptLog(broken.deltas if broken else ())
            origin = str(broken.position) if broken else ""
            return await self._open("restart" if self.run else "claim", call, limits, previous_note, origin)

    async def broken_off(self) -> Broken | None:
        """What there is of this attempt's answer, for another to go on from; None when there is nothing.

        All of it is in the stream then, or on its way ahead of whatever is sent next.
        """
        if not self._flowing:
            await self.heal()
        self._publisher.flush(self)
        deltas = self.log.deltas()
        return Broken(Position(self.attempt, len(self.log)), deltas) if deltas else None

    def extend(self, deltas: Iterable[Delta]) -> int:
        """Add deltas to the stream: they go out at the end of the event loop's turn, or with the next flush.

        Returns how many bytes of deltas this attempt has.
        """
        if self._flowing:
            self._publisher.flush_soon(self)
        return self.log.extend(deltas)

    def unsent(self) -> list[bytes]:
        """The commands that the next flush sends; they count as sent."""
        if not self._flowing:
            return []
        commands = self.log.commands(self._append_head, self.attempt, self._sent)
        self._sent += len(commands)
        return commands

    def on_append(self, reply: Reply) -> None:
        """Take the reply to one append. Anything but an id stops this job's appends until a compare has told why."""
        if type(reply) is bytes or not self._flowing:
            return
        self.stop_flow()
        # An id that is taken, or a key that is gone: the compare mends that. Anything else is the server's own trouble.
        is_refused = isinstance(reply, ServerError) and "equal or smaller" not in str(reply)
        if is_refused:
            log.warning("job %s: the server refused an entry (%s); it is written again", self.job_id, reply)
        self._publisher.heal_soon(self, pause=is_refused)

    def stop_flow(self) -> None:
        """Hold back appends until a compare: the connection is new, or one was refused."""
        self._flowing = False
        self._doubtful = True

    async def heal(self) -> Ended | NotOurs | None:
        """Find out where the stream stands and put back what it lacks; None when it is ours and whole again."""
        async with self._healing:
            if self._flowing or self._closed or self.run == "":
                return None
            verdict = await self._compare()
        if isinstance(verdict, Ended):
            self.interrupt.cut(Reason.ENDED)
        elif isinstance(verdict, NotOurs):
            self.interrupt.cut(Reason.FENCED)
        return verdict

    async def finish(self, seal: Callable[[str | None], Sealed]) -> Ended | NotOurs:
        """Write the terminal entry behind everything added.

        `seal(None)` makes it as the run ended, `seal(reason)` as cancelled: a cancel that was acknowledged earlier
        wins. It is called anew for every try, since a healing may have changed the attempt's number.
        """
        cancel: str | None = None
        while True:
            if not self._flowing and (verdict := await self.heal()) is not None:
                return verdict
            sealed = seal(cancel)
            self._publisher.flush(self)
            seq = len(self.log) + 1
            entry = (self.run, self.attempt, seq, sealed.type, sealed.data, sealed.result, self._call.id, sealed.note)
            reply = await self._ask(_FINISH, (*entry, *self._retention.ended_ms))
            match reply[0]:
                case b"CANCEL":
                    cancel = reply[1].decode()
                case b"CHECK":
                    self.stop_flow()
                case _:
                    return _ended(reply)

    async def hand_over(self, note: bytes, *, unless_cancelled: bool = False) -> bool:
        """Let go of the job without spending a run; without a note, as if its model had not been called.

        Returns whether that was done: not for a job that is another's or has ended.
        """
        async with self._healing:
            self._publisher.flush(self)
            self._flowing = False
            args = (self.run, self._call.id, note, self._retention.live_ms, int(unless_cancelled))
            return bool(await self._ask(_HAND_OVER, args))

    async def rest(self) -> Ended | NotOurs | None:
        """Before any attempt of ours: let the job wait in the queue, whoever ran it before. None when it does."""
        reply = await self._ask(_REST, (self._claim, self._retention.live_ms, *self._retention.ended_ms))
        if reply[0] == b"ENDED":
            return _ended(reply)
        return NotOurs() if reply[0] == b"STALE" else None

    def note_response(self, note: str) -> None:
        """Note where the upstream response can be found again; best effort, nobody waits for it."""
        self._note("response", note.encode())

    def note_call(self, record: UsageRecord) -> None:
        """Keep the record of a call that will be repeated: here, and should we vanish in the job's state."""
        note = orjson.dumps(record.to_json())
        self._noted[record.call_id] = note
        self._note(f"u:{record.call_id}", note)

    def with_noted(self, notes: Iterable[tuple[str, bytes]]) -> tuple[tuple[str, bytes], ...]:
        """These usage notes, and those of calls that were repeated."""
        return tuple((self._noted | dict(notes)).items())

    def _note(self, field: str, value: bytes) -> None:
        keys, args = self._keys, (self.run, field, value)
        self._publisher.send(pack("EVAL", _NOTE.source, len(keys), *keys, *args), ignore)

    def close(self) -> None:
        """Leave the publisher: nothing more is sent for this job."""
        self._flowing, self._closed = False, True
        self._publisher.remove(self)

    async def _open(
        self, mode: str, call: Call, limits: RunLimits, previous_note: bytes, origin: str = ""
    ) -> Begun | Ended | NotOurs | Moved:
        run, previous_call = uuid4().hex, self._call.id if previous_note else ""
        self._publisher.add(self)
        self._doubtful = False
        owner = (run, self.run, self._claim, self.attempt, mode, limits.max_runs, self._retention.live_ms)
        notes = (call.started, call.id, call.lost_note, previous_call, previous_note)
        reply = await self._ask(_BEGIN, (*owner, *notes, *self._retention.ended_ms, limits.on_interrupt, origin))
        if self._closed:  # whoever ran the job has left it meanwhile, and this was a replay that nobody waits for
            self._publisher.remove(self)
            return NotOurs()
        if reply[0] == b"MOVED":
            return Moved()
        if reply[0] == b"STALE":
            return NotOurs()
        if reply[0] == b"ENDED":
            return _ended(reply)
        self.run, self._call = run, call
        self.attempt, self.attempt_no, how = int(reply[1]), reply[2], reply[3].decode()
        self._sent, self._flowing = 0, not self._doubtful
        if self._doubtful:  # the connection that answered is gone already
            self._publisher.heal_soon(self)
        self._publisher.flush_soon(self)
        return Begun(self.attempt, self.attempt_no, how)

    async def _compare(self) -> Ended | NotOurs | None:
        position = (self.run, self.attempt, self._claim, self._sent)
        reply = await self._ask(_COMPARE, (*position, self._retention.live_ms, *self._retention.ended_ms))
        if reply[0] == b"FENCED" or self._closed:
            return NotOurs()
        if reply[0] == b"ENDED":
            return _ended(reply)
        if reply[1]:
            self.interrupt.cut(Reason.CANCELLED, reply[1].decode())
        if reply[0] == b"REPLAY":
            return await self._replay()
        if reply[0] == b"HEAL":
            log.warning(
                "job %s: %d entries are not in the stream; writing them again", self.job_id, self._sent - reply[2]
            )
            self._sent = reply[2]
        self._flowing = True
        self._publisher.flush_soon(self)
        return None

    async def _replay(self) -> Ended | NotOurs | None:
        self._replays += 1
        if self._replays > MAX_REPLAYS:
            self.interrupt.cut(Reason.STREAM_LOST)
        log.warning("job %s: its stream was lost; all of it is written again in a new attempt", self.job_id)
        self.log.own_all()
        verdict = await self._open("replay", self._call, RunLimits(), b"")
        return verdict if isinstance(verdict, (Ended, NotOurs)) else None

    async def _ask(self, script: Script, args: tuple[Argument, ...]) -> Reply:
        """Run a script of the job. An answer that the job has ended is believed once the replicas have it."""
        self._asking += 1
        try:
            while True:
                reply = await self._publisher.run(script, self._keys, args)
                self._has_ended = _says_ended(reply)
                if not self._has_ended or await self._publisher.is_durable(self._keys):
                    return reply
        finally:
            self._asking -= 1


def _says_ended(reply: Reply) -> bool:
    """The answers ENDED, ALREADY and finish's OK carry the usage notes; no other has a list there."""
    return isinstance(reply, list) and len(reply) == 3 and isinstance(reply[2], list)


def _ended(reply: Reply) -> Ended:
    return Ended(reply[1].decode(), _pairs(reply[2]))


def _pairs(flat: list[bytes]) -> tuple[tuple[str, bytes], ...]:
    return tuple((name.decode(), value) for name, value in zip(flat[::2], flat[1::2], strict=True))
