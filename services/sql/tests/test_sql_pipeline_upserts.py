"""Tables with a primary key in continuous queries, held against one query over all records."""

import random
from pathlib import Path

import pytest

from services.sql.tests.pipeline_world import NOW_US, Cut, Log, check, declared, plan_of, random_cuts, run

TABLES = declared(
    "CREATE TABLE accounts (id VARCHAR METADATA FROM 'key', n BIGINT, city VARCHAR, PRIMARY KEY (id) NOT ENFORCED) "
    "WITH (topic = 'accounts')",
    "CREATE TABLE people (id BIGINT, city VARCHAR, PRIMARY KEY (id) NOT ENFORCED) "
    "WITH (topic = 'people', bad_rows = 'skip')",
    "CREATE TABLE orders (account VARCHAR, price BIGINT) WITH (topic = 'orders')",
)


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


def records(seed: int, count: int = 80) -> Log:
    rng = random.Random(seed)
    log = Log({"accounts": 2, "people": 2, "orders": 1})
    for _ in range(count):
        topic = rng.choice(["accounts", "accounts", "people", "orders"])
        key = f"key{rng.randrange(6)}"
        city = rng.choice(["Oslo", "Rome", None])
        value = {
            "accounts": rng.choice([{"n": rng.randrange(5), "city": city}] * 4 + [None]),
            "people": rng.choice([{"id": rng.randrange(6), "city": city}] * 4 + ["no JSON", {"city": "Bern"}]),
            "orders": {"account": key, "price": rng.randrange(9)},
        }[topic]
        log.add(topic, rng.randrange(log.partitions[topic]), value, key=key)
    return log


QUERIES = [
    "SELECT id, n, city FROM accounts",
    "SELECT city FROM accounts WHERE n > 1",
    "SELECT count(*) AS c FROM accounts",
    "SELECT city, count(*) AS c, sum(n) AS s, max(n) AS m, min(id) AS i FROM accounts GROUP BY city",
    "SELECT p.city, count(*) AS c FROM people AS p GROUP BY p.city",
    "SELECT o.price, a.city FROM orders AS o JOIN accounts AS a ON o.account = a.id",
    "SELECT a.city, sum(o.price) AS s FROM orders AS o JOIN accounts AS a ON o.account = a.id GROUP BY a.city",
    "SELECT a.id, p.id AS other FROM accounts AS a JOIN people AS p ON a.city = p.city AND a.n <> p.id",
    "SELECT city, id, n FROM accounts QUALIFY row_number() OVER (PARTITION BY city ORDER BY n DESC, id) <= 2",
]


@pytest.mark.parametrize("sql", QUERIES)
def test_a_record_replaces_the_row_of_its_key(sql: str, spill: Path) -> None:
    rng, log = random.Random(sql), records(len(sql))
    kind = rng.choice(["SINK s INTO out", "MATERIALIZED VIEW v"])
    check(f"CREATE {kind} AS {sql}", sql, log, TABLES, random_cuts(log, rng, rows_max=40), spill, rng)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_many_random_records(seed: int, spill: Path) -> None:
    for sql in QUERIES:
        rng, log = random.Random(seed), records(seed, 120)
        check(f"CREATE SINK s INTO out AS {sql}", sql, log, TABLES, random_cuts(log, rng), spill, rng)


def test_a_record_that_changes_nothing_gives_nothing(spill: Path) -> None:
    log = Log({"accounts": 1, "people": 1, "orders": 1})
    for value in ({"n": 1}, {"n": 1}, None, None, {"n": 2}):
        log.add("accounts", 0, value, key="a")
    plan = plan_of("CREATE SINK s INTO out AS SELECT id, n FROM accounts", log, TABLES)
    assert plan.key_columns == ("id",)
    assert plan.is_changelog
    outcome = run(plan, log, [Cut({("accounts", 0): (at, at + 1)}, (), NOW_US) for at in range(5)], spill)
    assert [step.rows["_op"].to_pylist() for step in outcome.steps] == [[1], [], [-1], [], [1]]
    outcome.pipeline.close()
