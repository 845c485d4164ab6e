"""Kafka's names of the arguments and methods of futures: errors that name those here, in both clients."""

import asyncio

import pytest
import streamhouse
import streamhouse.sync


@pytest.mark.parametrize("method", ["result", "exception"])
async def test_the_timeout_of_an_outcome_is_named(platform, server, method):
    await platform.create_topic("t", 1)
    server.create_topic("t", 1)
    text = (
        f"Kafka's arguments have other names in SendFuture.{method}: timeout is timeout_s (in seconds; of the "
        "asynchronous client, await asyncio.wait_for(future, seconds))"
    )

    def plain():
        with streamhouse.sync.Producer(server.address) as producer:
            for sent in (producer.send("t", b"v"), producer.send_many("t", [b"v"])):
                with pytest.raises(TypeError) as raised:
                    getattr(sent, method)(timeout=5)
                assert str(raised.value) == text

    await asyncio.to_thread(plain)
    async with streamhouse.Producer(platform.address) as producer:
        for sent in (await producer.send("t", b"v"), await producer.send_many("t", [b"v"])):
            with pytest.raises(TypeError) as raised:
                getattr(sent, method)(timeout=5)
            assert str(raised.value) == text
            await sent


async def test_methods_of_kafkas_futures_are_named(platform):
    await platform.create_topic("t", 1)
    async with streamhouse.Producer(platform.address) as producer:
        for sent in (await producer.send("t", b"v"), await producer.send_many("t", [b"v"])):
            with pytest.raises(AttributeError) as raised:
                sent.get()
            assert str(raised.value) == (
                f"{type(sent).__name__!r} object has no attribute 'get': Kafka's get is result (with timeout_s in "
                "streamhouse.sync; `await` the future of the asynchronous client)"
            )
            with pytest.raises(AttributeError, match=r"Kafka's add_callback is add_done_callback \("):
                sent.add_callback(print)
            assert "add_callback" not in dir(sent)
