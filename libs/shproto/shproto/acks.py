"""Ack levels: their names, and the numbers of messages and rows, which ascend in strength. Pure: values."""

from typing import Literal

from shproto.v1 import types_pb2

Acks = Literal["none", "wal", "durable"]
"""Name of a level: not waited for, in the leader's write-ahead log, in the object store and registered."""

ACKS_NONE = types_pb2.ACKS_NONE
ACKS_WAL = types_pb2.ACKS_WAL
ACKS_DURABLE = types_pb2.ACKS_DURABLE

ACKS = {"none": ACKS_NONE, "wal": ACKS_WAL, "durable": ACKS_DURABLE}
ACKS_NAMES: dict[int, Acks] = {ACKS_NONE: "none", ACKS_WAL: "wal", ACKS_DURABLE: "durable"}
