"""Ways to a server: what a URL may say, and what becomes of a connection that is opened too late."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Producer, RedisUnavailable
from deltafan._resp import open_connection
from support.valkey import Valkey, valkey_server

pytestmark = pytest.mark.client
HI = [{"role": "user", "content": "Hi"}]


async def submit_and_read(url: str) -> None:
    """Once over each kind of connection."""
    async with Producer.connect(url) as producer, Consumer.connect(url) as consumer:
        await producer.submit(model="m", messages=HI, job_id="j")
        await producer.cancel("j")
        async with asyncio.timeout(10), consumer.tail("j") as events:
            assert [event.type async for event in events] == ["cancelled"]


async def test_a_database_by_its_number(valkey: Valkey, redis: Redis) -> None:
    await submit_and_read(f"redis://127.0.0.1:{valkey.port}/3")
    assert await redis.keys("*") == []
    async with Redis.from_url(f"redis://127.0.0.1:{valkey.port}/3") as third:
        assert await third.exists("deltafan:{j}:state")


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with valkey_server(unixsocket=str(path)) as server:
        await submit_and_read(f"unix://{path}?db=2")
        async with Redis.from_url(f"redis://127.0.0.1:{server.port}/2") as redis:
            assert await redis.exists("deltafan:{j}:state")


def certificate(folder: Path) -> Path:
    """Of 127.0.0.1, and its key, in one file."""
    pytest.importorskip("cryptography", reason="nothing here can make a certificate")
    from cryptography import x509  # noqa: PLC0415  not where the client library stands alone
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "deltafan test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "server.pem"
    path.write_bytes(signed.public_bytes(pem) + key.private_bytes(pem, *plain))
    return path


@asynccontextmanager
async def tls_server(valkey: Valkey, path: Path) -> AsyncIterator[int]:
    """Its port: TLS in front of a plain server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        finally:
            writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(pass_on(reader, to_server), pass_on(from_server, writer), return_exceptions=True)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_tls_and_only_with_a_certificate_that_is_trusted(valkey: Valkey, redis: Redis, tmp_path: Path) -> None:
    path = certificate(tmp_path)
    async with tls_server(valkey, path) as port:
        await submit_and_read(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={path}")
        assert await redis.exists("deltafan:{j}:state")
        with pytest.raises(RedisUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            async with Producer.connect(f"rediss://127.0.0.1:{port}/0"):
                pass


@pytest.mark.parametrize("connect", [Producer.connect, Consumer.connect])
async def test_an_option_that_no_url_has_is_named(connect: Any, redis_url: str) -> None:
    with pytest.raises(RedisUnavailable, match=r"option of this URL is not known .*'timeout'"):
        async with connect(f"{redis_url}?timeout=5"):
            pass


async def test_what_is_opened_after_the_end_of_a_producer_is_closed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, may_open, opened = asyncio.Event(), asyncio.Event(), []

    async def open_late(*args: Any, **options: Any) -> Any:
        asked.set()
        await may_open.wait()
        opened.append(await open_connection(*args, **options))
        return opened[0]

    async with Producer.connect(redis_url) as producer:
        connection = producer._queue._connection
        assert connection is not None
        connection.close()
        monkeypatch.setattr("deltafan._client.open_connection", open_late)
        submitting = asyncio.create_task(producer.submit(model="m", messages=HI, job_id="late"))
        await asked.wait()
    may_open.set()
    with pytest.raises(RuntimeError, match="closed"):
        await submitting
    assert opened[0].is_lost
