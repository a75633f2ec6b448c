"""A batch's files: which rows there are, which have an answer already, and where the next ones go.

What is known of each row stands in an index on disk, so memory does not grow with the rows. The index is made anew by
each run from the input, the output and the error file: these three are the truth.
"""

import fcntl
import hashlib
import os
import shutil
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import IO, Any, Self

import orjson

from deltafan import InvalidRequest
from deltafan.batch._ids import is_job_of, tries_up_to
from deltafan.batch._outcome import LINE_HEAD, TOKENS, Bill, Outcome, bill_of
from deltafan.batch._rows import BadInput, Row, read_rows

_HASH_BYTES = 1 << 20

Sink = Path | IO[bytes]
"""A file that later runs take up again, or a stream that is only written to."""


@dataclass(slots=True)
class BatchFiles:
    """Input, output and errors of one run. Made by `open`, which checks all of them first."""

    batch_id: str
    rows: int
    _source: Path
    _source_name: str
    _model: str | None
    _index: sqlite3.Connection
    answered: int = 0
    """Rows that had an answer when the run began."""
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What earlier runs have cost, by currency."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Their `input_tokens` and `output_tokens`."""
    _output: IO[bytes] | None = None
    _errors: IO[bytes] | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        source: Path,
        output: Sink,
        errors: Sink,
        *,
        model: str | None = None,
        batch_id: str | None = None,
        max_body_bytes: int | None = None,
        check_only: bool = False,
        on_row: Callable[[Row], None] | None = None,
        source_name: str | None = None,
    ) -> Iterator[Self]:
        """Check the input whole, then take up the output where an earlier run left it.

        The batch's id is that of its input, so the same rows are the same jobs, whoever runs them. With `check_only`
        nothing is written or locked, and another run may go on meanwhile. `on_row` is shown each row once;
        `source_name` is what errors call the input.

        Raises:
            BadInput: a line can not be used, is a duplicate, or the output is another batch's.
            InvalidRequest: the files are one and the same, can not be opened, or another run writes them.
        """
        _tell_apart(source, output, errors)
        with ExitStack() as stack:
            index = stack.enter_context(_new_index())
            name = source_name or str(source)
            rows = read_rows(source, model=model, max_body_bytes=max_body_bytes, name=name)
            count = _index_rows(index, rows, name, on_row)
            files = cls(batch_id or batch_id_of(source, model), count, source, name, model, index)
            if not check_only:
                files._output = stack.enter_context(_opened(output, "output"))
                files._errors = stack.enter_context(_opened(errors, "errors"))
            for sink, answers in ((output, True), (errors, False)):
                if isinstance(sink, Path) and sink.is_file():
                    whole_bytes = files._take_up(sink, answers=answers)
                    if not check_only:
                        os.truncate(sink, whole_bytes)
            files._add_up()
            yield files
            if isinstance(errors, Path) and errors.is_file() and not check_only:
                files._tidy(errors)

    def pending(self) -> Iterator[Row]:
        """The rows without an answer, in the input's order."""
        for row in read_rows(self._source, model=self._model, name=self._source_name):
            known = self._index.execute("SELECT answered FROM row WHERE id = ?", (row.custom_id,)).fetchone()
            if known is None:
                raise BadInput(self._source_name, row.line, "was not there when the file was checked; run it again")
            if not known[0]:
                yield row

    def tries(self, row: Row) -> int:
        """The number of the row's next try, as far as the error file tells."""
        ((tries,),) = self._index.execute("SELECT tries FROM row WHERE id = ?", (row.custom_id,))
        return int(tries)

    def write(self, outcome: Outcome) -> None:
        """Append what became of a row; it is out of this process's hands when this returns."""
        file = self._output if outcome.is_answer else self._errors
        if file is None:
            raise RuntimeError("the files were opened to be checked only")
        custom_id = outcome.row.custom_id
        ((bill,),) = self._index.execute("SELECT bill FROM row WHERE id = ?", (custom_id,))
        earlier = orjson.loads(bill)
        try:
            file.write(outcome.line(earlier))
            file.flush()
        except OSError as error:
            error.filename = error.filename or file.name
            raise
        self._note(custom_id, outcome.job_id, outcome.bill(earlier), answered=outcome.is_answer)

    def _note(self, custom_id: str, job_id: str, bill: Bill, *, answered: bool) -> None:
        """Know of a try. The last one's bill holds those before it."""
        tries = tries_up_to(job_id)
        self._index.execute(
            "UPDATE row SET answered = max(answered, ?1), tries = max(tries, ?2),"
            " bill = CASE WHEN billed < ?3 THEN ?4 ELSE bill END, billed = max(billed, ?3) WHERE id = ?5",
            (answered, 0 if answered else tries, tries, orjson.dumps(bill), custom_id),
        )

    def _take_up(self, path: Path, *, answers: bool) -> int:
        """Note what earlier runs have written. Returns where its whole lines end; a death may have torn the last."""
        whole_bytes = 0
        self._index.execute("BEGIN")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and (line.startswith(LINE_HEAD) or LINE_HEAD.startswith(line)):
                    break
                data = _written(line, path, number)
                custom_id, job_id = data["custom_id"], data["id"].removeprefix("batch_req_")
                known = self._index.execute("SELECT 1 FROM row WHERE id = ?", (custom_id,)).fetchone()
                if not known or not is_job_of(self.batch_id, custom_id, job_id):
                    raise BadInput(str(path), number, "is of another batch; name another output, or remove this one")
                self._note(custom_id, job_id, bill_of(data), answered=answers)
                whole_bytes += len(line)
        self._index.execute("COMMIT")
        return whole_bytes

    def _add_up(self) -> None:
        ((self.answered,),) = self._index.execute("SELECT count(*) FROM row WHERE answered")
        for (bill,) in self._index.execute("SELECT bill FROM row WHERE billed"):
            for name, amount in orjson.loads(bill).items():
                if name in TOKENS:
                    self.tokens[name] += amount
                else:
                    self.spent[name] += amount

    def _tidy(self, errors: Path) -> None:
        """Leave the last failure of each row that has no answer still; without any the file goes."""
        with errors.open("rb") as old, NamedTemporaryFile(dir=errors.parent, prefix=errors.name, delete=False) as new:
            for line in old:
                data = orjson.loads(line)
                query = "SELECT 1 FROM row WHERE id = ? AND NOT answered AND tries = ?"
                if self._index.execute(query, (data["custom_id"], tries_up_to(data["id"]))).fetchone():
                    new.write(line)
            left_bytes = new.tell()
        if left_bytes:
            shutil.copymode(errors, new.name)
            Path(new.name).replace(errors)
        else:
            Path(new.name).unlink()
            errors.unlink(missing_ok=True)


def batch_id_of(source: Path, model: str | None) -> str:
    """The id of a batch with these rows."""
    digest = hashlib.sha256(repr(model).encode())
    with source.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return f"batch-{digest.hexdigest()[:16]}"


def _tell_apart(source: Path, output: Sink, errors: Sink) -> None:
    seen = {source.resolve(): "input"}
    for sink, field_name in ((output, "output"), (errors, "errors")):
        other = seen.setdefault(sink.resolve(), field_name) if isinstance(sink, Path) else field_name
        if other != field_name:
            raise InvalidRequest(field_name, f"{sink} is the {other} already; name another file")


@contextmanager
def _new_index() -> Iterator[sqlite3.Connection]:
    with TemporaryDirectory(prefix="deltafan-batch-") as folder:
        # SQLite serialises what threads do: one may write answers, and another read rows.
        index = sqlite3.connect(Path(folder) / "rows.db", isolation_level=None, check_same_thread=False)
        try:
            # It lives as long as the run: what a crash would break is made anew.
            index.execute("PRAGMA journal_mode=OFF")
            index.execute("PRAGMA synchronous=OFF")
            index.execute(
                "CREATE TABLE row (id TEXT PRIMARY KEY, line INTEGER, answered INTEGER, tries INTEGER,"
                " billed INTEGER, bill TEXT) WITHOUT ROWID"
            )
            yield index
        finally:
            index.close()


def _index_rows(
    index: sqlite3.Connection, rows: Iterator[Row], source: str, on_row: Callable[[Row], None] | None
) -> int:
    count = 0
    index.execute("BEGIN")
    for row in rows:
        try:
            index.execute("INSERT INTO row VALUES (?, ?, 0, 0, 0, '{}')", (row.custom_id, row.line))
        except sqlite3.IntegrityError:
            ((first,),) = index.execute("SELECT line FROM row WHERE id = ?", (row.custom_id,))
            why = f"custom_id {row.custom_id!r} stands in line {first} already"
            raise BadInput(source, row.line, why) from None
        count += 1
        if on_row is not None:
            on_row(row)
    index.execute("COMMIT")
    if count == 0:
        raise BadInput(source, 1, "there is no row")
    return count


@contextmanager
def _opened(sink: Sink, field_name: str) -> Iterator[IO[bytes]]:
    """The file to append to, held by this run alone."""
    if not isinstance(sink, Path):
        yield sink
        return
    try:
        file = sink.open("ab")
    except OSError as error:
        raise InvalidRequest(field_name, f"{sink} can not be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidRequest(field_name, f"another run writes {sink}; wait for its end, or stop it") from None
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # a disk that is full is so still
                file.close()
            if sink.is_file() and sink.stat().st_size == 0:
                sink.unlink()
            raise


def _written(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        data = orjson.loads(line)
        if line.endswith(b"\n") and isinstance(data["custom_id"], str) and isinstance(data["id"], str):
            return dict(data)
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput(str(path), number, "is no line of a batch's output; name another file")
