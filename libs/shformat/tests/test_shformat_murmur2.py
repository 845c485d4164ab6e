"""Kafka's published test vectors (clients/src/test/java/org/apache/kafka/common/utils/UtilsTest.java, testMurmur2)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shformat import BytesColumn
from shformat.murmur2 import murmur2, murmur2_many, partition_of, partitions_of

pytestmark = pytest.mark.quick

KAFKA_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.mark.parametrize(("key", "signed"), KAFKA_VECTORS.items())
def test_one_key_hashes_as_in_kafka(key, signed):
    assert murmur2(key) == signed % 2**32
    assert partition_of(key, 7) == (signed & 0x7FFFFFFF) % 7


def test_many_keys_hash_as_in_kafka():
    hashes = murmur2_many(BytesColumn.from_list(list(KAFKA_VECTORS)))
    assert hashes.view(np.int32).tolist() == list(KAFKA_VECTORS.values())


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40), st.binary(min_size=250, max_size=270)), max_size=50))
def test_many_is_one_by_one(keys):
    column = BytesColumn.from_list(keys)
    assert murmur2_many(column).tolist() == [murmur2(key or b"") for key in keys]
    assert partitions_of(column, 12).tolist() == [partition_of(key or b"", 12) for key in keys]
