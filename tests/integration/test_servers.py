"""The servers that other tests rely on: each is started, talked to, stopped, killed and started again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aio_pika
import aioboto3
import asyncpg
import pytest
import redis.asyncio
import redis.exceptions
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError

from tests.integration.servers import Server

pytestmark = pytest.mark.integration


async def ends_and_returns(
    server: Server, end: Callable[[], None], fails: Callable[[], Awaitable[object]], *errors: type[Exception]
) -> None:
    """Away after `end`, there again after `start`."""
    await asyncio.to_thread(end)
    assert not server.is_running
    with pytest.raises(errors):
        await fails()
    await asyncio.to_thread(server.start)


async def test_postgres_keeps_its_rows(postgres: Server) -> None:
    dsn = postgres.settings["STREAMHOUSE_PG_DSN"]

    async def run(sql: str) -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    await run("create table kept as select 42 as n")
    for end in (postgres.stop, postgres.kill):
        await ends_and_returns(postgres, end, lambda: run("select 1"), OSError)
        assert await run("select n from kept") == 42
    await run("drop table kept")


async def test_s3_keeps_its_objects_over_a_stop(s3: Server) -> None:
    config = AioConfig(retries={"total_max_attempts": 1}, connect_timeout=2)
    session = aioboto3.Session()
    client = session.client(
        "s3",
        endpoint_url=s3.settings["STREAMHOUSE_S3_ENDPOINT"],
        region_name=s3.settings["STREAMHOUSE_S3_REGION"],
        aws_access_key_id=s3.settings["STREAMHOUSE_S3_ACCESS_KEY"],
        aws_secret_access_key=s3.settings["STREAMHOUSE_S3_SECRET_KEY"],
        config=config,
    )
    bucket = s3.settings["STREAMHOUSE_S3_BUCKET"]
    async with client as api:
        await api.put_object(Bucket=bucket, Key="kept", Body=b"bytes")
        await ends_and_returns(s3, s3.stop, lambda: api.get_object(Bucket=bucket, Key="kept"), BotoCoreError)
        reply = await api.get_object(Bucket=bucket, Key="kept", Range="bytes=1-2")
        async with reply["Body"] as body:
            assert await body.read() == b"yt"
        await api.delete_object(Bucket=bucket, Key="kept")
        await ends_and_returns(s3, s3.kill, lambda: api.list_objects_v2(Bucket=bucket), BotoCoreError)
        assert (await api.list_objects_v2(Bucket=bucket))["KeyCount"] == 0


async def test_rabbitmq_keeps_durable_messages(rabbitmq: Server) -> None:
    async def publish(body: bytes) -> None:
        async with await aio_pika.connect(rabbitmq.url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("kept", durable=True)
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, routing_key="kept")

    async def consume() -> bytes:
        async with await aio_pika.connect(rabbitmq.url) as connection:
            queue = await (await connection.channel()).get_queue("kept")
            message = await queue.get()
            assert message is not None
            await message.ack()
            return message.body

    for end in (rabbitmq.stop, rabbitmq.kill):
        await publish(b"before the end")
        await ends_and_returns(rabbitmq, end, consume, OSError)
        assert await consume() == b"before the end"


async def test_redis_comes_back_empty(redis_server: Server) -> None:
    client = redis.asyncio.from_url(redis_server.url)
    async with client:
        for end in (redis_server.stop, redis_server.kill):
            await client.set("key", b"value")
            assert await client.get("key") == b"value"
            await ends_and_returns(redis_server, end, client.ping, redis.exceptions.ConnectionError)
            assert await client.get("key") is None
