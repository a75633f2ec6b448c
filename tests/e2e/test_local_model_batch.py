"""A batch over a real model, in OpenAI's format, whose output the `openai` package reads."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from deltafan_cli._local_model import local_model
from support.workers import settings_env, worker_process

pytestmark = pytest.mark.model
ROWS = 50


def row(number: int) -> dict[str, Any]:
    """Every other one for the other API."""
    question, brief = f"What comes after the number {number}?", {"model": "sim/smollm2", "temperature": 0}
    if number % 2:
        body: dict[str, Any] = {**brief, "input": question, "max_output_tokens": 12}
        return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/responses", "body": body}
    body = {**brief, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def run(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deltafan_cli", "batch", "run", *args]
    return subprocess.run(command, check=False, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


async def test_fifty_rows_of_both_apis_are_answered_as_openai_would(redis_url: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row(number)) + "\n" for number in range(ROWS)))
    with local_model() as url:
        env = settings_env(redis_url, url, tmp_path)
        with worker_process(env):
            done = await asyncio.to_thread(run, env, "-i", str(source), "-o", str(output), "--ordered", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"r{number}" for number in range(ROWS)]
    assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in lines)
    chats = [ChatCompletion.model_validate(line["response"]["body"], strict=True) for line in lines[::2]]
    responses = [Response.model_validate(line["response"]["body"]) for line in lines[1::2]]
    assert all(chat.choices[0].message.content and chat.usage and chat.usage.prompt_tokens for chat in chats)
    assert all(response.output_text and response.usage for response in responses)
    summary = json.loads(done.stdout)
    output_tokens = [chat.usage.completion_tokens for chat in chats if chat.usage]
    output_tokens += [response.usage.output_tokens for response in responses if response.usage]
    assert summary["output_tokens"] == sum(output_tokens), "the summary is the sum of the answers"
