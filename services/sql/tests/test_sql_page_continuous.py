"""docs/sql.md shows what continuous queries give: its statements are run over its records, in two micro-batches."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from shformat import Records
from shproto.errors import StreamHouseError
from streamhouse_sql.arrow import to_arrow
from streamhouse_sql.core.continuous.statements import ContinuousQuery, ExplainContinuous, parse_job_statement
from streamhouse_sql.core.explain import explained_job
from streamhouse_sql.core.statement import CreateTable, parse
from streamhouse_sql.core.tables import TableDefinition
from streamhouse_sql.pipeline import Pipeline, plan_job

from services.sql.tests.pipeline_world import NOW_US, new_engine
from services.sql.tests.sql_page import PAGE, examples, is_live, shown, topics
from services.sql.tests.start_sql import Result

pytestmark = pytest.mark.timeout(120)

TEXT = PAGE.read_text()


def tables_of_the_page() -> dict[str, TableDefinition]:
    """Returns all tables that the page declares, by name."""
    found = {}
    for example in examples(TEXT):
        if parse_job_statement(example.statement) is None and example.statement.upper().startswith("CREATE"):
            statement = parse(example.statement)
            if isinstance(statement, CreateTable):
                found[statement.definition.name.lower()] = statement.definition
    return found


def outcome(text: str, tables: Mapping[str, TableDefinition], spill: Path) -> str:
    """Returns what the page shows of a statement: the changes of each micro-batch, or the error."""
    records = topics(TEXT)
    try:
        statement = parse_job_statement(text)
        query = statement.query if isinstance(statement, ExplainContinuous) else statement
        assert isinstance(query, ContinuousQuery)
        counts = {topic: len(partitions) for topic, partitions in records.items()}
        plan = plan_job(query, counts, tables, partial(new_engine, spill))
    except StreamHouseError as error:
        return f"error: {error} ({error.reason})\n"
    if isinstance(statement, ExplainContinuous):
        return "".join(f"{line}\n" for line in explained_job(plan))
    pipeline = Pipeline(plan, new_engine(spill))
    result = Result()
    for second in (False, True):
        inputs = {
            found.name: taken(found.topic, records[found.topic], found.columns, second=second) for found in plan.inputs
        }
        step = pipeline.step(inputs, idle=(), now_us=NOW_US)
        result.schema = step.rows.schema
        result.batches += step.rows.to_batches()
    pipeline.close()
    return shown(result)


def taken(topic: str, partitions: Mapping[int, Records], columns: tuple[str, ...], *, second: bool) -> pa.Table:
    """Returns the first half of each partition's records, or the second."""
    batches = []
    for number, records in sorted(partitions.items()):
        half = len(records) // 2
        part = records.slice(half, len(records)) if second else records.slice(0, half)
        batches.append(to_arrow(topic, number, part, columns))
    return pa.Table.from_batches(batches)


def test_the_pages_continuous_queries_give_what_it_shows(tmp_path: Path) -> None:
    tables = tables_of_the_page()
    wrong, count = [], 0
    for example in examples(TEXT):
        if parse_job_statement_or_error(example.statement):
            count += 1
            said = outcome(example.statement, tables, tmp_path / "spill")
            if said != example.shown:
                wrong.append(
                    f"docs/sql.md:{example.line}\n{example.statement}\n--- shown\n{example.shown}--- now\n{said}"
                )
    assert count > 10
    assert not wrong, "\n\n".join(wrong)


def parse_job_statement_or_error(text: str) -> bool:
    """True for a statement about a continuous query, also a wrong one, but no live query: test_sql_page.py runs it."""
    try:
        return parse_job_statement(text) is not None and not is_live(text)
    except StreamHouseError:
        return True
