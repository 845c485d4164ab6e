"""Messages of PostgreSQL's protocol: what is read, what is refused, and that any bytes end in one of both."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamhouse_sql.pgwire.core import protocol
from streamhouse_sql.pgwire.core.protocol import (
    Bind,
    CancelRequest,
    Decoder,
    Describe,
    EncryptionRequest,
    Execute,
    Message,
    Parse,
    ProtocolViolation,
    SimpleQuery,
    Startup,
    Sync,
    Terminate,
    Unsupported,
)

pytestmark = pytest.mark.quick

LIMIT = 4096


def message(tag: bytes, body: bytes = b"") -> bytes:
    return tag + struct.pack("!I", len(body) + 4) + body


def startup(body: bytes, code: int = protocol.PROTOCOL_3) -> bytes:
    return struct.pack("!II", len(body) + 8, code) + body


def decoded(data: bytes, limit: int = LIMIT) -> list[Message]:
    decoder = Decoder(limit)
    decoder.feed(data)
    return [found for found, _ in decoder.messages()]


def first(data: bytes) -> protocol.First | None:
    decoder = Decoder(LIMIT)
    decoder.feed(data)
    return decoder.first()


BIND = b"p\0s\0" + struct.pack("!HH", 1, 1) + struct.pack("!Hi2si", 2, 2, b"ab", -1) + struct.pack("!HHH", 2, 0, 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (message(b"Q", b"SELECT 1\0"), SimpleQuery("SELECT 1")),
        (message(b"P", b"s\0SELECT $1\0" + struct.pack("!HI", 1, 23)), Parse("s", "SELECT $1", [23])),
        (
            message(b"B", BIND),
            Bind(portal="p", statement="s", formats=[1], values=[b"ab", None], result_formats=[0, 1]),
        ),
        (message(b"D", b"Ss\0"), Describe("S", "s")),
        (message(b"E", b"\0" + struct.pack("!i", 7)), Execute("", 7)),
        (message(b"C", b"Pp\0"), protocol.Close("P", "p")),
        (message(b"S"), Sync()),
        (message(b"H"), protocol.Flush()),
        (message(b"X"), Terminate()),
        (message(b"d", b"whatever"), Unsupported("CopyData")),
        (message(b"p", b"secret\0"), Unsupported("PasswordMessage")),
    ],
)
def test_a_message_is_read(data: bytes, expected: Message) -> None:
    assert decoded(data) == [expected]


def test_messages_are_read_however_they_are_cut() -> None:
    data = message(b"Q", b"SELECT 1\0") + message(b"B", BIND) + message(b"S")
    decoder, found = Decoder(LIMIT), []
    for at in range(len(data)):
        decoder.feed(data[at : at + 1])
        found += [item for item, _ in decoder.messages()]
    assert found == decoded(data) and len(found) == 3


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(message(b"Q", b"no end"), id="text without its end"),
        pytest.param(message(b"Q", b"a\0b\0"), id="bytes behind the last field"),
        pytest.param(message(b"Q", b"\xff\0"), id="not UTF-8"),
        pytest.param(message(b"B", b"\0\0" + struct.pack("!HHi", 0, 1, 100)), id="value longer than the message"),
        pytest.param(message(b"B", b"\0\0" + struct.pack("!HHi", 0, 1, -5)), id="negative length of a value"),
        pytest.param(message(b"B", b"\0\0" + struct.pack("!H", 65535)), id="more formats than bytes"),
        pytest.param(message(b"P", b"\0\0" + struct.pack("!H", 65535)), id="more types than bytes"),
        pytest.param(message(b"D", b""), id="describe of nothing"),
        pytest.param(message(b"D", b"Xs\0"), id="describe of what is neither"),
        pytest.param(message(b"S", b"more"), id="sync with a body"),
        pytest.param(b"Q" + struct.pack("!I", 3), id="length below its own"),
        pytest.param(b"Q" + struct.pack("!I", LIMIT + 1), id="length above the limit"),
        pytest.param(b"Q" + struct.pack("!I", 0xFFFFFFFF), id="length of 4 GB"),
        pytest.param(message(b"z"), id="unknown message"),
        pytest.param(message(b"\0"), id="zero"),
    ],
)
def test_what_is_no_message_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decoded(data)


def test_the_limit_is_one_message_and_the_error_names_it() -> None:
    assert decoded(message(b"Q", b"x" * (LIMIT - 5) + b"\0")) == [SimpleQuery("x" * (LIMIT - 5))]
    with pytest.raises(ProtocolViolation, match=f"sql_pg_message_bytes_max, {LIMIT}"):
        decoded(message(b"Q", b"x" * (LIMIT - 4) + b"\0"))


def test_messages_before_a_violation_are_taken() -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(message(b"S") + message(b"z"))
    messages = decoder.messages()
    assert next(messages) == (Sync(), 5)
    with pytest.raises(ProtocolViolation):
        next(messages)


def test_first_messages_are_read() -> None:
    assert first(startup(b"user\0me\0database\0d\0\0")) == Startup(protocol.PROTOCOL_3, {"user": "me", "database": "d"})
    assert first(startup(b"", protocol.SSL_CODE)) == EncryptionRequest()
    assert first(startup(b"", protocol.GSSENC_CODE)) == EncryptionRequest()
    assert first(startup(struct.pack("!I", 7) + b"abcd", protocol.CANCEL_CODE)) == CancelRequest(7, b"abcd")
    assert first(b"\0\0") is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(struct.pack("!I", 7), id="too short"),
        pytest.param(struct.pack("!I", 10_001), id="too long"),
        pytest.param(startup(b"", 2 << 16), id="protocol 2.0"),
        pytest.param(startup(b"user\0me\0"), id="parameters without their end"),
        pytest.param(startup(b"user\0"), id="a name without a value"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS without asking"),
    ],
)
def test_what_is_no_first_message_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        first(data)


@given(st.binary(max_size=200), st.sampled_from(b"QPBDECSHXFdcfp"))
def test_any_body_is_read_or_refused(body: bytes, tag: int) -> None:
    with suppress(ProtocolViolation):
        assert len(decoded(message(bytes((tag,)), body))) == 1


@given(st.lists(st.binary(max_size=50), max_size=10))
def test_any_bytes_are_messages_incomplete_or_refused(chunks: list[bytes]) -> None:
    later, at_first = Decoder(LIMIT), Decoder(LIMIT)
    with suppress(ProtocolViolation):
        for chunk in chunks:
            later.feed(chunk)
            list(later.messages())
    with suppress(ProtocolViolation):
        for chunk in chunks:
            at_first.feed(chunk)
            at_first.first()


def test_an_error_has_the_fields_that_are_known() -> None:
    plain = protocol.error_response(severity="ERROR", sqlstate="42601", message="no")
    assert plain == message(b"E", b"SERROR\0VERROR\0C42601\0Mno\0\0")
    placed = protocol.error_response(severity="ERROR", sqlstate="42601", message="no", hint="h", detail="d", position=9)
    assert placed == message(b"E", b"SERROR\0VERROR\0C42601\0Mno\0Dd\0Hh\0P9\0\0")


def test_a_zero_byte_in_a_text_does_not_end_it() -> None:
    data = protocol.error_response(severity="ERROR", sqlstate="42601", message="a\0Sb")
    assert data.count(b"\0") == data[5:].count(b"\0") + data[1:5].count(b"\0")
    assert "a\N{REPLACEMENT CHARACTER}Sb".encode() in data
