"""A job as arq writes it: the record of its call, and the record of its outcome, which `Job.result()` reads."""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from arq.jobs import SerializationError, deserialize_job_raw, serialize_result
from arq.utils import ms_to_datetime, timestamp_ms
from arq.worker import Function, JobExecutionFailed

from deltafan_worker._claim import Claim
from deltafan_worker.serialization import deserialize, serialize

UNRUNNABLE = (JobExecutionFailed, SerializationError)
"""What `ArqJob.read` raises."""


class ArqJob:
    """One run of a claimed job."""

    def __init__(self, claim: Claim) -> None:
        self._args: tuple[Any, ...] = ()
        self._kwargs: Mapping[str, Any] = {}
        self._claim = claim
        self._name = "<unknown>"
        self._enqueued_ms = 0
        self._started_ms = timestamp_ms()
        self._try = claim.number

    def read(self, functions: Mapping[str, Any]) -> Function:
        """Take the record from the claim; the function that it calls.

        Raises:
            JobExecutionFailed: there is no record, no such function, or it has been called as often as it may be.
            SerializationError: the record can not be read.
        """
        record, self._claim.record = self._claim.record, None
        if record is None:
            raise JobExecutionFailed("job expired")
        fields = deserialize_job_raw(record, deserializer=deserialize)
        self._name, self._args, self._kwargs, first_try, self._enqueued_ms = fields
        self._try += max(0, (first_try or 1) - 1)
        function = cast(Function | None, functions.get(self._name))
        if function is None:
            raise JobExecutionFailed(f"function {self._name!r} not found")
        if function.max_tries is not None and self._try > function.max_tries:
            raise JobExecutionFailed(f"max {function.max_tries} retries exceeded")
        return function

    async def call(self, function: Function, shared: Mapping[Any, Any], running: dict[str, asyncio.Task[Any]]) -> Any:
        """Call it, in this very task, which is among `running` meanwhile; a cancel of that ends with the call."""
        claim, task = self._claim, asyncio.current_task()
        assert task is not None
        context = {
            **shared,
            "job_id": claim.job_id,
            "job_try": self._try,
            "enqueue_time": ms_to_datetime(self._enqueued_ms),
            "score": int(float(claim.score)),
        }
        running[claim.job_id] = task
        try:
            async with asyncio.timeout(function.timeout_s):
                return await function.coroutine(context, *self._args, **self._kwargs)
        finally:
            del running[claim.job_id]
            while task.cancelling():
                task.uncancel()

    def result(self, outcome: Any, *, success: bool) -> bytes | None:
        """The record of its outcome, without its arguments; None when arq can not write even that it is unwritable."""
        claim = self._claim
        return serialize_result(
            self._name,
            (),
            {},
            self._try,
            self._enqueued_ms,
            success,
            outcome,
            self._started_ms,
            timestamp_ms(),
            f"{claim.job_id}:{self._name}",
            claim.queue,
            claim.job_id,
            serializer=serialize,
        )
