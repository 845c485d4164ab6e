"""streamhouse topic: what it prints, and what it asks for."""

import json

import pytest
from click.testing import CliRunner
from streamhouse.cli import main


@pytest.fixture
def run(server):
    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [*arguments, "--bootstrap", server.address])
        assert result.exit_code == code, result.stderr
        return result

    return run


def test_a_topic_that_exists_stays_as_it_is_and_differences_are_named(server, run):
    server.add_topic("t", 2)
    server.topics["t"].retention_ms = 1000
    create = ["topic", "create", "t", "--if-not-exists"]
    result = run(*create, "--partitions", "3")
    assert result.stdout == "topic t exists with 2 partition(s)\n"
    assert result.stderr == "topic t has partitions 2, not 3\ntopic t has retention_ms 1000, not unset\n"
    same = run(*create, "--partitions", "2", "--retention-ms", "1000", "--json")
    assert (json.loads(same.stdout)["partitions"], same.stderr) == (2, "")
    assert run("topic", "create", "u", "--partitions", "1", "--if-not-exists").stdout.startswith("created topic u")
    assert run("topic", "create", "t", "--partitions", "2", code=1).stderr.endswith("(TOPIC_EXISTS)\n")
