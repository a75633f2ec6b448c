import asyncio

from openai import AsyncOpenAI

from deltafan.testing import Answer, Reasoning, Text, scripted_upstream


async def main() -> None:
    async with scripted_upstream() as upstream, AsyncOpenAI(api_key="any", base_url=upstream.url) as client:
        upstream.then(Answer([Reasoning("A greeting."), Text("Hello"), Text("!")]))
        stream = await client.responses.create(model="sim", input="Hi", stream=True)
        print([event.delta async for event in stream if event.type == "response.output_text.delta"])
        print(upstream.requests[0].path, upstream.requests[0].body["input"])


asyncio.run(main())
