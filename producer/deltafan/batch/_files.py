"""A batch's files: which rows there are, which have an answer already, and where the next ones go.

What is known of each row stands in an index on disk, so memory does not grow with the rows. The index is made anew by
each run from the input, the output and the error file: these three are the truth.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Self

import orjson

from deltafan.batch._outcome import Outcome
from deltafan.batch._rows import BadInput, Row, read_rows

_HASH_BYTES = 1 << 20


@dataclass(slots=True)
class BatchFiles:
    """Input, output and errors of one run. Made by `open`, which checks all of them first."""

    batch_id: str
    rows: int
    answered: int
    """Rows that had an answer when the run began."""
    _source: Path
    _model: str | None
    _index: sqlite3.Connection
    _output: IO[bytes]
    _errors: IO[bytes]

    @classmethod
    @contextmanager
    def open(
        cls, source: Path, output: Path, errors: Path, *, model: str | None = None, batch_id: str | None = None
    ) -> Iterator[Self]:
        """Check the input whole, then take up the output where an earlier run left it.

        The batch's id is that of its input, so the same rows are the same jobs, whoever runs them.

        Raises:
            BadInput: a line can not be used, is a duplicate, or the output is another batch's.
        """
        found = batch_id or batch_id_of(source, model)
        with TemporaryDirectory(prefix="deltafan-batch-") as folder:
            index = sqlite3.connect(Path(folder) / "rows.db", isolation_level=None)
            index.execute("PRAGMA journal_mode=OFF")
            index.execute(
                "CREATE TABLE row (id TEXT PRIMARY KEY, line INTEGER, answered INTEGER, tries INTEGER) WITHOUT ROWID"
            )
            try:
                rows = _index_rows(index, source, model)
                answered = _take_up(index, output, found, answers=True)
                _take_up(index, errors, found, answers=False)
                with output.open("ab") as out, errors.open("ab") as err:
                    yield cls(found, rows, answered, source, model, index, out, err)
                if errors.stat().st_size == 0:
                    errors.unlink()
            finally:
                index.close()

    def pending(self) -> Iterator[Row]:
        """The rows without an answer, in the input's order."""
        for row in read_rows(self._source, model=self._model):
            ((answered,),) = self._index.execute("SELECT answered FROM row WHERE id = ?", (row.custom_id,))
            if not answered:
                yield row

    def job_id(self, row: Row) -> str:
        """The job that answers this row; another one after each failure that is in the error file."""
        ((tries,),) = self._index.execute("SELECT tries FROM row WHERE id = ?", (row.custom_id,))
        return job_id_of(self.batch_id, row.custom_id, tries)

    def write(self, outcome: Outcome) -> None:
        """Append what became of a row; it is out of this process's hands when this returns."""
        file = self._output if outcome.is_answer else self._errors
        file.write(outcome.line())
        file.flush()


def batch_id_of(source: Path, model: str | None) -> str:
    """The id of a batch with these rows."""
    digest = hashlib.sha256(repr(model).encode())
    with source.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return f"batch-{digest.hexdigest()[:16]}"


def job_id_of(batch_id: str, custom_id: str, tries: int) -> str:
    """Job ids hold fewer characters than ids of rows may."""
    return hashlib.sha256(orjson.dumps([batch_id, custom_id, tries])).hexdigest()[:40]


def _index_rows(index: sqlite3.Connection, source: Path, model: str | None) -> int:
    count = 0
    index.execute("BEGIN")
    for row in read_rows(source, model=model):
        try:
            index.execute("INSERT INTO row VALUES (?, ?, 0, 0)", (row.custom_id, row.line))
        except sqlite3.IntegrityError:
            ((first,),) = index.execute("SELECT line FROM row WHERE id = ?", (row.custom_id,))
            raise BadInput(
                str(source), row.line, f"custom_id {row.custom_id!r} stands in line {first} already"
            ) from None
        count += 1
    index.execute("COMMIT")
    if count == 0:
        raise BadInput(str(source), 1, "there is no row")
    return count


def _take_up(index: sqlite3.Connection, path: Path, batch_id: str, *, answers: bool) -> int:
    """Note what an earlier run has written; a line that its death has torn is cut off."""
    if not path.exists():
        return 0
    whole, count = 0, 0
    index.execute("BEGIN")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            custom_id, job_id = _written(line, path, number)
            known = index.execute("SELECT tries FROM row WHERE id = ?", (custom_id,)).fetchone()
            last = known[0] if known and not answers else None
            possible = known and any(job_id == job_id_of(batch_id, custom_id, tries) for tries in range(100))
            if not possible:
                raise BadInput(str(path), number, "is of another batch; name another output, or remove this one")
            if answers:
                index.execute("UPDATE row SET answered = 1 WHERE id = ?", (custom_id,))
            else:
                index.execute("UPDATE row SET tries = ? WHERE id = ?", ((last or 0) + 1, custom_id))
            whole, count = whole + len(line), count + 1
    index.execute("COMMIT")
    os.truncate(path, whole)
    return count


def _written(line: bytes, path: Path, number: int) -> tuple[str, str]:
    try:
        data = orjson.loads(line)
        return str(data["custom_id"]), str(data["id"]).removeprefix("batch_req_")
    except (ValueError, KeyError, TypeError):
        raise BadInput(str(path), number, "is no line of a batch's output; name another file") from None
