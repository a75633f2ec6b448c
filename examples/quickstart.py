import asyncio

from deltafan import Consumer, Producer


async def main() -> None:
    async with Producer.connect() as producer, Consumer.connect() as consumer:
        job = await producer.submit(model="smollm2", messages=[{"role": "user", "content": "Hi!"}])
        async with consumer.tail(job.id) as events:
            async for event in events:
                print(event.text, end="", flush=True)


asyncio.run(main())
