"""URLs in settings: what is wrong is said, and no password with it."""

import pytest
from shproto.errors import InvalidArgument
from shruntime.urls import address, addresses, addresses_of, masked, url_of

pytestmark = pytest.mark.quick

check = url_of("postgresql", "postgres")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgresql://user:secret@host:5432/database?sslmode=require",
        "postgres://user@first:5432,second:5433/database",
        "postgresql://[::1]:5432/database",
        "postgresql://postgres@/postgres?host=%2Frun%2Fpostgresql&port=5432",
        "postgresql://user:se%40c%2Fret@host/database",
    ],
)
def test_what_can_be_used_is_left_as_it_is(url: str) -> None:
    assert check(url) == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://user:secret@host/database", "begins with postgresql:// or postgres://"),
        ("host=there user=me password=secret", "begins with postgresql://"),
        ("postgresql://user:secret@host:54321234/database", "port that is not 1 to 65535"),
        ("postgresql://user:secret@host:none/database", "port that is not 1 to 65535"),
        ("postgresql://user:secret", "port that is not 1 to 65535"),
        ("postgresql://user:see/secret@host/database", "%2F"),
        ("postgresql://user:see@secret@host/database", "%40"),
        ("postgresql://user:see#secret@host/database", "%23"),
        ("postgresql://user:see[secret@host/database", "bracket"),
        ("postgresql://host/database?password=secret&sslmode", "name=value"),
        ("postgresql://[::1]5432/database?password=secret", "host that cannot be parsed"),
    ],
)
def test_what_cannot_be_used_is_said_without_the_password(url: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(url)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_shown_keeps_what_is_no_secret() -> None:
    assert masked("postgresql://me:x@host:1/data?sslmode=on") == "postgresql://me:***@host:1/data?sslmode=on"
    assert masked("postgresql://me@host/data?sslpassword=x&a=b") == "postgresql://me@host/data?sslpassword=***&a=b"
    assert masked("redis://host:6379/0") == "redis://host:6379/0"


@pytest.mark.parametrize("text", ["host", "host:", "host:port", ":1", "host:65536", "a b:1", "::1:7070", "http://a:1"])
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        address(text)
    with pytest.raises(ValueError, match="must be host:port"):
        addresses(f"good:1,{text}")


def test_addresses_of_every_kind() -> None:
    assert address("[::1]:0") == "[::1]:0"
    assert addresses("coordinator-1:7070, 10.0.0.1:7070") == "coordinator-1:7070, 10.0.0.1:7070"


def test_addresses_to_connect_to_have_a_port() -> None:
    """Nothing ever listens on port 0, and no service would say why it waits for coordinators."""
    with pytest.raises(ValueError, match=r"'\[::1\]:0' has port 0"):
        addresses("good:1, [::1]:0")


def test_bootstrap_addresses() -> None:
    assert addresses_of("a:1, b:2") == ("a:1", "b:2")
    assert addresses_of(["[::1]:7070"]) == ("[::1]:7070",)
    for wrong in ("", "a", "a:", ":1", "a:x", "a:70000", [], [7070]):
        with pytest.raises(InvalidArgument):
            addresses_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", ",", "a:0", "a b:1", "::1:7070", "http://a:1", "a:1, b"])
def test_clients_and_settings_refuse_the_same_addresses(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        addresses(text)
    with pytest.raises(InvalidArgument) as answered:
        addresses_of(text)
    assert str(answered.value) == f"bootstrap: {refused.value}"


def test_clients_and_settings_take_the_same_addresses() -> None:
    assert addresses(" a:1,, b:2 ,") == " a:1,, b:2 ,"
    assert addresses_of(" a:1,, b:2 ,") == ("a:1", "b:2")
