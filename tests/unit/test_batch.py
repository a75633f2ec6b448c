"""A batch's files: every line that can not be used is named, before anything is sent."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from deltafan import Failure, Generation, InvalidRequest, ToolCall, UsageRecord
from deltafan.batch import BadInput, BatchFiles, Outcome, Row, read_rows
from deltafan.batch._ids import job_id_of

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


def job_of(row: Row, files: BatchFiles) -> str:
    return job_id_of(files.batch_id, row.custom_id, files.tries(row))


def answer(row: Row, files: BatchFiles, content: str = "Hello", **fields: Any) -> Outcome:
    generation = Generation(status="completed", content=content, finish_reason="stop", api=row.api, **fields)
    return Outcome(row, job_of(row, files), generation, 1.0)


def failure(row: Row, files: BatchFiles, **fields: Any) -> Outcome:
    why = Failure("server_error", "down", retryable=True)
    return Outcome(row, job_of(row, files), Generation(status="failed", failure=why, **fields), 1.0)


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
        ('{"id": 1,', "is not JSON (unexpected end of data at character 11)"),
        ("[]", "is not a JSON object"),
        ({**OPENAI, "url": "/v1/embeddings"}, "url: only POST to"),
        ({**OPENAI, "method": "GET"}, "url: only POST to"),
        ({**OPENAI, "custom_id": 7}, "custom_id: is not a text"),
        ({**OPENAI, "custom_id": "x" * 600}, "custom_id: is not a text"),
        ({**OPENAI, "body": []}, "body: is not an object"),
        ({**OPENAI, "body": {"messages": HI}}, "model: there is none"),
        ({**OPENAI, "body": {"model": "m"}}, "messages: a non-empty list is needed"),
        ({"prompt": "Hi", "model": "m", "temperature": 1}, "temperature: is no field of a row"),
        (OPENAI, "custom_id 'a' stands in line 1 already"),
        ({**OPENAI, "url": []}, "url: only POST to"),
        ({**OPENAI, "model": "other"}, "model: is given twice, as m and other"),
        ({**OPENAI, "prompt": "Hi"}, "prompt: is given beside messages"),
        ({"prompt": "Hi", "messages": HI, "model": "m"}, "prompt: is given beside messages"),
        ({"prompt": 5, "model": "m"}, "prompt: is not a text"),
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
        failed = job_of(second, files)
        files.write(answer(first, files))
        files.write(failure(second, files))
    paths[1].write_bytes(paths[1].read_bytes() + b'{"id":"batch_req_torn by a de')
    with BatchFiles.open(*paths) as files:
        assert (files.batch_id, files.rows, files.answered) == (batch_id, 4, 1)
        assert [row.custom_id for row in files.pending()] == ["r1", "r2", "r3"]
        assert job_of(second, files) != failed, "what failed is another job the next time"
        assert job_of(first, files) == job_id_of(batch_id, "r0", 0)
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


def test_the_error_file_holds_the_last_failure_of_each_row_without_an_answer(tmp_path: Path) -> None:
    paths = (write(tmp_path / "in.jsonl", OPENAI, {**OPENAI, "custom_id": "b"}), tmp_path / "out", tmp_path / "err")
    for _ in range(120):
        with BatchFiles.open(*paths) as files:
            for row in files.pending():
                files.write(failure(row, files))
    assert [json.loads(line)["custom_id"] for line in paths[2].read_bytes().splitlines()] == ["a", "b"]
    with BatchFiles.open(*paths) as files:
        first, second = files.pending()
        assert files.tries(first) == 120
        files.write(answer(first, files))
        files.write(failure(second, files))
    assert [json.loads(line)["custom_id"] for line in paths[2].read_bytes().splitlines()] == ["b"]
    with BatchFiles.open(*paths) as files:
        files.write(answer(second, files))
    assert not paths[2].exists()


def test_what_failed_tries_have_cost_is_remembered_when_their_lines_are_gone(tmp_path: Path) -> None:
    paths = (write(tmp_path / "in.jsonl", OPENAI, {**OPENAI, "custom_id": "b"}), tmp_path / "out", tmp_path / "err")
    for currency in ("USD", "CNY"):
        with BatchFiles.open(*paths) as files:
            first, _ = files.pending()
            files.write(failure(first, files, usage=usage(output_tokens=3, cost=0.5, currency=currency)))
    before = paths[2].read_bytes()
    with BatchFiles.open(*paths) as files:
        assert (dict(files.spent), dict(files.tokens)) == ({"USD": 0.5, "CNY": 0.5}, {"output_tokens": 6})
        files.write(answer(first, files, usage=usage(output_tokens=4, cost=0.25, currency="USD")))
    assert not paths[2].exists()
    for left in (b"", before):  # the second is what a death leaves before it tidies up
        paths[2].write_bytes(left)
        with BatchFiles.open(*paths) as files:
            assert (dict(files.spent), dict(files.tokens)) == ({"USD": 0.75, "CNY": 0.5}, {"output_tokens": 10})


def test_a_row_that_is_added_to_the_input_meanwhile_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", OPENAI)
    with (
        pytest.raises(BadInput, match=r"in\.jsonl, line 2: was not there when the file was checked"),
        BatchFiles.open(source, tmp_path / "out", tmp_path / "err") as files,
    ):
        write(source, OPENAI, {**OPENAI, "custom_id": "b"})
        list(files.pending())


def test_an_input_that_has_no_name_goes_by_the_one_it_is_given(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", OPENAI, OPENAI)
    for text in (source.read_text(), "{", ""):
        source.write_text(text)
        with pytest.raises(BadInput, match=r"^standard input, line \d: "):
            with BatchFiles.open(source, tmp_path / "out", tmp_path / "err", source_name="standard input"):
                pass


def test_looking_changes_nothing(tmp_path: Path) -> None:
    source, out, err = write(tmp_path / "in.jsonl", OPENAI), tmp_path / "out", tmp_path / "err"
    with BatchFiles.open(source, out, err, check_only=True) as files:
        assert (files.rows, files.answered) == (1, 0)
    assert not out.exists()
    assert not err.exists()
    with BatchFiles.open(source, out, err) as files:
        files.write(answer(next(files.pending()), files))
        with (
            pytest.raises(InvalidRequest, match="another run writes"),
            BatchFiles.open(source, out, tmp_path / "other"),
        ):
            pass
    torn = out.read_bytes() + b'{"id":"batch_req_torn'
    out.write_bytes(torn)
    with BatchFiles.open(source, out, err, check_only=True) as files:
        assert files.answered == 1
    assert out.read_bytes() == torn


@pytest.mark.parametrize("text", ['{"prompt": "Hi"}', "some words", '{"prompt": "Hi"}\n'])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, text: str) -> None:
    other = tmp_path / "prompts.jsonl"
    other.write_text(text)
    source = write(tmp_path / "in.jsonl", OPENAI)
    for output, errors in ((other, tmp_path / "err"), (tmp_path / "out", other)):
        with pytest.raises(BadInput, match=r"line 1: is no line"), BatchFiles.open(source, output, errors):
            pass
    assert other.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "prompts.jsonl"]
    with pytest.raises(InvalidRequest, match="is the input already"), BatchFiles.open(source, source, other):
        pass


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    for data in (b"nope", gzip.compress(json.dumps(OPENAI).encode())[:-12]):
        path.write_bytes(data)
        with pytest.raises(BadInput, match="can not be unpacked"):
            list(read_rows(path))


def test_speech_sources_and_a_cut_answer_are_in_the_line() -> None:
    source = {"type": "url_citation", "url": "https://example.org"}
    generation = Generation(
        status="completed", content="Hi", pcm=b"\0\0", transcript="Hi", annotations=(source,), finish_reason="length"
    )
    chat, response = (
        json.loads(Outcome(Row(1, "a", "m", api, {}), "j-0", generation, 1.0).line())["response"]["body"]
        for api in ("chat", "responses")
    )
    message = chat["choices"][0]["message"]
    assert base64.b64decode(message["audio"]["data"]) == generation.audio
    assert (message["audio"]["transcript"], message["annotations"]) == ("Hi", [source])
    text, speech = response["output"][0]["content"]
    assert (text["annotations"], speech["transcript"]) == ([source], "Hi")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


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
