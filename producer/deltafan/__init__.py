"""deltafan: one model generation, published once, read by many.

async with Producer.connect(url) as producer, Consumer.connect(url) as consumer:
    job = await producer.submit(model="qwen3.6-plus", messages=[{"role": "user", "content": "Hi"}])
    async with consumer.tail(job.id) as events:
        async for event in events:
            print(event.text, end="")
"""

from deltafan._consumer import Consumer, TurnEvent
from deltafan._errors import (
    DeltafanError,
    InvalidPosition,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    JobEnded,
    JobFailed,
    JobNotFound,
    ProtocolError,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan._events import Event, Failure
from deltafan._fold import Fold, Generation, ToolCall, fold
from deltafan._limits import Limit
from deltafan._position import Position
from deltafan._producer import Producer
from deltafan._request import check_request
from deltafan._retention import Retention
from deltafan._submission import Job
from deltafan._usage import UsageRecord

__all__ = [
    "Consumer",
    "DeltafanError",
    "Event",
    "Failure",
    "Fold",
    "Generation",
    "InvalidPosition",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobConflict",
    "JobEnded",
    "JobFailed",
    "JobNotFound",
    "Limit",
    "Position",
    "Producer",
    "ProtocolError",
    "QueueFull",
    "RedisUnavailable",
    "ResultTimeout",
    "Retention",
    "StreamExpired",
    "ToolCall",
    "TurnEvent",
    "UsageRecord",
    "check_request",
    "fold",
]
