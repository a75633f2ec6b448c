"""A batch's files: every line that can not be used is named, before anything is sent."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from deltafan import Failure, Generation, ToolCall, UsageRecord
from deltafan.batch import BadInput, BatchFiles, Outcome, Row, read_rows
from deltafan.batch._files import job_id_of

HI = [{"role": "user", "content": "Hi"}]
OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": HI}}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def usage(**fields: Any) -> UsageRecord:
    return UsageRecord(
        job_id="j",
        call_id="c",
        attempt=1,
        attempt_no=1,
        provider="p",
        model="m",
        api="chat",
        outcome="completed",
        source="provider",
        **fields,
    )


def answer(row: Row, files: BatchFiles, content: str = "Hello") -> Outcome:
    generation = Generation(status="completed", content=content, finish_reason="stop", api=row.api)
    return Outcome(row, files.job_id(row), generation, 1.0)


def failure(row: Row, files: BatchFiles) -> Outcome:
    why = Failure("server_error", "down", retryable=True)
    return Outcome(row, files.job_id(row), Generation(status="failed", failure=why), 1.0)


def test_rows_in_both_forms(tmp_path: Path) -> None:
    responses = {**OPENAI, "custom_id": "b", "url": "/v1/responses", "body": {"model": "m", "input": "Hi"}}
    short = [{"prompt": "Hi"}, {"id": "d", "messages": HI, "model": "other", "body": {"seed": 1}}]
    rows = list(read_rows(write(tmp_path / "in.jsonl", OPENAI, responses, "", *short), model="m"))
    assert [(row.line, row.custom_id, row.model, row.api) for row in rows] == [
        (1, "a", "m", "chat"),
        (2, "b", "m", "responses"),
        (4, "line-4", "m", "chat"),
        (5, "d", "other", "chat"),
    ]
    assert [row.body for row in rows] == [
        {"messages": HI},
        {"input": "Hi"},
        {"messages": HI},
        {"seed": 1, "messages": HI},
    ]


def test_a_compressed_file_is_read_as_well(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(OPENAI).encode()))
    assert [row.custom_id for row in read_rows(path)] == ["a"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ({**OPENAI, "url": "/v1/embeddings"}, "url: only POST to"),
        ({**OPENAI, "method": "GET"}, "url: only POST to"),
        ({**OPENAI, "custom_id": 7}, "custom_id: is not a text"),
        ({**OPENAI, "custom_id": "x" * 600}, "custom_id: is not a text"),
        ({**OPENAI, "body": []}, "body: is not an object"),
        ({**OPENAI, "body": {"messages": HI}}, "has no model"),
        ({**OPENAI, "body": {"model": "m"}}, "messages: a non-empty list is needed"),
        ({"prompt": "Hi", "model": "m", "temperature": 1}, "temperature is no field of a row"),
        (OPENAI, "custom_id 'a' stands in line 1 already"),
    ],
)
def test_a_line_that_can_not_be_used_is_named(tmp_path: Path, row: Any, why: str) -> None:
    source = write(tmp_path / "in.jsonl", OPENAI, row)
    with (
        pytest.raises(BadInput, match="line 2: ") as caught,
        BatchFiles.open(source, tmp_path / "out", tmp_path / "err"),
    ):
        pass
    assert why in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_takes_up_what_an_earlier_one_left(tmp_path: Path) -> None:
    rows = [{**OPENAI, "custom_id": f"r{n}"} for n in range(4)]
    paths = (write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl", tmp_path / "err.jsonl")
    with BatchFiles.open(*paths) as files:
        batch_id = files.batch_id
        first, second, *_ = files.pending()
        failed = files.job_id(second)
        files.write(answer(first, files))
        files.write(failure(second, files))
    paths[1].write_bytes(paths[1].read_bytes() + b'{"id": "torn by a de')
    with BatchFiles.open(*paths) as files:
        assert (files.batch_id, files.rows, files.answered) == (batch_id, 4, 1)
        assert [row.custom_id for row in files.pending()] == ["r1", "r2", "r3"]
        assert files.job_id(second) != failed, "what failed is another job the next time"
        assert files.job_id(first) == job_id_of(batch_id, "r0", 0)
    assert len(paths[1].read_bytes().splitlines()) == 1, "the torn line is gone"


def test_another_batchs_output_is_left_alone(tmp_path: Path) -> None:
    out, err = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    with BatchFiles.open(write(tmp_path / "a.jsonl", OPENAI), out, err) as files:
        files.write(answer(next(files.pending()), files))
    before = out.read_bytes()
    other = write(tmp_path / "b.jsonl", {**OPENAI, "custom_id": "z"})
    with pytest.raises(BadInput, match=r"out\.jsonl, line 1: is of another batch"), BatchFiles.open(other, out, err):
        pass
    out.write_text("what is this\n")
    with pytest.raises(BadInput, match="no line of a batch's output"), BatchFiles.open(other, out, err):
        pass
    out.write_bytes(before)


def test_an_answer_is_a_line_as_openai_writes_it() -> None:
    calls = (ToolCall("call_1", "f", "{}"),)
    generation = Generation(
        status="completed",
        content="Hello",
        reasoning="Hm.",
        tool_calls=calls,
        finish_reason="tool_calls",
        usage=usage(input_tokens=3, output_tokens=2, total_tokens=5, cost=0.5, currency="USD"),
    )
    for api, kind in (("chat", ChatCompletion), ("responses", Response)):
        line = json.loads(Outcome(Row(1, "a", "m", api, {}), "j", generation, 1.0).line())
        assert (line["custom_id"], line["response"]["status_code"], line["error"], line["cost"]) == (
            "a",
            200,
            None,
            0.5,
        )
        body = kind.model_validate(line["response"]["body"], strict=False)
        if isinstance(body, ChatCompletion):
            assert body.choices[0].message.content == "Hello"
            assert body.choices[0].message.tool_calls is not None
            assert body.usage is not None
            assert body.usage.total_tokens == 5
        else:
            assert body.output_text == "Hello"


def test_a_failure_says_why() -> None:
    why = Failure("server_error", "down", retryable=True)
    outcome = Outcome(Row(1, "a", "m", "chat", {}), "j", Generation(status="failed", failure=why), 1.0)
    line = json.loads(outcome.line())
    assert (line["response"], line["error"]) == (None, {"code": "server_error", "message": "down"})
