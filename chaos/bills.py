"""What the ledger must hold: a record of every model call, each once, and each right."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltafan import UsageRecord
from jobs import Job

INPUT_TOKENS = 5
INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
"""For a million, as the fleet's catalogue has them."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What the model server has counted, by number."""

    begun: Mapping[int, int]
    """Calls that were answered."""
    whole: Mapping[int, int]
    """Those of them that it did not break: nobody calls again for such a one under the same call id."""
    endless: Mapping[int, int]


def count_wrong(
    job: Job, status: str | None, records: Sequence[UsageRecord], calls: Calls, *, may_miss: bool
) -> Counter[str]:
    """What is wrong with a job's records, by the table's columns.

    `status`: how it ended, or None when its readers disagree. `may_miss`: a failover may have lost the begin of a call
    together with its note; then only an answer must have its bill.
    """
    ids = {record.call_id for record in records}
    completed = [record for record in records if record.outcome == "completed"]
    least = int(status == "completed")
    most = 1 if status is None else least
    missing = max(0, least - len(completed))
    if not may_miss:
        missing = max(missing, calls.whole.get(job.number, 0) - len(ids))
    # Calls whose worker vanished before the request went out, or whose request was refused.
    unanswered = sum(record.source == "none" for record in records)
    surplus = max(0, len(completed) - most, len(ids) - calls.begun.get(job.number, 0) - unanswered)
    missing += sum(not _is_right(job, record) for record in completed)
    return +Counter({"no bill": missing, "2x bill": surplus})


def count_repeated(records: Sequence[UsageRecord]) -> int:
    """Records of calls that have one already."""
    return len(records) - len({record.call_id for record in records})


def _is_right(job: Job, record: UsageRecord) -> bool:
    """Whether an answer's bill is what the model server reported, at the catalogue's price."""
    tokens = record.output_tokens or 0
    is_whole = tokens == job.deltas or (job.on_interrupt == "continue" and tokens < job.deltas)
    cost = (INPUT_TOKENS * INPUT_PRICE + tokens * OUTPUT_PRICE) / 1_000_000
    is_priced = record.cost is not None and abs(record.cost - cost) < 1e-9
    return record.source == "provider" and record.deltas == tokens and is_whole and is_priced
