"""The three upstream APIs, their providers and their failures, over real HTTP."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
from aiohttp import web
from redis.asyncio import Redis

from deltafan import Consumer, Event, Generation, JobFailed, Producer, fold
from deltafan.testing import (
    Answer,
    Audio,
    Cut,
    Fault,
    Gap,
    Raw,
    Reasoning,
    Refusal,
    Refuse,
    ScriptedUpstream,
    Text,
    Tokens,
    ToolCall,
    chat,
    simulated_delay,
)
from deltafan_worker._leased import LeasedWorker
from support.waiting import wait_until
from support.workers import running_worker, settings_env

HI = [{"role": "user", "content": "Hi"}]
APIS = ("chat", "responses", "dashscope")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ANSWERS = {
    "text": Answer([Text("Hel"), Text("lo"), Text("!")]),
    "thinking": Answer(
        [Reasoning("Hm"), Reasoning("."), Text("Yes"), Text(".")], usage=Tokens(9, 7, cached_input=4, reasoning=3)
    ),
    "tools": Answer(
        [
            Reasoning("Let me see."),
            ToolCall("call_1", "weather", ['{"city":', ' "Oslo"}']),
            ToolCall("call_2", "weather", ['{"city": "Rome"}']),
        ],
        finish="tool_calls",
    ),
    "cut short": Answer([Text("Once upon")], finish="length"),
    "silent": Answer([Text("Hi")], usage=None),
}


async def read(consumer: Consumer, job_id: str) -> list[Event]:
    async with consumer.tail(job_id) as events:
        return [event async for event in events]


@asynccontextmanager
async def serving(answer: Handler) -> AsyncIterator[str]:
    """The base URL of a model server that answers so."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


def comparable(generation: Generation) -> Generation:
    """What must not depend on the API: all but the names of API and call, the raw usage and the clock.

    A detail that one API reports as 0 is left out by another.
    """
    usage = generation.usage
    assert usage is not None
    details = ("cached_input_tokens", "cache_write_tokens", "reasoning_tokens")
    counts: dict[str, Any] = {name: getattr(usage, name) or 0 for name in details}
    own: dict[str, Any] = {
        "job_id": "",
        "call_id": "",
        "attempt": 0,
        "provider": "",
        "api": "",
        "response_id": None,
        "raw": None,
    }
    clock: dict[str, Any] = {"started_at_ms": 0, "queued_ms": 0, "first_delta_ms": 0, "duration_ms": 0}
    return replace(generation, position=None, provider="", api="", usage=replace(usage, **own, **clock, **counts))


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_all_apis_give_the_same_events_and_the_same_bill(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, answer: Answer
) -> None:
    upstream.standing = answer
    events, generations = [], []
    for api in APIS:
        job = await producer.submit(model="sim", messages=HI, api=api)
        stream = await read(consumer, job.id)
        assert fold(stream) == await consumer.result(job.id)
        events.append([(event.type, event.data) for event in stream if event.is_delta])
        generations.append(comparable(fold(stream)))
    assert [request.path.rpartition("/")[2] for request in upstream.requests] == [
        "completions",
        "responses",
        "generation",
    ]
    assert events[0] == events[1] == events[2]
    assert generations[0] == generations[1] == generations[2]
    assert (generations[0].content, generations[0].reasoning) == (answer.text, answer.reasoning)


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_the_dialect_of_dashscopes_compatible_mode(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, api: str
) -> None:
    upstream.standing = ANSWERS["tools"]
    result = await consumer.result((await producer.submit(model="compatible/q", messages=HI, api=api)).id, timeout=10)
    assert [(call.id, call.name) for call in result.tool_calls] == [("call_1", "weather"), ("call_2", "weather")]


@pytest.mark.parametrize("api", APIS)
async def test_an_error_inside_a_200_is_the_jobs_failure(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, api: str
) -> None:
    upstream.standing = Answer([Text("Once"), Fault("data_inspection_failed", "inappropriate", status=400)])
    job = await producer.submit(model="sim", messages=HI, api=api)
    with pytest.raises(JobFailed, match="inappropriate") as caught:
        await consumer.result(job.id, timeout=10)
    assert caught.value.generation.content == "Once", "and never shown as text"
    assert len(upstream.requests) == 1, "nor asked again"


@pytest.mark.parametrize("api", APIS)
async def test_an_answer_that_is_cut_starts_over(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, api: str
) -> None:
    upstream.then(Answer([Text("Goodb"), Cut()]))
    job = await producer.submit(model="sim", messages=HI, api=api)
    result = await consumer.result(job.id, timeout=10)
    assert (result.content, result.attempt_no) == ("Hello, world!", 2)


async def test_a_refusal_is_told_apart_from_text(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = Answer([Refusal("I can"), Refusal("not.")])
    for api in ("chat", "responses"):
        result = await consumer.result((await producer.submit(model="sim", messages=HI, api=api)).id, timeout=10)
        assert (result.refusal, result.content) == ("I cannot.", "")


@pytest.mark.parametrize("status", [400, 200])
async def test_a_model_on_dashscopes_other_path_is_found_there_and_remembered(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.wrong_path_status = status
    for _ in range(2):
        job = await producer.submit(model="native/multimodal-vq", messages=HI, api="dashscope")
        result = await consumer.result(job.id, timeout=10)
        assert (result.content, result.attempt_no) == ("Hello, world!", 1)
    paths = [request.path.split("/")[-2] for request in upstream.requests]
    assert paths in (
        ["text-generation", "multimodal-generation", "multimodal-generation"],
        ["multimodal-generation"] * 2,
    )


async def test_dashscopes_native_request(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    body = {"parameters": {"enable_thinking": True, "incremental_output": False}}
    for model in ("qwen-plus", "qwen-vl-max"):
        job = await producer.submit(model=f"native/{model}", messages=HI, api="dashscope", body=body)
        await consumer.result(job.id, timeout=10)
    text, multimodal = upstream.requests
    parameters = {"enable_thinking": True, "incremental_output": True, "result_format": "message"}
    assert text.body == {"model": "qwen-plus", "input": {"messages": HI}, "parameters": parameters}
    assert multimodal.body["input"] == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}
    assert (text.headers["X-DashScope-SSE"], text.headers["Accept"]) == ("enable", "text/event-stream")


async def test_an_api_that_no_provider_speaks_is_named(
    producer: Producer, consumer: Consumer, worker: LeasedWorker
) -> None:
    job = await producer.submit(model="native/x", messages=HI, api="responses")
    with pytest.raises(JobFailed, match="native speaks dashscope") as caught:
        await consumer.result(job.id, timeout=10)
    assert caught.value.generation.failure is not None
    assert caught.value.generation.failure.code == "unsupported_api"


async def test_speech_is_a_wav_file(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    pcm = bytes(range(100))
    upstream.standing = Answer([Text("Hi"), Audio(pcm[:30]), Audio(pcm[30:])])
    body = {"modalities": ["text", "audio"], "audio": {"voice": "Cherry", "format": "wav"}}
    job = await producer.submit(model="sim", messages=HI, body=body)
    result = await consumer.result(job.id, timeout=10)
    assert result.audio is not None
    assert (result.pcm, result.audio[:4], result.audio[44:]) == (pcm, b"RIFF", pcm)
    assert result == fold(await read(consumer, job.id))


REFUSED_KEY = chat.refusal("invalid_api_key", "Incorrect API key provided", 401)


@pytest.mark.parametrize(
    "refusal", [REFUSED_KEY, Refuse(404, b"{}"), chat.refusal("insufficient_quota", "exceeded your current quota", 429)]
)
async def test_what_is_one_providers_own_trouble_leads_to_the_next(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, refusal: Refuse
) -> None:
    upstream.then(refusal)
    result = await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=10)
    assert (result.content, len(upstream.requests)) == ("Hello, world!", 2)
    assert result.usage is not None
    assert result.usage.provider == "other"


async def test_what_is_the_requests_own_fault_is_asked_nowhere_else(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = chat.refusal("invalid_request_error", "temperature must be below 2", 400)
    with pytest.raises(JobFailed, match="temperature"):
        await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=10)
    assert len(upstream.requests) == 1


async def test_oddity_28_a_refusal_in_the_form_of_a_stream(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    text = (
        b'data: {"error":{"code":"data_inspection_failed","message":"may contain inappropriate content"},"id":"c"}\n\n'
    )
    upstream.standing = Refuse(400, text, {"Content-Type": "text/event-stream"})
    with pytest.raises(JobFailed, match="inappropriate content") as caught:
        await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
    assert caught.value.generation.failure is not None
    assert caught.value.generation.failure.code == "data_inspection_failed"


@pytest.mark.parametrize("api", APIS)
async def test_oddity_29_one_object_instead_of_a_stream(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, api: str
) -> None:
    whole = {
        "chat": b'{"choices":[{"index":0,"message":{"content":"Hi"},"finish_reason":"stop"}]}',
        "responses": b'{"object":"response","status":"completed","output":'
        b'[{"type":"message","content":[{"type":"output_text","text":"Hi"}]}]}',
        "dashscope": b'{"output":{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}}',
    }
    upstream.standing = Refuse(200, whole[api], {"Content-Type": "application/json"})
    result = await consumer.result((await producer.submit(model="sim", messages=HI, api=api)).id, timeout=10)
    assert (result.content, result.finish_reason) == ("Hi", "stop")


async def test_oddity_29_the_label_does_not_tell_an_object_from_a_stream(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    whole = b'\r\n\n {"choices":[{"index":0,"message":{"content":"Hi"},"finish_reason":"stop"}]}'
    stream = b"".join(map(chat.frame, chat.text("Hi")))
    upstream.then(Refuse(200, whole, {"Content-Type": "text/plain"}))
    upstream.then(Refuse(200, stream, {"Content-Type": "application/json"}))
    for _ in range(2):
        result = await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
        assert (result.content, result.attempt_no) == ("Hi", 1)
    assert len(upstream.requests) == 2


LONG = "x" * (1 << 20)


@pytest.mark.parametrize("steps", [chat.text(LONG), [chat.delta(content=LONG), *chat.ending()]], ids=["later", "first"])
async def test_oddity_10_a_line_of_a_mebibyte_over_http(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, steps: list[chat.Step]
) -> None:
    upstream.standing = steps
    result = await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
    assert (len(result.content), result.attempt_no) == (1 << 20, 1)


async def test_a_refusal_is_read_to_its_end(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    body = b'{"error": {"message": "temperature must be below 2", "code": "invalid_request_error"}}'

    async def refuse(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=400)
        await response.prepare(http)
        for byte in body:
            await response.write(bytes([byte]))
            await simulated_delay(0)
        return response

    async with serving(refuse) as url, running_worker(settings_env(env["DELTAFAN_REDIS_URL"], url, tmp_path)):
        with pytest.raises(JobFailed, match="temperature"):
            await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)


async def test_oddity_12_a_compressed_stream(
    producer: Producer, consumer: Consumer, redis_url: str, tmp_path: Path
) -> None:
    stream = b"".join(map(chat.frame, chat.text("Hello, ", "world!")))

    async def answer(_request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/event-stream;charset=UTF-8", "Content-Encoding": "gzip"}
        return web.Response(body=gzip.compress(stream), headers=headers)

    async with serving(answer) as url, running_worker(settings_env(redis_url, url, tmp_path)):
        result = await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
    assert result.content == "Hello, world!"


async def test_oddity_11_comments_do_not_keep_a_silent_answer_alive(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.standing = [chat.delta(content="Hi"), *[Raw(b": keep-alive\n\n")] * 3, gate]
    limits = {"silence_s": 0.3}
    job = await producer.submit(model="sim", messages=HI, timeouts=limits, on_interrupt="fail")
    with pytest.raises(JobFailed, match="silence_timeout"):
        await consumer.result(job.id, timeout=10)


async def test_oddity_11_comments_are_not_taken_for_data_while_they_come(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    comments: list[chat.Step] = [step for _ in range(25) for step in (Raw(b": ping\n\n"), Gap(0.1))]
    upstream.standing = [chat.delta(content="Hi"), *comments, *chat.text("late")]
    job = await producer.submit(model="sim", messages=HI, timeouts={"silence_s": 0.5}, on_interrupt="fail")
    with pytest.raises(JobFailed, match="silence_timeout"):
        await consumer.result(job.id, timeout=10)


async def test_oddity_11_data_without_a_delta_keeps_an_answer_alive_that_has_begun(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    thinking: list[chat.Step] = [step for _ in range(8) for step in (chat.delta(), Gap(0.1))]
    upstream.standing = [chat.delta(content="Hi"), *thinking, *chat.ending()]
    job = await producer.submit(model="sim", messages=HI, timeouts={"silence_s": 0.5}, on_interrupt="fail")
    assert (await consumer.result(job.id, timeout=10)).content == "Hi"


async def test_oddity_11_data_without_a_delta_does_not_stand_for_the_first_one(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    thinking: list[chat.Step] = [step for _ in range(25) for step in (chat.delta(), Gap(0.1))]
    upstream.standing = [*thinking, *chat.text("late")]
    async with running_worker({**env, "DELTAFAN_MAX_RETRIES": "0"}):
        job = await producer.submit(model="sim", messages=HI, timeouts={"first_delta_s": 0.5})
        with pytest.raises(JobFailed, match="first_delta_timeout"):
            await consumer.result(job.id, timeout=10)


FINISH = chat.chunk({"delta": {}, "finish_reason": "stop"})


@pytest.mark.parametrize(
    ("rest", "timeouts"),
    [
        ([Cut()], {}),
        ([asyncio.Event()], {"total_s": 0.5}),
        ([asyncio.Event()], {"silence_s": 0.5}),
        ([Raw(b": still here\n\n"), asyncio.Event()], {}),
    ],
    ids=["cut", "total", "silence", "last words"],
)
async def test_an_answer_that_is_whole_stands_whatever_becomes_of_its_connection(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    rest: list[chat.Step],
    timeouts: dict[str, float],
) -> None:
    monkeypatch.setattr("deltafan_worker._upstream.LAST_WORDS_S", 60.0 if timeouts else 0.5)
    upstream.standing = [chat.delta(content="Hi"), FINISH, *rest]
    job = await producer.submit(model="sim", messages=HI, timeouts=timeouts)
    result = await consumer.result(job.id, timeout=10)
    assert (result.content, result.finish_reason, result.attempt_no) == ("Hi", "stop", 1)
    assert len(upstream.requests) == 1, "and is not paid for twice"


async def test_usage_is_waited_for_behind_the_finish(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = [chat.delta(content="Hi"), FINISH, Gap(0.3), chat.chunk(None, usage=chat.USAGE), chat.DONE]
    result = await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
    assert result.usage is not None
    assert result.usage.source == "provider"


@pytest.mark.parametrize(("limit", "code"), [("first_delta_s", "first_delta_timeout"), ("total_s", "total_timeout")])
async def test_a_job_has_its_own_limits(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    limit: str,
    code: str,
) -> None:
    upstream.standing = [asyncio.Event()]
    async with running_worker({**env, "DELTAFAN_MAX_RETRIES": "0"}):
        job = await producer.submit(model="sim", messages=HI, timeouts={limit: 0.2})
        with pytest.raises(JobFailed, match=code):
            await consumer.result(job.id, timeout=10)


async def test_the_limit_on_connecting_covers_the_search_for_an_address(
    producer: Producer, consumer: Consumer, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(aiohttp.abc.AbstractResolver):
        async def resolve(self, *_: object, **__: object) -> NoReturn:
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None:
            pass

    monkeypatch.setattr("aiohttp.connector.DefaultResolver", lambda **_: Silent())
    async with running_worker(settings_env(redis_url, "http://model.test/v1", tmp_path, max_retries=0)):
        job = await producer.submit(model="other/x", messages=HI, timeouts={"connect_s": 0.3})
        with pytest.raises(JobFailed, match="connect_timeout"):
            await consumer.result(job.id, timeout=10)


async def test_a_provider_that_asks_for_less_is_left_alone_by_the_whole_fleet(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    clock = asyncio.get_running_loop().time
    upstream.then(replace(chat.refusal("rate_limit_exceeded", "slow down", 429), headers={"Retry-After": "1"}))
    async with running_worker(env) as refused:
        first = await producer.submit(model="sim", messages=HI)
        await wait_until(lambda: redis.exists("deltafan:cooldown:sim/sim"), "the fleet is told")
        told = clock()
        refused.drain()
        async with running_worker(env):
            second = await producer.submit(model="sim", messages=HI)
            await wait_until(lambda: len(upstream.requests) > 1, "somebody asks again")
            assert clock() - told > 0.8, "nobody asked while it cooled down"
            for job in (first, second):
                assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


async def test_a_shorter_cool_down_leaves_a_longer_one_as_it_is(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    """Another worker has been told to wait for a minute, and this one did not know when it asked."""
    key = "deltafan:cooldown:sim/double"
    gate = asyncio.Event()
    upstream.then([gate, chat.error("rate_limit_exceeded", "slow down")])
    job = await producer.submit(model="double", messages=HI)
    await asyncio.wait_for(upstream.arrived.wait(), 10)
    await redis.set(key, 1, px=60_000)
    gate.set()
    assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"
    assert await redis.pttl(key) > 30_000


@pytest.mark.parametrize("seconds", ["9999999999", "1e25"])
async def test_no_provider_closes_itself_to_batch_jobs_for_years(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, seconds: str
) -> None:
    refusal = replace(chat.refusal("rate_limit_exceeded", "slow down", 429), headers={"Retry-After": seconds})
    upstream.then(refusal)
    await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=10)

    async def closed() -> Any:
        return [limit for limit in await producer.limits() if limit.name == "sim/double" and limit.closed_s]

    await wait_until(closed, "the fleet is told")
    (limit,) = await closed()
    assert 3000 < limit.closed_s <= 3600


BUSY = replace(chat.refusal("rate_limit_exceeded", "slow down", 429), headers={"Retry-After": "0.5"})


@pytest.mark.parametrize("lane", ["interactive", "batch"])
async def test_a_broken_backup_does_not_make_a_short_refusal_permanent(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, lane: Any
) -> None:
    upstream.then(BUSY, REFUSED_KEY)
    result = await consumer.result((await producer.submit(model="double", messages=HI, lane=lane)).id, timeout=10)
    assert result.usage is not None
    assert (result.content, result.usage.provider) == ("Hello, world!", "sim")
    assert len(upstream.requests) == 3


async def test_of_several_providers_failures_the_one_that_passes_is_told(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    """A refusal that asks for too long a wait is not worth a slot; the caller may come again."""
    upstream.then(replace(BUSY, headers={"Retry-After": "600"}), REFUSED_KEY)
    async with running_worker(env):
        with pytest.raises(JobFailed, match="slow down") as caught:
            await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=10)
    failure = caught.value.generation.failure
    assert failure is not None
    assert (failure.code, failure.retryable, len(upstream.requests)) == ("rate_limit_exceeded", True, 2)


async def test_a_provider_that_stays_busy_is_not_asked_for_ever(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.standing = replace(BUSY, headers={"Retry-After": "0.01"})
    async with running_worker({**env, "DELTAFAN_MAX_RETRIES": "1"}):
        with pytest.raises(JobFailed, match="slow down"):
            await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=20)
    assert len(upstream.requests) == 5


async def test_a_provider_that_cools_down_is_passed_over(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    await redis.set("deltafan:cooldown:sim/double", 1, px=60_000)
    result = await consumer.result((await producer.submit(model="double", messages=HI)).id, timeout=5)
    assert result.usage is not None
    assert (result.usage.provider, len(upstream.requests)) == ("other", 1)


KEY, PROMPT, ANSWER = "sk-planted-key", "planted-prompt", "planted-answer"


@pytest.mark.parametrize(
    "script",
    [
        Answer([Text(ANSWER), Reasoning(ANSWER), Refusal(ANSWER), ToolCall("c", "f", [ANSWER])]),
        Answer([Text(ANSWER), Audio(b"12", ANSWER), Cut()]),
        chat.refusal("invalid_request_error", f"can not read {PROMPT}", 400),
        chat.refusal("invalid_api_key", f"Incorrect API key provided: {KEY}. Sent: Bearer {KEY}", 401),
        Refuse(401, f"no such key: {KEY}".encode()),
        Answer([Text(ANSWER), Fault(f"bad {KEY}", f"{KEY} may not ask {PROMPT}")]),
        chat.refusal("insufficient_quota", f"{KEY} exceeded your current quota", 429),
        [Raw(b"data: " + ANSWER.encode() + b"\n\n")],
    ],
    ids=["answer", "cut", "prompt", "key", "text", "fault", "quota", "frame"],
)
async def test_no_key_no_prompt_and_no_answer_is_in_a_log_a_repr_or_an_error(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    redis: Redis,
    caplog: pytest.LogCaptureFixture,
    script: Answer | Refuse | list[chat.Step],
) -> None:
    caplog.set_level(logging.DEBUG)
    upstream.standing = script
    env |= {"SIM_KEY": KEY, "DELTAFAN_MAX_ATTEMPTS": "1", "DELTAFAN_MAX_RETRIES": "0"}
    async with running_worker(env):
        job = await producer.submit(model="keyed/x", messages=[{"role": "user", "content": [{"text": PROMPT}]}])
        events = await read(consumer, job.id)
        try:
            shown = repr(await consumer.result(job.id, timeout=10))
        except JobFailed as error:
            shown = f"{error} {error!r} {error.generation!r} {error.generation.failure}"
        shown += f"{events} {[(event.tool_call, event.audio, event.failure) for event in events]}"
    assert upstream.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    shown += "\n".join(record.getMessage() + str(record.exc_info) for record in caplog.records)
    for secret in (KEY, PROMPT, ANSWER):
        assert secret not in shown
    kept = [await redis.dump(key) for key in await redis.keys("*")]
    assert not any(KEY.encode() in data for data in kept), "nor is the key anywhere on the server"


async def test_no_key_is_told_of_a_background_response_either(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    """Read on by a second attempt, since the first has lost it."""
    upstream.standing = Answer([Text("Hi"), Cut(), Fault("invalid_prompt", f"{KEY} may not ask {PROMPT}")])
    upstream.then_refuse_retrieving(Refuse(503))
    async with running_worker({**env, "SIM_KEY": KEY, "DELTAFAN_MAX_RETRIES": "0"}):
        messages = [{"role": "user", "content": PROMPT}]
        options: Any = {"api": "responses", "on_interrupt": "continue"}
        job = await producer.submit(model="secret/x", messages=messages, **options)
        with pytest.raises(JobFailed, match=r"\*\*\* may not ask \*\*\*") as caught:
            await consumer.result(job.id, timeout=10)
    assert caught.value.generation.attempt_no == 2
