"""Object storage for StreamHouse: a port, four stores that keep the same contract, a retry policy.

Knows nothing of topics and segments.
"""

from shstore.errors import (
    REFUSALS,
    BodyTruncated,
    BucketMissing,
    KeyInvalid,
    KeysRefused,
    ObjectExists,
    ObjectMissing,
    RangeBeyondEnd,
    StoreCorrupt,
    StoreDenied,
    StoreError,
    StoreErrorKind,
    StoreInvalid,
    StoreUnavailable,
    WrongRange,
)
from shstore.faulty import Fault, FaultKind, FaultyStore, RandomFaults, ScriptedFaults
from shstore.local import LocalStore
from shstore.memory import MemoryStore
from shstore.open import open_store
from shstore.options import StoreOptions
from shstore.port import ObjectInfo, ObjectStore
from shstore.retrying import RetryingStore, RetryPolicy

__all__ = [
    "REFUSALS",
    "BodyTruncated",
    "BucketMissing",
    "Fault",
    "FaultKind",
    "FaultyStore",
    "KeyInvalid",
    "KeysRefused",
    "LocalStore",
    "MemoryStore",
    "ObjectExists",
    "ObjectInfo",
    "ObjectMissing",
    "ObjectStore",
    "RandomFaults",
    "RangeBeyondEnd",
    "RetryPolicy",
    "RetryingStore",
    "ScriptedFaults",
    "StoreCorrupt",
    "StoreDenied",
    "StoreError",
    "StoreErrorKind",
    "StoreInvalid",
    "StoreOptions",
    "StoreUnavailable",
    "WrongRange",
    "open_store",
]
