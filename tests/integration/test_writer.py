"""A job's writer and the connection it writes on, where the server, the network or the order of things is unkind."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from functools import partial

import pytest
from redis.asyncio import Redis

from deltafan import Producer, Retention
from deltafan._resp import Handler, RespConnection
from deltafan_worker import _publisher
from deltafan_worker._interrupt import Interrupt
from deltafan_worker._publisher import Publisher
from deltafan_worker._writer import Begun, Ended, NotOurs, RunLimits, Sealed, StreamWriter
from support.proxy import tcp_proxy
from support.valkey import Valkey, valkey_server
from support.waiting import wait_until
from support.writing import CALL, END, begun, publishing, say

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def publisher(redis_url: str) -> AsyncIterator[Publisher]:
    async with publishing(redis_url) as publisher:
        yield publisher


async def texts(redis: Redis, writer: StreamWriter) -> list[str]:
    entries = await redis.xrange(writer.events_key)
    return [fields[b"data"].decode() for _, fields in entries if fields[b"type"] == b"content"]


async def test_what_many_streams_have_at_once_goes_out_in_flushes_of_a_bounded_size(
    redis: Redis, publisher: Publisher, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [await begun(publisher, producer, f"j{number}") for number in range(9)]
    await begun(publisher, producer, "another")  # whoever began last is the first to be asked what it has
    sent: list[bytes] = []
    send = RespConnection.send

    def noting(connection: RespConnection, data: bytes, handlers: Iterable[Handler]) -> None:
        sent.append(data)
        send(connection, data, handlers)

    monkeypatch.setattr(RespConnection, "send", noting)
    for writer in writers:
        say(writer, "x" * 100_000)

    async def are_there() -> bool:
        return all([len(await texts(redis, writer)) == 1 for writer in writers])

    await wait_until(are_there, "all of it is written")
    flushes = [[n for n in range(9) if b"{j%d}" % n in data] for data in sent if b"XADD" in data]
    assert flushes == [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "in the order in which they came"


async def test_a_connection_that_is_lost_with_many_flushes_to_come_gives_them_to_the_next(
    redis: Redis, valkey: Valkey, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_publisher, "_FLUSH_BYTES", 1)
    async with tcp_proxy(valkey.port) as proxy, publishing(proxy.url) as publisher:
        writers = [await begun(publisher, producer, f"j{number}") for number in range(500)]
        proxy.pause()
        for writer in writers:
            say(writer, "Hello")
        proxy.cut()
        proxy.resume()

        async def are_there() -> bool:
            return all([await redis.xlen(writer.events_key) == 2 for writer in writers])

        await wait_until(are_there, "all of it is written")


async def test_a_missing_replica_holds_up_nobody_else(redis: Redis, redis_url: str, producer: Producer) -> None:
    async with publishing(redis_url, replicas=1, timeout_ms=300) as publisher:
        ending, other = await begun(publisher, producer, "ending"), await begun(publisher, producer, "other")
        async with asyncio.TaskGroup() as tasks:
            finished = tasks.create_task(ending.finish(lambda _: END))
            await wait_until(lambda: redis.exists("deltafan:{ending}:result"), "the end is written")
            for number in range(5):
                say(other, str(number))

                async def is_there(count: int = number + 1) -> bool:
                    return len(await texts(redis, other)) == count

                await wait_until(is_there, "the others' deltas pass")
            assert not finished.done(), "it still waits for its replica"
        verdict = finished.result()
        assert isinstance(verdict, Ended), "though not for ever"
        assert verdict.status == "completed"


async def test_a_replica_that_has_the_end_is_not_waited_for(
    valkey: Valkey, redis: Redis, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    with valkey_server() as copy:
        async with Redis.from_url(copy.url) as replica:
            await redis.config_set("repl-diskless-sync-delay", "0")
            await replica.replicaof("127.0.0.1", str(valkey.port))

            async def is_in_step() -> bool:
                return bool((await redis.info("replication")).get("slave0", {}).get("state") == "online")

            # A primary counts a replica long before it has sent it all that there is.
            await wait_until(is_in_step, "the replica is there")
            async with publishing(valkey.url, replicas=1, timeout_ms=8000) as publisher:
                writers = [await begun(publisher, producer, f"j{number}") for number in range(20)]
                async with asyncio.timeout(6):
                    await asyncio.gather(*[writer.finish(lambda _: END) for writer in writers])
            assert "fewer than" not in caplog.text
            for writer in writers:
                assert await replica.exists(f"deltafan:{{{writer.job_id}}}:result")
            await replica.replicaof("NO", "ONE")


async def test_a_server_that_does_not_let_us_wait_for_replicas_holds_up_nothing(
    redis: Redis, redis_url: str, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.execute_command("ACL", "SETUSER", "hasty", "on", ">pw", "~*", "&*", "+@all", "-wait")
    async with publishing(redis_url.replace("//", "//hasty:pw@"), replicas=1, timeout_ms=10) as publisher:
        writer = await begun(publisher, producer, "j")
        async with asyncio.timeout(10):
            assert isinstance(await writer.finish(lambda _: END), Ended)
    assert "fewer than 1 replicas" in caplog.text
    await redis.execute_command("ACL", "DELUSER", "hasty")


async def test_replicas_that_can_not_be_asked_are_not_waited_for_for_ever(
    redis: Redis, valkey: Valkey, producer: Producer
) -> None:
    async with tcp_proxy(valkey.port) as proxy, publishing(proxy.url, replicas=1, timeout_ms=10) as publisher:
        writer = await begun(publisher, producer, "j")
        proxy.refuses = True
        async with asyncio.timeout(10):
            assert isinstance(await writer.finish(lambda _: END), Ended)


async def test_an_end_is_not_believed_while_its_server_is_away(
    redis: Redis, valkey: Valkey, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    async with tcp_proxy(valkey.port) as proxy, publishing(proxy.url, replicas=1, timeout_ms=10) as publisher:
        writer = await begun(publisher, producer, "j")
        proxy.refuses = True
        async with asyncio.TaskGroup() as tasks:
            finished = tasks.create_task(writer.finish(lambda _: END))
            await wait_until(lambda: redis.exists("deltafan:{j}:result"), "the end is written")
            proxy.cut()
            await wait_until(lambda: "going on" in caplog.text, "it has asked for long enough")
            assert not finished.done()
            await redis.delete("deltafan:{j}:events", "deltafan:{j}:state", "deltafan:{j}:result")
            proxy.refuses = False
        assert await redis.exists("deltafan:{j}:result"), "what a failover lost is written again"


@pytest.mark.parametrize("who_ends_it", ["the writer", "somebody else"])
async def test_the_heartbeat_leaves_the_lifetimes_of_a_job_that_has_ended(
    who_ends_it: str, redis: Redis, redis_url: str, producer: Producer
) -> None:
    retention = Retention().with_ttl(timedelta(seconds=60))
    async with publishing(redis_url, replicas=1, timeout_ms=10, beat_s=0.01) as publisher:
        writer = await begun(publisher, producer, "j", retention=retention)
        stream_ttl = partial(redis.ttl, writer.events_key)
        assert await stream_ttl() > 3600, "while it runs"
        if who_ends_it == "the writer":
            await writer.finish(lambda _: END)  # and waits for the replicas over many heartbeats
        else:
            await producer.cancel("j")
            later = StreamWriter(publisher, "j", 2, retention, Interrupt())
            assert isinstance(await later.begin(CALL, RunLimits()), Ended)
        await redis.config_resetstat()

        async def has_beaten() -> bool:
            return bool((await redis.info("commandstats")).get("cmdstat_hmget", {}).get("calls", 0) > 2)

        await wait_until(has_beaten, "the heart beats on until it is left")
        assert await stream_ttl() <= 60


async def test_a_heartbeat_behind_an_end_that_is_under_way_leaves_its_lifetimes(
    redis: Redis, redis_url: str, valkey: Valkey, producer: Producer
) -> None:
    retention = Retention().with_ttl(timedelta(seconds=60))
    async with publishing(redis_url, beat_s=10) as publisher:
        await (await begun(publisher, producer, "before")).finish(lambda _: END)  # the server has the script now
        writer = await begun(publisher, producer, "j", retention=retention)
        valkey.pause()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(writer.finish(lambda _: END))
            await wait_until(lambda: writer._asking, "it is sent")
            assert publisher._connection is not None
            publisher._beat_for(publisher._connection, (writer,))
            valkey.resume()
        await publisher.ask("PING")  # answered behind the heartbeat
    assert await redis.ttl(writer.events_key) <= 60


async def test_the_heartbeat_of_many_streams_comes_for_a_few_at_a_time(
    redis_url: str, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    portions: list[tuple[StreamWriter, ...]] = []
    async with publishing(redis_url, beat_s=0.05) as publisher:
        monkeypatch.setattr(publisher, "_beat_for", lambda _connection, portion: portions.append(portion))
        writers = {await begun(publisher, producer, f"j{n}") for n in range(40)}
        await wait_until(lambda: {writer for portion in portions for writer in portion} == writers, "a beat of each")
    assert max(map(len, portions)) == 16


async def test_the_heartbeat_renews_the_lifetimes_of_a_job_that_runs(
    redis: Redis, redis_url: str, producer: Producer
) -> None:
    async with publishing(redis_url, beat_s=0.01) as publisher:
        writer = await begun(publisher, producer, "j")
        connection = publisher._connection
        for _ in range(3):
            for key in (writer.events_key, writer.state_key):
                await redis.expire(key, 60)
                await wait_until(partial(lives_long, redis, key), f"{key} is renewed")
        assert publisher._connection is connection, "which is heard from all the time"


async def lives_long(redis: Redis, key: str) -> bool:
    return bool(await redis.ttl(key) > 3600)


async def test_a_large_output_on_a_slow_link_is_no_silence(redis: Redis, valkey: Valkey, producer: Producer) -> None:
    text = "x" * 1_000_000
    async with tcp_proxy(valkey.port) as proxy, publishing(proxy.url, beat_s=0.1) as publisher:
        writer = await begun(publisher, producer, "j")
        proxy.bytes_per_s = 2_000_000
        say(writer, text)
        async with asyncio.timeout(15):
            verdict = await writer.finish(lambda _: Sealed("completed", b"{}", text.encode(), b"{}"))
        assert isinstance(verdict, Ended)
        assert proxy.accepted == 1, "and its connection is left alone"
        assert await texts(redis, writer) == [text]


async def test_a_silent_connection_is_given_up_also_behind_a_large_output(
    redis: Redis, valkey: Valkey, producer: Producer
) -> None:
    async with tcp_proxy(valkey.port) as proxy, publishing(proxy.url, beat_s=0.1) as publisher:
        writer = await begun(publisher, producer, "j")
        say(writer, "x" * 3_000_000)
        await wait_until(lambda: publisher._taken_bytes > 3_000_000, "that is taken and counts no more")
        for size in (1, 500_000):
            accepted = proxy.accepted
            proxy.pause()
            say(writer, "x" * size)
            await wait_until(lambda count=accepted: proxy.accepted > count, "another is opened", timeout_s=3)  # type: ignore[misc]
            proxy.cut()
            proxy.resume()
            await wait_until(partial(is_all_sent, redis, writer), "and all is written on it")


async def is_all_sent(redis: Redis, writer: StreamWriter) -> bool:
    return len(await texts(redis, writer)) == len(writer.log)


async def test_a_server_that_can_not_be_reached_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async with tcp_proxy(1) as proxy, publishing(proxy.url):
        await wait_until(lambda: proxy.accepted > 2, "it has been tried again and again")
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert proxy.url in caplog.records[0].message


async def test_an_end_whose_state_is_gone_is_believed(redis: Redis, redis_url: str, producer: Producer) -> None:
    async with publishing(redis_url, replicas=1, timeout_ms=10) as publisher:
        await producer.submit(model="m", messages=HI, job_id="j")
        await redis.delete("deltafan:{j}:state")
        await redis.set("deltafan:{j}:result", "{}", px=10_000)
        writer = StreamWriter(publisher, "j", 1, Retention(), Interrupt())
        async with asyncio.timeout(10):
            verdict = await writer.begin(CALL, RunLimits())
    assert isinstance(verdict, Ended)
    assert verdict.status == "expired"


async def test_what_broke_off_is_in_the_stream_before_the_next_attempt(
    redis: Redis, publisher: Publisher, producer: Producer, valkey: Valkey
) -> None:
    busy, writer = await begun(publisher, producer, "busy"), await begun(publisher, producer, "j")
    valkey.pause()
    say(busy, "a flush that is not answered for a while")
    say(writer, "Once")  # waits for that one
    broken = await writer.broken_off()
    valkey.resume()
    verdict = await writer.begin(CALL, RunLimits(), previous_note=b"{}", broken=broken)
    assert isinstance(verdict, Begun)
    assert verdict.mode == "continue"
    assert await texts(redis, writer) == ["Once"]


async def test_a_publisher_that_is_left_while_an_append_has_no_answer_heals_nothing(
    redis_url: str, producer: Producer, valkey: Valkey
) -> None:
    try:
        async with publishing(redis_url) as publisher:
            writer = await begun(publisher, producer, "j")
            valkey.pause()
            say(writer, "Once")
            publisher.flush(writer)
    finally:
        valkey.resume()


async def test_a_heartbeat_before_the_first_attempt_makes_nobody_compare(redis_url: str) -> None:
    async with publishing(redis_url, beat_s=10) as publisher:
        await publisher.ask("PING")
        assert publisher._connection is not None
        publisher.add(writer := StreamWriter(publisher, "j", 1, Retention(), Interrupt()))
        publisher._beat_for(publisher._connection, (writer,))
        await publisher.ask("PING")  # answered behind it
        assert not writer._doubtful


async def test_a_server_without_memory_is_not_asked_again_and_again(
    redis: Redis, publisher: Publisher, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    writer = await begun(publisher, producer, "j")
    caplog.set_level(logging.WARNING)
    await redis.config_resetstat()
    try:
        await redis.config_set("maxmemory", "1")
        say(writer, "Once")
        await wait_until(lambda: caplog.text.count("OOM") == 3, "it was refused three times")
    finally:
        await redis.config_set("maxmemory", "0")
    asked = await redis.info("commandstats")
    assert asked["cmdstat_xadd"]["calls"] + asked["cmdstat_xadd"]["rejected_calls"] < 12
    assert "refused an entry" in caplog.text

    async def is_whole() -> bool:
        return await texts(redis, writer) == ["Once"]

    await wait_until(is_whole, "it is written when there is room")


async def test_a_writer_that_was_closed_is_not_revived_by_its_healing(
    redis: Redis, publisher: Publisher, producer: Producer, valkey: Valkey
) -> None:
    writer = await begun(publisher, producer, "j")
    say(writer, "Once")

    async def is_there() -> bool:
        return await texts(redis, writer) == ["Once"]

    await wait_until(is_there, "the delta is there")
    await redis.delete(writer.events_key)
    writer.stop_flow()
    valkey.pause()
    async with asyncio.TaskGroup() as tasks:
        healing = tasks.create_task(writer.heal())
        await wait_until(writer._healing.locked, "it asks")
        writer.close()
        valkey.resume()
    assert isinstance(healing.result(), NotOurs)
    assert not await redis.exists(writer.events_key), "nothing is written for a job that was left"
    assert writer not in publisher._writers


async def test_a_hand_over_may_be_repeated(redis: Redis, publisher: Publisher, producer: Producer) -> None:
    writer = await begun(publisher, producer, "j")
    assert await writer.hand_over(b"")
    assert await writer.hand_over(b""), "its first answer was lost"
    state = await redis.hgetall(writer.state_key)  # type: ignore[misc]  # redis-py's types mix both worlds
    assert (state[b"status"], state[b"runs"]) == (b"queued", b"0")


async def test_a_job_that_waits_again_after_a_dead_worker_can_be_cancelled(
    publisher: Publisher, producer: Producer
) -> None:
    dead = await begun(publisher, producer, "j")
    dead.close()
    later = StreamWriter(publisher, "j", 2, Retention(), Interrupt())
    assert await later.rest() is None
    assert await later.rest() is None, "its first answer was lost"
    zombie = await dead.begin(CALL, RunLimits())
    assert isinstance(zombie, NotOurs), "the dead one may wake up"
    assert isinstance(await StreamWriter(publisher, "j", 1, Retention(), Interrupt()).rest(), NotOurs), "in any way"
    assert await producer.cancel("j") == "cancelled", "nobody has to be waited for"
    ended = await later.rest()
    assert isinstance(ended, Ended)
    assert (ended.status, [call for call, _ in ended.notes]) == ("cancelled", ["c"])


async def test_a_cancel_that_a_dead_worker_did_not_heed_ends_the_job_that_waits(
    publisher: Publisher, producer: Producer
) -> None:
    dead = await begun(publisher, producer, "j")
    dead.close()
    assert await producer.cancel("j") == "requested"
    ended = await StreamWriter(publisher, "j", 2, Retention(), Interrupt()).rest()
    assert isinstance(ended, Ended)
    assert ended.status == "cancelled"
    assert await producer.cancel("j") == "ended"
