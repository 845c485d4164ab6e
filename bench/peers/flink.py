"""Apache Flink on this machine: a query of Nexmark in its local mini cluster, a process each time."""

from __future__ import annotations

import asyncio
import json
import shutil
from asyncio.subprocess import DEVNULL, PIPE
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


async def run_query(name: str, warm_up: Path, folder: Path) -> dict[str, float]:
    """Runs a query over the JSON files of `warm_up`, and then over those of `folder`. Returns the CPU seconds of the
    whole process and the seconds of the latter, as `cpu_s` and `seconds`. Raises Wrong if it fails or takes longer
    than TIMEOUT_S."""
    command = ["java", "-Xmx3g", "-XX:+UseParallelGC", *_OPENED, f"-Dqueries={QUERIES}", "-cp", f"{JARS}/*"]
    process = await asyncio.create_subprocess_exec(
        *command, str(FOLDER / "Nexmark.java"), name, str(warm_up), str(folder),
        stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, errors = await process.communicate()
    except TimeoutError:
        raise Wrong(f"Flink takes more than {TIMEOUT_S} s for {name}") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Wrong(f"Flink fails at {name}: {errors.decode(errors='replace')[-2_000:]}")
    figures: dict[str, float] = json.loads(out.decode().splitlines()[-1])
    return figures
