"""The ids of a batch's jobs: of which row, and which of its tries."""

import hashlib

import orjson


def job_id_of(batch_id: str, custom_id: str, number: int) -> str:
    """The job that is this try of a row; 0 is the first. Job ids hold fewer characters than ids of rows may."""
    return f"{hashlib.sha256(orjson.dumps([batch_id, custom_id])).hexdigest()[:40]}-{number}"


def is_job_of(batch_id: str, custom_id: str, job_id: str) -> bool:
    """Whether `job_id_of` gives this id for any try of the row."""
    number = job_id.rpartition("-")[2]
    return number.isdecimal() and job_id == job_id_of(batch_id, custom_id, int(number))


def tries_up_to(job_id: str) -> int:
    """How many tries the job's row has had with it, which is the number of the next."""
    return int(job_id.rpartition("-")[2]) + 1
