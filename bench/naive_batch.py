"""What one writes by hand: a semaphore, and the `openai` client for each row.

`python bench/naive_batch.py INPUT OUTPUT BASE_URL MODEL CONCURRENCY stream|whole`: all rows and answers in one process.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    """Answer every row."""
    source, output, base_url, model, concurrency, kind = sys.argv[1:]
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    with Path(output).open("w") as file:
        asyncio.run(answer_all(rows, file, Calls(base_url, model, kind == "stream"), int(concurrency)))


@dataclass(frozen=True)
class Calls:
    """How each row is asked for."""

    base_url: str
    model: str
    is_streamed: bool

    async def ask(self, client: AsyncOpenAI, prompt: str) -> str:
        """The answer's text."""
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": prompt}]
        if not self.is_streamed:
            answer = await client.chat.completions.create(model=self.model, messages=messages)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(model=self.model, messages=messages, stream=True)
        text = ""
        async for chunk in stream:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return text


async def answer_all(rows: list[dict[str, str]], file: TextIO, calls: Calls, concurrency: int) -> None:
    """A task for each row, so many of them at once behind the semaphore."""
    room = asyncio.Semaphore(concurrency)
    async with AsyncOpenAI(base_url=calls.base_url, api_key="none", timeout=600) as client:

        async def answer(row: dict[str, str]) -> None:
            async with room:
                text = await calls.ask(client, row["prompt"])
            file.write(json.dumps({"custom_id": row["id"], "content": text}) + "\n")

        await asyncio.gather(*[answer(row) for row in rows])


if __name__ == "__main__":
    main()
