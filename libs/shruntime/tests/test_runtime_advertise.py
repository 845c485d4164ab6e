"""What a service advertises can be connected to, wherever it listens."""

import logging

import pytest
from shproto.rpc import Connection
from shruntime import advertise
from shruntime.advertise import advertised_address
from shruntime.server import RpcServer
from shruntime.settings import CommonSettings, SettingsError
from shruntime.urls import is_unspecified

EVERYWHERE = ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"]


@pytest.mark.parametrize("listen", EVERYWHERE)
async def test_who_listens_everywhere_advertises_an_address_that_can_be_connected_to(listen: str) -> None:
    server = RpcServer(listen, [])
    await server.start()
    try:
        address = await advertised_address(CommonSettings(), server.address)
        host, _, port = address.rpartition(":")
        assert not is_unspecified(host)
        assert int(port) == server.port
        connection = Connection([address])
        await connection.connect(60_000)
        await connection.close()
    finally:
        await server.stop(0)


@pytest.mark.parametrize("bound", ["127.0.0.1:7070", "localhost:7070", "[::1]:7070", "10.1.2.3:7070"])
async def test_who_listens_on_one_address_advertises_that(bound: str) -> None:
    assert await advertised_address(CommonSettings(), bound) == bound


@pytest.mark.parametrize("bound", ["0.0.0.0:7070", "127.0.0.1:7070"])
async def test_the_setting_wins(bound: str) -> None:
    assert await advertised_address(CommonSettings(advertise="node-1.internal:7071"), bound) == "node-1.internal:7071"


@pytest.mark.parametrize("given", ["0.0.0.0:7070", "[::]:7070", "0:7070", "node-1:0"])
def test_a_setting_that_nobody_can_connect_to_is_refused_with_its_name(given: str) -> None:
    with pytest.raises(SettingsError, match=r"STREAMHOUSE_ADVERTISE.*at which others reach this service"):
        CommonSettings.load({"STREAMHOUSE_ADVERTISE": given})


async def test_a_route_to_the_coordinators_is_preferred_and_loopback_comes_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Coordinators on this machine do not make it the only one."""
    found = ["127.0.0.1", "10.0.0.7", "192.168.1.7"]
    monkeypatch.setattr(advertise, "_own_addresses", lambda bootstrap: iter(found))
    with caplog.at_level(logging.INFO):
        assert await advertised_address(CommonSettings(), "0.0.0.0:7070") == "10.0.0.7:7070"
    assert "STREAMHOUSE_ADVERTISE" in caplog.text
    found[:] = ["127.0.0.1"]
    assert await advertised_address(CommonSettings(), "0.0.0.0:7070") == "127.0.0.1:7070"
    assert "no other machine reaches" in caplog.text
    found[:] = ["fd00::7"]
    assert await advertised_address(CommonSettings(), "[::]:7070") == "[fd00::7]:7070"


def test_coordinators_whose_names_are_not_there_yet_are_passed_over() -> None:
    assert next(advertise._own_addresses("no-such-host.invalid:7070,127.0.0.1:7070")) == "127.0.0.1"
