"""docs/sql.md shows what happens: its statements are run over its records, in its order."""

import asyncio
from contextlib import aclosing

import pytest
from shproto.errors import StreamHouseError
from streamhouse_sql.core.continuous.statements import parse_job_statement

from services.sql.tests.sql_page import PAGE, Example, examples, is_live, put_together, shown, topics
from services.sql.tests.start_sql import Result, Sql, StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(120)

TEXT = PAGE.read_text()
PATIENCE_S = 10


async def outcome(sql: Sql, example: Example) -> str:
    try:
        if is_live(example.statement):
            return await live_outcome(sql, example)
        result = await sql.run(example.statement)
    except StreamHouseError as error:
        return f"error: {error} ({error.reason})\n"
    if result.names == ["plan"]:  # what DuckDB does is its own
        return "".join(
            f"{row[0]}\n" for row in result.rows if row[0].startswith(("scan of", "  columns", "  segments", "  part"))
        )
    return shown(result)


async def live_outcome(sql: Sql, example: Example) -> str:
    """Returns the changes of a live query, put together, once they are what the page shows, or no more come."""
    result, said = Result(), ""
    async with aclosing(sql.responses(example.statement)) as responses:
        while said != example.shown:
            try:
                result.add(await asyncio.wait_for(anext(responses), PATIENCE_S))
            except TimeoutError:
                break
            said = shown(put_together(result))
    return said


async def test_the_pages_statements_do_what_it_shows(platform: World, start_sql: StartSql) -> None:
    await platform.start_agent("a")
    for topic, partitions in topics(TEXT).items():
        await platform.create_topic(topic, len(partitions))
        for number, records in partitions.items():
            await platform.grant("a", topic, number)
            half = len(records) // 2
            await platform.produce_records(records.slice(0, half), topic, number)
            await platform.register(topic, number)
            await platform.produce_records(records.slice(half, len(records)), topic, number)
    sql = await start_sql()
    # Those of continuous queries are run by test_sql_page_continuous.py.
    found = [
        example
        for example in examples(TEXT)
        if parse_job_statement(example.statement) is None or is_live(example.statement)
    ]
    assert len(found) > 30
    wrong = []
    for example in found:
        said = await outcome(sql, example)
        if said != example.shown:
            wrong.append(f"docs/sql.md:{example.line}\n{example.statement}\n--- shown\n{example.shown}--- now\n{said}")
    assert not wrong, "\n\n".join(wrong)
