"""Bodies of responses as aiohttp's parser feeds them: passed on at once, whole, and ended as aiohttp ends them."""

import asyncio
import gc
import gzip
import random
import socket
import ssl
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from deltafan_worker import _body
from deltafan_worker._body import read_body
from support.waiting import wait_until

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
PIECES = [b"first", b"second\n\n", b"third"]
Say = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request with what `say` writes."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.connections = 0
        self.lost = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await self.say(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    say: Say, certificate: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    server = Server(say)
    of_server, of_client = certificate or (None, True)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=of_server)
    scheme, port = "https" if certificate else "http", listening.sockets[0].getsockname()[1]
    server.url = f"{scheme}://127.0.0.1:{port}/"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=of_client)) as session:
        yield server, session
    listening.close()


class Taken:
    """What a body's reader was given, and whether a task had to be woken for it."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.data = b""
        self.at_once = 0
        self._limit = limit

    def __call__(self, data: bytes) -> bool:
        self.data += data
        self.at_once += asyncio.current_task() is None
        return len(self.data) < self._limit


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def say_in_packets(writer: asyncio.StreamWriter, packets: list[bytes]) -> None:
    for packet in packets:
        writer.write(packet)
        await writer.drain()
        await wait_until(iter((False, True)).__next__, "the other side has read it, before there is more")


def packets(kind: str) -> list[bytes]:
    match kind:
        case "chunked":
            return [CHUNKED, *map(chunk, PIECES), b"0\r\n\r\n"]
        case "chunks cut anywhere":
            whole = b"".join([*map(chunk, PIECES), b"0\r\n\r\n"])
            return [CHUNKED, *(whole[at : at + 4] for at in range(0, len(whole), 4))]
        case "with its length":
            return [HEAD + b"Content-Length: %d\r\n\r\n" % len(b"".join(PIECES)), *PIECES]
        case "compressed":
            packed = gzip.compress(b"".join(PIECES))
            return [
                CHUNKED[:-2] + b"Content-Encoding: gzip\r\n\r\n",
                chunk(packed[:9]),
                chunk(packed[9:]),
                b"0\r\n\r\n",
            ]
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["chunked", "chunks cut anywhere", "with its length", "compressed"])
async def test_a_body_is_passed_on_whole_and_its_connection_used_again(kind: str) -> None:
    async with serving(lambda writer: say_in_packets(writer, packets(kind))) as (server, session):
        for _ in range(2):
            taken = Taken()
            async with session.get(server.url) as response:
                await read_body(response, taken)
            assert taken.data == b"".join(PIECES)
            # Most of it: what came with the head is read as it lies there. What is compressed is read as aiohttp does.
            assert taken.at_once == 0 if kind == "compressed" else taken.at_once >= len(PIECES) - 1
        assert server.connections == 1


async def test_whole_chunks_go_around_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[bytes] = []
    monkeypatch.setattr(_body._PassingReader, "feed_data", lambda _reader, data, _size=0: fed.append(data))
    pieces = [b"%d," % n for n in range(20)]
    said = [CHUNKED, *map(chunk, pieces), b"0\r\n\r\n"]
    async with serving(lambda writer: say_in_packets(writer, said)) as (server, session):
        async with session.get(server.url) as response:
            await read_body(response, taken := Taken())
    assert len(fed) == 1, "the first one, which tells where chunks end"
    assert taken.data == b"".join(piece for piece in pieces if piece != fed[0])


def framed(body: bytes, chance: random.Random) -> bytes:
    """One chunk, as odd as it may be written."""
    head = f"{len(body):x}"
    head = chance.choice((head, head, head.upper(), f"000{head}", f"{head};name=value"))
    return head.encode() + b"\r\n" + body + b"\r\n"


@pytest.mark.parametrize("seed", range(12))
async def test_chunks_are_passed_on_whole_however_they_are_written_and_cut(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [chance.choice((b"\r\n", b"5\r\n", b"0\r\n\r\n", b"1\r\na\r\n", b"data: x\n\n", b"a")) for _ in range(30)]
    chunks = [framed(piece, chance) for piece in pieces]
    whole, at = b"".join(chunks), [sum(map(len, chunks[:n])) for n in range(30)]
    at = sorted({*chance.sample(at, 20), *(chance.randrange(len(whole)) for _ in range(8))})
    cut = [whole[start:end] for start, end in pairwise((0, *at, len(whole))) if start < end]
    async with serving(lambda writer: say_in_packets(writer, [CHUNKED, *cut, b"0\r\n\r\n"])) as (server, session):
        for _ in range(2):
            async with session.get(server.url) as response:
                await read_body(response, taken := Taken())
            assert taken.data == b"".join(pieces)
        assert server.connections == 1


@pytest.mark.parametrize(
    "cut",
    [
        [b"5;name=", b"5\r\nhello\r\n"],  # what is left of a head looks like one
        [b"d\r\nx\r\n", b"5\r\nhello\r\n", b"\r\n"],  # and so does the inside of a chunk
    ],
)
async def test_what_looks_like_a_chunk_and_is_none(cut: list[bytes]) -> None:
    said = [CHUNKED, chunk(PIECES[0]), chunk(PIECES[1]), *cut, chunk(PIECES[2]), b"0\r\n\r\n"]
    async with serving(lambda writer: say_in_packets(writer, said)) as (server, session), asyncio.timeout(5):
        async with session.get(server.url) as response:
            await read_body(response, taken := Taken())
        inside = b"hello" if len(cut) == 2 else b"x\r\n5\r\nhello\r\n"
        assert taken.data == PIECES[0] + PIECES[1] + inside + PIECES[2]


@pytest.mark.parametrize("end", [b"", b"xx", b"\n\r"])
async def test_a_chunk_with_another_end_than_its_head_tells_is_broken_framing(end: bytes) -> None:
    broken = [CHUNKED, chunk(PIECES[0]), b"5\r\nhello" + end, b"5\r\nhello\r\n"]
    async with serving(lambda writer: say_in_packets(writer, broken)) as (server, session), asyncio.timeout(5):
        async with session.get(server.url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await read_body(response, taken := Taken())
        assert taken.data == PIECES[0] + b"hello"


def self_signed(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server proves itself with, and what a client believes."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now, address = datetime.now(tz=UTC), x509.IPAddress(ip_address("127.0.0.1"))
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1)
    )
    made = made.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    (folder / "both.pem").write_bytes(
        certificate + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "both.pem")
    return server, ssl.create_default_context(cadata=certificate.decode())


@pytest.mark.parametrize("kind", ["chunked", "chunks cut anywhere", "with its length"])
async def test_a_body_that_comes_encrypted(kind: str, tmp_path: Path) -> None:
    say: Say = lambda writer: say_in_packets(writer, packets(kind))  # noqa: E731
    async with serving(say, self_signed(tmp_path)) as (server, session):
        for _ in range(2):
            async with session.get(server.url) as response:
                await read_body(response, taken := Taken())
            assert taken.data == b"".join(PIECES)
            assert taken.at_once >= len(PIECES) - 1
        assert server.connections == 1


async def test_a_body_that_ends_with_its_connection() -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        await say_in_packets(writer, [HEAD + b"\r\n", *PIECES])
        writer.close()

    async with serving(say) as (server, session), session.get(server.url) as response:
        await read_body(response, taken := Taken())
        assert taken.data == b"".join(PIECES)


async def test_what_came_before_anybody_read_is_passed_on_first_however_much_it_is() -> None:
    large = [bytes([65 + n % 26]) * 100_000 for n in range(40)]

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"".join(map(chunk, large)) + b"0\r\n\r\n")
        await writer.drain()

    async with serving(say) as (server, session), session.get(server.url) as response:
        await wait_until(
            lambda: response.content.total_bytes > 500_000, "the reader is full"
        )  # more than it holds: it has stopped reading
        await read_body(response, taken := Taken())
        assert taken.data == b"".join(large)


async def test_a_reader_that_has_enough_is_not_kept_until_the_end() -> None:
    async with serving(lambda writer: say_in_packets(writer, [CHUNKED, *map(chunk, PIECES)])) as (server, session):
        async with session.get(server.url) as response, asyncio.timeout(5):
            await read_body(response, taken := Taken(limit=len(PIECES[0])))
        assert taken.data == PIECES[0]
        await wait_until(lambda: server.lost == 1, "the connection is closed")  # nobody will read the rest


async def test_what_the_reader_raises_ends_the_reading_and_nothing_else() -> None:
    def take(data: bytes) -> bool:
        if data == PIECES[1]:
            raise LookupError(data)
        return True

    async with serving(lambda writer: say_in_packets(writer, [CHUNKED, *map(chunk, PIECES)])) as (server, session):
        for _ in range(2):
            async with asyncio.timeout(5), session.get(server.url) as response:
                with pytest.raises(LookupError):
                    await read_body(response, take)


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_body_that_is_cut_is_aiohttps_error(how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        await say_in_packets(writer, [CHUNKED, chunk(PIECES[0])])
        if how == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async with serving(say) as (server, session), session.get(server.url) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await read_body(response, taken := Taken())
        assert taken.data == PIECES[0]
    del response
    gc.collect()
    assert caplog.text == "", "no error that nobody has asked for"


async def test_a_connection_that_is_kept_keeps_nothing_of_what_it_brought() -> None:
    async with serving(lambda writer: say_in_packets(writer, packets("chunked"))) as (server, session):
        kept = []
        for _ in range(3):
            taken = Taken()
            kept.append(weakref.ref(taken))
            async with session.get(server.url) as response:
                await read_body(response, taken)
        del taken, response
        assert server.connections == 1

        def is_let_go() -> bool:
            gc.collect()
            return not any(ref() for ref in kept)

        await wait_until(is_let_go, "nobody holds what has been read", timeout_s=5)


async def test_framing_that_breaks_in_mid_body_ends_the_reading() -> None:
    """aiohttp closes the connection, and tells no reader."""
    broken = [CHUNKED, chunk(PIECES[0]), b"HTTP/1.1 502 Bad Gateway\r\n\r\n"]
    async with serving(lambda writer: say_in_packets(writer, broken)) as (server, session), asyncio.timeout(5):
        async with session.get(server.url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await read_body(response, taken := Taken())
        assert taken.data == PIECES[0]


async def test_what_arrives_together_with_what_was_enough_is_passed_on_too() -> None:
    together = [CHUNKED, chunk(PIECES[0]), chunk(PIECES[1]) + chunk(PIECES[2]), chunk(b"late")]
    async with serving(lambda writer: say_in_packets(writer, together)) as (server, session), asyncio.timeout(5):
        async with session.get(server.url) as response:
            await read_body(response, taken := Taken(limit=len(PIECES[0]) + 1))
        assert taken.data == b"".join(PIECES)


async def test_a_version_that_is_not_known_is_read_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_body, "_IS_HELD", False)
    async with serving(lambda writer: say_in_packets(writer, packets("chunked"))) as (server, session):
        async with session.get(server.url) as response:
            await read_body(response, taken := Taken())
        assert (taken.data, taken.at_once) == (b"".join(PIECES), 0)


async def test_a_reader_that_is_cancelled_is_given_nothing_more() -> None:
    go_on = asyncio.Event()

    async def say(writer: asyncio.StreamWriter) -> None:
        await say_in_packets(writer, [CHUNKED, chunk(PIECES[0])])
        await go_on.wait()
        await say_in_packets(writer, [chunk(PIECES[1]), b"0\r\n\r\n"])

    async with serving(say) as (server, session), session.get(server.url) as response:
        reading = asyncio.ensure_future(read_body(response, taken := Taken()))
        await wait_until(lambda: taken.data == PIECES[0], "the first piece")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go_on.set()
        await wait_until(response.content.is_eof, "the end of the body")
        assert taken.data == PIECES[0]
