"""Apache Flink on this machine: queries of Nexmark in its local mini cluster, one process for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from bench.common import Wrong

FOLDER = Path(__file__).with_name("flink")
JARS = FOLDER / "jars"
QUERIES = FOLDER / "queries"
TIMEOUT_S = 900
# Flink's serializers look into classes of the JDK.
_OPENED = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("lang", "net", "nio", "text", "time", "util")]


def check_installed() -> None:
    """Raises SystemExit, which says what to do, without Java or the jars."""
    if shutil.which("java") is None or not JARS.is_dir():
        raise SystemExit(
            "Flink needs Java 17 and its jars: "
            f"mvn -f {FOLDER}/pom.xml dependency:copy-dependencies -DoutputDirectory=jars"
        )


async def run_queries(names: Sequence[str], folders: Sequence[Path]) -> AsyncGenerator[tuple[str, dict[str, float]]]:
    """Runs queries over the JSON files of three folders in one process: to warm up, to see what a job costs that reads
    next to nothing, and to measure. Yields their names, and what the last took beyond the second: CPU seconds of the
    whole process and seconds, as `cpu_s` and `seconds`. Raises Wrong if one fails, or takes longer than TIMEOUT_S."""
    command = ["java", "-Xmx3g", "-XX:+UseParallelGC", *_OPENED, f"-Dqueries={QUERIES}", "-cp", f"{JARS}/*"]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command, str(FOLDER / "Nexmark.java"), *map(str, folders), *names,
            stdin=DEVNULL, stdout=PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for name in names:
                async with asyncio.timeout(TIMEOUT_S):
                    line = await process.stdout.readline()
                if not line:
                    log.seek(0)
                    raise Wrong(f"Flink fails at {name}: {log.read().decode(errors='replace')[-2_000:]}")
                figures = json.loads(line)
                yield figures.pop("query"), figures
        except TimeoutError:
            raise Wrong(f"Flink takes more than {TIMEOUT_S} s for {name}") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
