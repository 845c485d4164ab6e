"""Statements about the session: which they are, and what they do to it."""

import pytest
from streamhouse_sql.pgwire.core import commands
from streamhouse_sql.pgwire.core.commands import (
    Begin,
    CloseCursor,
    Command,
    Deallocate,
    Declare,
    Discard,
    End,
    Fetch,
    Nothing,
    Reset,
    Savepoint,
    Set,
    Show,
    command_of,
    split,
)
from streamhouse_sql.pgwire.core.errors import PgError
from streamhouse_sql.pgwire.core.session import Session

pytestmark = pytest.mark.quick


def command(text: str) -> Command | None:
    (piece,) = split(text)
    return command_of(piece)


def session(**parameters: str) -> Session:
    return Session({"user": "me", "database": "streamhouse"} | parameters)


def test_a_text_is_cut_at_semicolons_that_are_none_of_a_text_or_comment() -> None:
    text = "SELECT ';' ; -- one; two\n /* ; */ SELECT \"a;b\";;"
    assert [(piece.text, piece.at) for piece in split(text)] == [("SELECT ';'", 0), ('SELECT "a;b"', 34)]
    assert split(" ; -- nothing\n") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BEGIN", Begin()),
        ("begin transaction isolation level read committed, read only", Begin()),
        ("START TRANSACTION READ WRITE NOT DEFERRABLE", Begin()),
        ("COMMIT", End(True)),
        ("end work", End(True)),
        ("ROLLBACK AND NO CHAIN", End(False)),
        ("abort", End(False)),
        ("SAVEPOINT a", Savepoint("SAVEPOINT", "a")),
        ("ROLLBACK TO SAVEPOINT A", Savepoint("ROLLBACK", "a")),
        ('RELEASE "A"', Savepoint("RELEASE", "A")),
        ("SET statement_timeout TO '5s'", Set("statement_timeout", "5s")),
        ("SET LOCAL Search_Path = public, x", Set("search_path", "public,x", True)),
        ("SET SESSION extra_float_digits = -1", Set("extra_float_digits", "-1")),
        ("SET TIME ZONE 'UTC'", Set("timezone", "UTC")),
        ("SET NAMES 'utf8'", Set("client_encoding", "utf8")),
        ("SET jit TO DEFAULT", Set("jit", None)),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", Nothing("SET")),
        ("SET ROLE NONE", Nothing("SET")),
        ("RESET ALL", Reset(None)),
        ("RESET jit", Reset("jit")),
        ("SHOW server_version", Show("server_version")),
        ("SHOW TRANSACTION ISOLATION LEVEL", Show("transaction_isolation")),
        ("SHOW ALL", Show("all")),
        ("DEALLOCATE PREPARE s", Deallocate("s")),
        ("DEALLOCATE ALL", Deallocate(None)),
        ("DISCARD ALL", Discard("ALL")),
        ('FETCH FORWARD 10 FROM "Cur"', Fetch("Cur", 10, False)),
        ("FETCH ALL IN c", Fetch("c", None, False)),
        ("FETCH c", Fetch("c", 1, False)),
        ("FETCH NEXT FROM c", Fetch("c", 1, False)),
        ("MOVE 3 FROM c", Fetch("c", 3, True)),
        ("CLOSE ALL", CloseCursor(None)),
        ("UNLISTEN *", Nothing("UNLISTEN")),
        ("SELECT 1", None),
        ("SHOW TABLES", None),
        ("EXPLAIN SELECT 1", None),
        ("CREATE TABLE t (a INT) WITH (topic = 't')", None),
    ],
)
def test_a_command_is_recognised(text: str, expected: Command | None) -> None:
    assert command(text) == expected


def test_a_cursor_has_its_query_and_the_place_of_it() -> None:
    declared = command("DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT ';'")
    assert isinstance(declared, Declare)
    assert (declared.name, declared.query.text, declared.query.at, declared.is_hold) == ("c", "SELECT ';'", 41, True)


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", "0A000"),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ", "0A000"),
        ("BEGIN nonsense", "42601"),
        ("COMMIT AND CHAIN", "0A000"),
        ("DECLARE c SCROLL CURSOR FOR SELECT 1", "0A000"),
        ("DECLARE c BINARY CURSOR FOR SELECT 1", "0A000"),
        ("DECLARE c CURSOR", "42601"),
        ("FETCH BACKWARD 1 FROM c", "55000"),
        ("FETCH PRIOR FROM c", "55000"),
        ("SET ROLE admin", "0A000"),
        ("SET jit", "42601"),
        ("SET jit =", "42601"),
        ("COPY t TO STDOUT", "0A000"),
        ("LISTEN x", "0A000"),
        ("PREPARE x AS SELECT 1", "0A000"),
        ("SAVEPOINT", "42601"),
        ("CLOSE c d", "42601"),
        ("DISCARD everything", "42601"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(text: str, sqlstate: str) -> None:
    with pytest.raises(PgError) as refused:
        command(text)
    assert refused.value.sqlstate == sqlstate


@pytest.mark.parametrize(
    ("name", "value", "sqlstate"),
    [
        ("client_encoding", "LATIN1", "22023"),
        ("timezone", "Europe/Berlin", "22023"),
        ("search_path", "other", "22023"),
        ("standard_conforming_strings", "off", "22023"),
        ("statement_timeout", "soon", "22023"),
        ("transaction_isolation", "serializable", "22023"),
        ("server_version", "16", "55P02"),
        ("nothing_like_it", "1", "42704"),
    ],
)
def test_a_setting_is_kept_or_refused(name: str, value: str, sqlstate: str) -> None:
    with pytest.raises(PgError) as refused:
        session().set(name, value)
    assert refused.value.sqlstate == sqlstate


def test_settings_of_the_startup_message_are_kept() -> None:
    began = session(application_name="psql", client_encoding="'utf-8'", options="-c statement_timeout=2min --jit=off")
    assert began.get("application_name") == "psql"
    assert began.get("client_encoding") == "UTF8"
    assert began.timeout_ms(300_000) == 120_000
    assert began.timeout_ms(1_000) == 1_000  # the service's limit is the shorter one


def test_a_driver_that_sends_its_own_zone_is_told_which_zone_is_kept() -> None:
    assert session(TimeZone="Europe/Berlin").reported()["TimeZone"] == "UTC"


@pytest.mark.parametrize(
    ("parameters", "sqlstate"),
    [
        ({"database": "other"}, "3D000"),
        ({"user": ""}, "28000"),
        ({"replication": "database"}, "0A000"),
        ({"options": "-x"}, "22023"),
        ({"no_such_setting": "1"}, "42704"),
    ],
)
def test_a_session_that_cannot_be_had_is_refused(parameters: dict[str, str], sqlstate: str) -> None:
    with pytest.raises(PgError) as refused:
        session(**parameters)
    assert refused.value.sqlstate == sqlstate


def test_a_rollback_takes_settings_back_and_a_commit_does_not() -> None:
    one = session()
    one.begin()
    one.set("application_name", "inside")
    one.set("statement_timeout", "7", is_local=True)
    assert one.get("statement_timeout") == "7"
    assert not one.end(is_commit=False)
    assert (one.get("application_name"), one.get("statement_timeout")) == ("", "0")
    one.begin()
    one.set("application_name", "inside")
    one.set("statement_timeout", "7", is_local=True)
    assert one.end(is_commit=True)
    assert (one.get("application_name"), one.get("statement_timeout")) == ("inside", "0")


def test_a_failed_transaction_commits_nothing_and_a_savepoint_brings_it_back() -> None:
    one = session()
    one.fail()
    assert one.status == "I"
    one.begin()
    one.savepoint("SAVEPOINT", "a")
    one.savepoint("SAVEPOINT", "b")
    one.fail()
    assert one.status == "E"
    one.savepoint("ROLLBACK", "a")
    assert one.status == "T" and one.savepoints == ["a"]
    one.savepoint("RELEASE", "a")
    with pytest.raises(PgError, match="does not exist"):
        one.savepoint("ROLLBACK", "a")
    one.fail()
    assert not one.end(is_commit=True) and one.status == "I"


def test_a_savepoint_needs_a_transaction() -> None:
    with pytest.raises(PgError, match="transaction block"):
        session().savepoint("SAVEPOINT", "a")


def test_every_command_has_a_place_in_the_union() -> None:
    kinds = {kind for kind in vars(commands).values() if isinstance(kind, type) and hasattr(kind, "__match_args__")}
    assert kinds - {commands.Piece} == set(Command.__args__)
