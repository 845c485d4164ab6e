"""The Sql RPCs: shapes responses. See proto/streamhouse/v1/sql.proto."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from shproto.v1 import sql_pb2

from streamhouse_sql.service import SqlService


class SqlApi:
    """Implements shproto.services.SqlApi."""

    def __init__(self, service: SqlService) -> None:
        self._service = service

    async def execute(self, request: sql_pb2.ExecuteRequest) -> AsyncIterator[sql_pb2.ExecuteResponse]:
        """Yields the result of a statement; the last response has the counts. Raises the errors of
        `SqlService.execute`."""
        answers = self._service.execute(request.statement, request.timeout_ms, local_views=request.local_views)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                response = sql_pb2.ExecuteResponse(arrow_stream=answer.arrow_stream)
                if answer.is_last:
                    response.stats.rows = answer.rows
                    response.stats.records_scanned = answer.records_scanned
                    response.stats.bytes_scanned = answer.bytes_scanned
                    response.stats.elapsed_ms = answer.elapsed_ms
                yield response
