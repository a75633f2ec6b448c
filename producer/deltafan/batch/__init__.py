"""Batch pipelines: many prompts through the batch lane, resumable, at flat memory.

Built on `Producer` and `Consumer` alone; whatever it does, a program of yours can do as well.

async with Producer.connect(url) as producer, Consumer.connect(url) as consumer:
    batch = Batch(producer, consumer, batch_id="nightly")
    async with aclosing(batch.run(rows)) as outcomes:  # so that leaving it early stops the submitting at once
        async for outcome in outcomes:
            ...
"""

from deltafan.batch._files import BatchFiles
from deltafan.batch._outcome import Outcome
from deltafan.batch._rows import BadInput, Row, read_rows
from deltafan.batch._run import Batch

__all__ = ["BadInput", "Batch", "BatchFiles", "Outcome", "Row", "read_rows"]
