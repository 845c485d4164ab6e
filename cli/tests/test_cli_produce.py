"""streamhouse produce and consume: their formats."""

import gzip
import json
from typing import get_args

import pytest
from click.testing import CliRunner
from shformat import Codec, decode_batch, read_batch_header
from streamhouse.core.options import Compression
from streamhouse_cli.app import cli

from cli.tests.test_cli_process import shell


@pytest.fixture
def topic(server):
    server.create_topic("t", 2)
    server.create_topic("u", 2)
    return server


@pytest.fixture
def produce(topic, tmp_path):
    """Runs `produce` over a file with these bytes."""

    def run(data, *arguments, code=0, name="t"):
        file = tmp_path / "input"
        file.write_bytes(data)
        command = ["produce", name, "--file", str(file), "--bootstrap", topic.address, *arguments]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == code, result.stderr
        return result

    return run


def rows(server, name="t"):
    """(partition, timestamp_ms, key, value, headers) of every record, by partition and offset."""
    found = []
    for number in range(server.partitions(name)):
        for batch in server.batches(name, number):
            columns = decode_batch(batch)
            headers = [()] * len(columns) if columns.headers is None else columns.headers.to_list()
            found += [
                (number, timestamp_ms, key, value, tuple(pairs))
                for timestamp_ms, key, value, pairs in zip(
                    columns.timestamps_ms.tolist(),
                    columns.keys.to_list(),
                    columns.values.to_list(),
                    headers,
                    strict=True,
                )
            ]
    return found


RECORDS = [
    {"partition": 1, "timestamp_ms": 5, "key": "k", "value": "v", "headers": [{"key": "h", "value_base64": "/w=="}]},
    {"partition": 0, "timestamp_ms": 9, "key_base64": "/w==", "value": None},
    {"partition": 1, "timestamp_ms": 4, "key": None, "value": "two\nlines", "headers": []},
]


def json_lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("compression", get_args(Compression))
def test_batches_are_compressed_as_asked(topic, produce, compression):
    lines = [b"line %d of many that are alike" % number for number in range(500)]
    produce(b"\n".join(lines), "--compression", compression)
    batches = [batch for number in range(2) for batch in topic.batches("t", number)]
    assert {read_batch_header(batch).codec for batch in batches} == {Codec[compression.upper()]}
    assert [value for *_, value, _ in rows(topic)] == lines
    code, shown, error = shell(topic, "$CLI consume t --from earliest")
    assert (code, sorted(shown.splitlines())) == (0, sorted(lines)), error


def test_a_topic_is_copied_by_a_pipe(topic, produce):
    produce(json_lines(*RECORDS), "--format", "json")
    assert rows(topic) == [
        (0, 9, b"\xff", None, ()),
        (1, 5, b"k", b"v", (("h", b"\xff"),)),
        (1, 4, None, b"two\nlines", ()),
    ]
    code, _, err = shell(topic, "$CLI consume t --json | $CLI produce u --format json")
    assert code == 0, err
    assert rows(topic, "u") == rows(topic)


def test_records_for_a_partition_that_is_not_there_name_their_line(topic, produce):
    beyond = {"partition": 2, "value": "w"}
    result = produce(json_lines(RECORDS[0], beyond, RECORDS[1]), "--format", "json", code=1)
    assert result.stderr == (
        "error: line 2: partition 2, but the topic has partitions 0 to 1; --repartition chooses by key; the 1 record "
        "before it was acknowledged, nothing after it was sent\n"
    )
    assert [row[3] for row in rows(topic)] == [b"v"]
    produce(json_lines(beyond), "--format", "json", "--repartition")
    assert {row[3] for row in rows(topic)} == {b"v", b"w"}


def test_records_that_name_no_partition_keep_their_place_among_those_that_do(topic, produce):
    topic.create_topic("one", 1)
    records = [{"partition": 0, "value": str(at)} if at % 3 else {"value": str(at)} for at in range(100)]
    produce(json_lines(*records), "--format", "json", name="one")
    assert [row[3] for row in rows(topic, "one")] == [b"%d" % at for at in range(100)]


def test_a_line_that_is_no_record_is_named(produce):
    result = produce(json_lines(RECORDS[0]) + b"{}\n", "--format", "json", code=1)
    assert result.stderr.startswith("error: line 2: no field 'value'") and result.stderr.count("\n") == 1


def test_a_tab_separates_keys(topic, produce):
    produce(b"k\tv\tw\n", "--key-separator", "\\t")
    assert [row[2:4] for row in rows(topic)] == [(b"k", b"v\tw")]


def test_records_without_the_key_field_are_counted(topic, produce):
    result = produce(b'{"a":{"b":7.0}}\n{"a":1}\n{"a":{"b":null}}\n', "--key-field", "a.b", "--json")
    assert "; 1 have no such field, and so no key\n" in result.stderr
    assert json.loads(result.stdout)["missing_keys"] == 1
    assert sorted(str(row[2]) for row in rows(topic)) == ["None", "None", "b'7.0'"]


def test_a_key_field_that_no_record_has_is_an_error(produce):
    result = produce(b'{"a":1}\n{"a":2}\n', "--key-field", "A", code=1)
    assert result.stderr.endswith("error: no record has the field 'A': all 2 were written without a key\n")
    result = produce(b'{"a":1}\n', "--key-field", "A", code=1)
    assert result.stderr.endswith("error: no record has the field 'A': the one record was written without a key\n")
    assert produce(b"", "--key-field", "A").exit_code == 0


def test_a_gzip_file_by_mistake_is_one_line_and_sends_nothing(topic, produce):
    packed = gzip.compress(b"a\nb\n")
    result = produce(packed, code=1)
    assert result.stderr.startswith("error: the input is gzip data, not lines: produce takes `zcat FILE | ")
    assert result.stderr.endswith("nothing was sent\n") and result.stderr.count("\n") == 1
    assert rows(topic) == []
    produce(packed, "--allow-binary")
    assert b"\n".join(row[3] for row in rows(topic)).startswith(b"\x1f\x8b")


def test_a_first_line_that_could_become_a_magic_number_is_sent(topic, produce):
    produce(b"PAR")
    assert [row[3] for row in rows(topic)] == [b"PAR"]


def test_csv_keeps_quoted_newlines(topic, produce):
    data = b'id,text\r\n1,"two\nlines, ""quoted"""\r\n2,plain\r\n'
    produce(data, "--format", "csv", "--csv-header", "--key-field", "id")
    assert sorted(row[2:4] for row in rows(topic)) == [
        (b"1", b'1,"two\nlines, ""quoted"""'),
        (b"2", b"2,plain"),
    ]
    produce(b"a;b\n", "--format", "csv", name="u")
    assert [row[2:4] for row in rows(topic, "u")] == [(None, b"a;b")]


def test_csv_errors_name_their_row(produce):
    result = produce(b'id\n1\n"open\n', "--format", "csv", "--csv-header", code=1)
    assert result.stderr.startswith("error: row 3: the input ends inside a quoted field")
    result = produce(b"id\n1\n", "--format", "csv", "--csv-header", "--key-field", "ID", code=1)
    assert result.stderr == "error: row 1: no column 'ID', only 'id'; nothing was sent\n"


@pytest.mark.parametrize("key", [[], ["--key-field", "id"]])
@pytest.mark.parametrize(("row", "count"), [(b"3", 1), (b"3,c,d", 3), (b"", 1)])
def test_csv_rows_have_as_many_fields_as_the_header(topic, produce, key, row, count):
    data = b'id,text\n1,a\n2,"b,c"\n' + row + b"\n4,d\n"
    result = produce(data, "--format", "csv", "--csv-header", *key, code=1)
    assert result.stderr == (
        f"error: row 4: the row has {count} field{'s' if count > 1 else ''}, the header has 2; the 2 records before it "
        "were acknowledged, nothing after it was sent\n"
    )
    assert sorted(values for *_, values, _ in rows(topic)) == [b"1,a", b'2,"b,c"']


def test_csv_values_need_be_no_utf8_and_one_column_may_be_empty(topic, produce):
    produce(b"a,b\n\xff,1\n", "--format", "csv", "--csv-header")
    produce(b"a\n\n", "--format", "csv", "--csv-header")
    assert sorted(values for *_, values, _ in rows(topic)) == [b"", b"\xff,1"]


def test_json_is_no_other_format(topic):
    assert shell(topic, "$CLI consume t --json --format text")[0] == 2
    assert shell(topic, "$CLI consume t --json --format json")[0] == 0


def test_raw_values_come_byte_for_byte_with_the_delimiter_behind_each(topic, produce):
    topic.create_topic("one", 1)
    produce(json_lines({"value_base64": "//5h"}, {"value": "b\nc"}, {"value": None}), "--format", "json", name="one")
    consume = "$CLI consume one --format raw"
    assert shell(topic, consume) == (0, b"\xff\xfea\nb\nc\n\n", "")
    assert shell(topic, f"{consume} --delimiter '\\0'") == (0, b"\xff\xfea\0b\nc\0\0", "")
    assert shell(topic, f"{consume} --delimiter '' --max 1") == (0, b"\xff\xfea", "")
