"""A client of PostgreSQL's protocol that may also do what no driver does."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Any

from services.sql.tests.start_sql import Sql

TIMEOUT_S = 30.0


def message(tag: bytes, body: bytes = b"") -> bytes:
    return tag + struct.pack("!I", len(body) + 4) + body


def startup(**parameters: str) -> bytes:
    given = {"user": "me", "database": "streamhouse"} | parameters
    body = struct.pack("!I", 3 << 16)
    body += b"".join(f"{name}\0{value}\0".encode() for name, value in given.items()) + b"\0"
    return struct.pack("!I", len(body) + 4) + body


def query(text: str) -> bytes:
    return message(b"Q", text.encode() + b"\0")


def parse(text: str, name: str = "") -> bytes:
    return message(b"P", f"{name}\0{text}\0".encode() + b"\0\0")


def bind(portal: str = "", statement: str = "") -> bytes:
    return message(b"B", f"{portal}\0{statement}\0".encode() + bytes(6))


def execute(portal: str = "", rows_max: int = 0) -> bytes:
    return message(b"E", f"{portal}\0".encode() + struct.pack("!i", rows_max))


SYNC, FLUSH, TERMINATE = message(b"S"), message(b"H"), message(b"X")


@dataclass(frozen=True, slots=True)
class Reply:
    """A message of the server."""

    tag: str
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        assert self.tag in "EN", self
        return {part[:1].decode(): part[1:].decode() for part in self.body.split(b"\0") if part}

    @property
    def text(self) -> str:
        return self.body.rstrip(b"\0").decode()


class PgClient:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.key = b""

    @classmethod
    async def connect(cls, sql: Sql, *, start: bool = True, **parameters: str) -> PgClient:
        host, _, port = sql.parts.pg_address.rpartition(":")
        client = cls(*await asyncio.open_connection(host, int(port)))
        if start:
            client.send(startup(**parameters))
            for reply in await client.until_ready():
                if reply.tag == "K":
                    client.key = reply.body
        return client

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def reply(self) -> Reply:
        async with asyncio.timeout(TIMEOUT_S):
            tag = await self.reader.readexactly(1)
            (length,) = struct.unpack("!I", await self.reader.readexactly(4))
            return Reply(tag.decode(), await self.reader.readexactly(length - 4))

    async def until_ready(self) -> list[Reply]:
        """Returns the answers up to ReadyForQuery, or up to a fatal error."""
        found = []
        while True:
            found.append(await self.reply())
            if found[-1].tag == "Z" or (found[-1].tag == "E" and found[-1].error["S"] == "FATAL"):
                return found

    async def ask(self, *data: bytes) -> list[Reply]:
        self.send(*data)
        return await self.until_ready()

    async def rest(self) -> bytes:
        """Returns what comes until the server closes the connection, and closes it, too."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self.reader.read()
        except ConnectionError:
            return b""
        finally:
            await self.close()

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


def tags(replies: list[Reply]) -> str:
    return "".join(reply.tag for reply in replies)


def error_of(replies: list[Reply]) -> dict[str, str]:
    (found,) = [reply.error for reply in replies if reply.tag == "E"]
    return found


def rows_of(replies: list[Reply]) -> list[list[Any]]:
    """Returns the values of DataRows."""
    found = []
    for reply in replies:
        if reply.tag == "D":
            row, at = [], 2
            for _ in range(struct.unpack_from("!H", reply.body)[0]):
                (size,) = struct.unpack_from("!i", reply.body, at)
                at += 4
                row.append(None if size < 0 else reply.body[at : at + size])
                at += max(size, 0)
            found.append(row)
    return found
