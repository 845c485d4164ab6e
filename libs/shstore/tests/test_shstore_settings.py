"""Settings, URLs, and the byte arithmetic all stores share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shstore import LocalStore, MemoryStore, StoreError, StoreInvalid, StoreOptions, open_store
from shstore.keys import check_key
from shstore.open import options_from_url
from shstore.ranges import byte_views, split_views
from shstore.s3 import S3Store

pytestmark = pytest.mark.quick


@given(parts=st.lists(st.binary(max_size=40), max_size=12), part_bytes=st.integers(1, 50))
def test_split_parts_are_full_and_in_order(parts: list[bytes], part_bytes: int) -> None:
    views, size_bytes = byte_views(parts)
    pieces = [b"".join(piece) for piece in split_views(views, part_bytes)]
    assert b"".join(pieces) == b"".join(parts)
    assert sum(map(len, pieces)) == size_bytes
    assert all(len(piece) == part_bytes for piece in pieces[:-1])
    assert all(pieces)


@given(st.text(max_size=30))
def test_a_key_is_accepted_or_refused_never_worse(key: str) -> None:
    try:
        accepted = check_key(key)
    except StoreError:
        return
    path = Path("/root/of/store") / accepted
    assert path.resolve() == path
    assert path.is_relative_to("/root/of/store")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ftp"}, "store kind is 'ftp'"),
        ({"kind": "local", "path": None}, "store path is missing"),
        ({"kind": "local", "path": Path("x"), "prefix": "../up"}, r"contains the component '\.\.'"),
        ({"prefix": "p" * 257}, r"store prefix has 257 bytes, over the limit of 256 \(STREAMHOUSE_S3_PREFIX\)"),
        ({"kind": "memory", "prefix": "p"}, "store prefix is set"),
        ({"bucket": ""}, "store bucket is missing"),
        ({"endpoint": "localhost:9000"}, r"store endpoint is 'localhost:9000'.*\(STREAMHOUSE_S3_ENDPOINT\)"),
        ({"secret_key": None}, r"access_key and secret_key \(STREAMHOUSE_S3_ACCESS_KEY, STREAMHOUSE_S3_SECRET_KEY\)"),
        ({"max_connections": 0}, "store max_connections is 0"),
        ({"read_timeout_ms": -1}, "store read_timeout_ms is -1"),
        ({"multipart_part_bytes": 1000}, "multipart_part_bytes is 1000, below S3's minimum of 5242880"),
        (
            {"multipart_threshold_bytes": 6_000_000},
            "multipart_threshold_bytes is 6000000, .*STREAMHOUSE_S3_MULTIPART_PART_BYTES",
        ),
    ],
)
def test_a_bad_setting_names_itself(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"kind": "s3", "bucket": "b", "access_key": "a", "secret_key": "s"}
    assert StoreOptions(**good)
    with pytest.raises(StoreInvalid, match=message):
        StoreOptions(**{**good, **changes})


def test_a_secret_is_not_shown() -> None:
    assert "hush" not in repr(StoreOptions(kind="s3", bucket="b", access_key="a", secret_key="hush"))


def test_open_store_by_url(tmp_path: Path) -> None:
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    assert isinstance(open_store("memory:"), MemoryStore)
    assert isinstance(open_store("s3://bucket"), S3Store)
    assert isinstance(open_store(StoreOptions(kind="memory")), MemoryStore)
    assert options_from_url("file:///a%20b").path == Path("/a b")
    assert options_from_url("s3://b/p/q/?endpoint=http://h:1&region=eu") == StoreOptions(
        kind="s3", bucket="b", prefix="p/q", endpoint="http://h:1", region="eu"
    )


@pytest.mark.parametrize(
    "url",
    ["", "/plain/path", "http://b/p", "file:relative", "file://host/p", "file:///p?x=1", "memory:x", "s3://",
     "s3://key:secret@bucket", "s3://b?region=eu&retries=3"],
)  # fmt: skip
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(StoreInvalid) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
