"""Events per CPU second of the queries of Nexmark, here and on Apache Flink: `make nexmark`.

The same JSON on both sides, one query after the other, system by system in turns: as a job of `streamhouse serve`,
exactly once out of its log and back into it (`streamhouse`), in the engine alone over records in memory (`engine`), and
on Flink's local mini cluster over files, whose result is discarded (`flink`). Events are the records of the topics that
a query reads; CPU seconds are those of whole processes, without what the same takes over 50 events: planning, and
starting and ending a job.
Shown: medians of the rounds, and ratios to Flink.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

from shproto.errors import InvalidStatement
from shruntime.signals import restore_sigint

from bench.common import console, print_table, run, write_json
from bench.nexmark import engine, platform
from bench.nexmark.generator import EPOCH, KINDS, SHARES, Nexmark, json_values
from bench.nexmark.queries import NAMES
from bench.peers import flink

SYSTEMS = ("streamhouse", "engine", "flink")
STATEMENTS_SHOWN = 5
# Enough for Flink's code of a query to be compiled.
WARM_UP_EVENTS = 200_000
Rounds = dict[str, dict[str, list[dict[str, float]]]]  # by query and system


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="of event time, 50 bids, auctions, persons each")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each query and system, of which medians are shown"
    )
    parser.add_argument("--queries", nargs="+", choices=NAMES, default=list(NAMES), help="which (all that can be run)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which (all)")
    parser.add_argument("--profile", action="store_true", help="show the statements that cost the engine most")
    parser.add_argument("--seed", type=int, default=1, help="of the events (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.events % EPOCH or options.events < EPOCH or options.rounds < 1:
        parser.error(f"--events must be a multiple of {EPOCH}, --rounds positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    nexmark = Nexmark(options.seed)
    if "flink" in options.systems:
        flink.check_installed()
    with tempfile.TemporaryDirectory(prefix="streamhouse-bench-", dir=options.dir) as text:
        folder = Path(text)
        plans = planned(options.queries, folder)
        read = {name: events_of(plan, options.events) for name, plan in plans.items()}
        rounds: Rounds = {name: {} for name in plans}
        with ExitStack() as stack:
            process = None
            starts: dict[str, float] = {}
            if "streamhouse" in options.systems:
                process = stack.enter_context(platform.platform(folder))
                await platform.declare(process.address)
                await platform.fill(process.address, nexmark, 0, EPOCH)
                for query in plans:
                    starts[query] = (await platform.run_query(process, query))["cpu_s"]
                await platform.fill(process.address, nexmark, EPOCH, options.events)
            if "flink" in options.systems:
                write_files(nexmark, min(options.events, WARM_UP_EVENTS), folder / "warm")
                write_files(nexmark, EPOCH, folder / "small")
                write_files(nexmark, options.events, folder / "files")
            blocks = engine.records(nexmark, options.events) if "engine" in options.systems else []

            async def results(system: str) -> AsyncIterator[tuple[str, dict[str, float]]]:
                if system == "flink":
                    names = [name for name in plans if (flink.QUERIES / f"{name}.sql").exists()]
                    async with aclosing(
                        flink.run_queries(names, [folder / name for name in ("warm", "small", "files")])
                    ) as found:
                        async for query, figures in found:
                            yield query, figures
                    return
                for query in plans:
                    if system == "streamhouse":
                        assert process is not None
                        figures = await platform.run_query(process, query)
                        yield (
                            query,
                            {**figures, "cpu_s": figures["cpu_s"] - starts[query], "start_cpu_s": starts[query]},
                        )
                    else:
                        measured = engine.run_query(query, blocks, folder / "spill", profile=options.profile)
                        show_statements(query, measured)
                        yield query, {"cpu_s": measured.cpu_s, "seconds": measured.seconds, "rows": measured.rows}

            for number in range(options.rounds):
                for system in options.systems:
                    async for query, figures in results(system):
                        figures["per_cpu_s"] = read[query] / figures["cpu_s"]
                        rounds[query].setdefault(system, []).append(figures)
                        console.print(
                            f"round {number + 1} of {options.rounds}: {query} {system} "
                            f"{figures['per_cpu_s'] / 1e6:.3f} M events per CPU s, {figures['cpu_s']:.2f} CPU s"
                        )
                        # After each query: a run that is stopped has its figures so far.
                        write_json(options.json, vars(options), {"events": read, "rounds": rounds})
        show(rounds, options.systems, options)


def planned(queries: list[str], folder: Path) -> dict[str, Any]:
    """Returns the plans of the queries that can be run, and says why others cannot."""
    plans = {}
    for name in queries:
        try:
            plans[name] = engine.plan_of(name, folder / "spill")
        except InvalidStatement as error:
            console.print(f"{name} cannot be run: {error}")
    return plans


def events_of(plan: Any, events: int) -> int:
    """Returns the records of the streams that a plan reads."""
    return sum(SHARES.get(found.topic, 0) for found in plan.inputs) * events // EPOCH


def write_files(nexmark: Nexmark, events: int, folder: Path) -> None:
    """Writes the events as a file of JSON lines for each kind."""
    folder.mkdir()
    for kind in KINDS:
        with (folder / f"{kind}.json").open("wb") as file:
            for rows in nexmark.blocks(kind, events):
                file.write(b"\n".join(json_values(rows).to_pylist()) + b"\n")


def show_statements(query: str, figures: engine.Figures) -> None:
    """Prints the statements that cost most, if they were measured."""
    for sql, cpu_s in figures.costliest(STATEMENTS_SHOWN):
        console.print(f"  {query} {cpu_s:.3f} CPU s: {sql}", markup=False, soft_wrap=True)


def show(rounds: Rounds, systems: list[str], options: argparse.Namespace) -> None:
    """Prints the medians in millions of events per CPU second, and how many times Flink's they are."""
    others = [system for system in systems if system != "flink"]
    columns = ["", *(f"{system}, M/CPU s" for system in systems)]
    if "flink" in systems:
        columns += [f"{system} : flink" for system in others]
    rows, ratios = [], {system: list[float]() for system in others}
    for query, measured in rounds.items():
        medians = {
            system: statistics.median(one["per_cpu_s"] for one in measured[system])
            for system in systems
            if system in measured
        }
        cells = [f"{medians[system] / 1e6:.3f}" if system in medians else "-" for system in systems]
        if "flink" in systems:
            for system in others:
                if "flink" in medians:
                    ratios[system].append(medians[system] / medians["flink"])
                cells.append(f"{ratios[system][-1]:.1f}" if "flink" in medians else "-")
        rows.append([query, *cells])
    if "flink" in systems and rows:
        middles = [f"{statistics.median(ratios[system]):.1f}" if ratios[system] else "-" for system in others]
        rows.append(["median", *("" for _ in systems), *middles])
    print_table(f"Nexmark, {options.events:,} events, medians of {options.rounds}", columns, rows)


if __name__ == "__main__":
    restore_sigint()
    options = parse_options()
    sys.exit(run(lambda: measure(options)))
