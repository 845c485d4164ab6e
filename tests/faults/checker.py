"""The checker: `python -m tests.faults.checker HISTORY.jsonl` finds what a run did wrong, from its history alone.

Exit code 0: nothing; 1: anomalies, each printed with the lines of the history that show it; 2: the file is no history,
or the run did not come to its end.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import history as h
from tests.faults.checks import CHECKS, Anomaly, permitted_repeats
from tests.faults.silence import Silence, silences, table
from tests.faults.timeline import Outcome, Timeline, index

SHOWN_MAX = 20
"""Anomalies of one kind that are printed: a broken run has thousands. The summary counts them all."""

LINE_CHARS_MAX = 400


@dataclass
class Report:
    """`permitted_repeats`: records written twice as the guarantees allow, see docs/testing-faults.md."""

    operations: int = 0
    acknowledged_operations: int = 0
    refused_operations: int = 0
    unknown_operations: int = 0
    acknowledged_records: int = 0
    polled_records: int = 0
    permitted_repeats: int = 0
    complete: bool = False
    anomalies: list[Anomaly] = field(default_factory=list)
    silences: list[Silence] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        return {anomaly.kind for anomaly in self.anomalies}

    def summary(self) -> Iterator[str]:
        yield (
            f"operations {self.operations}: {self.acknowledged_operations} acknowledged, "
            f"{self.refused_operations} refused, {self.unknown_operations} unknown"
        )
        yield f"records: {self.acknowledged_records} acknowledged, {self.polled_records} handed to consumers"
        if self.permitted_repeats:
            yield f"records written twice by a retry across an unsettled takeover (allowed): {self.permitted_repeats}"
        yield from table(self.silences)
        if not self.complete:
            yield "the run did not come to its end: what is missing may only be late"
        counts = Counter(anomaly.kind for anomaly in self.anomalies)
        found = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
        yield f"anomalies: {len(self.anomalies)}" + (f" ({found})" if found else "")


def check(events: Iterable[h.Event]) -> Report:
    """All checks over one history. Raises HistoryError."""
    timeline = index(events)
    report = _count(timeline)
    report.anomalies = [anomaly for run in CHECKS for anomaly in run(timeline)]
    return report


def _count(timeline: Timeline) -> Report:
    writes = [write for partition in timeline.partitions.values() for write in partition.writes]
    outcomes = Counter(write.outcome for write in writes)
    polled = (
        h.count_of(event.spans)
        for partition in timeline.partitions.values()
        for _, event in partition.reads
        if isinstance(event, h.Polled)
    )
    return Report(
        operations=len(writes),
        acknowledged_operations=outcomes[Outcome.OK],
        refused_operations=outcomes[Outcome.FAIL],
        unknown_operations=outcomes[Outcome.UNKNOWN],
        acknowledged_records=sum(len(partition.acknowledged) for partition in timeline.partitions.values()),
        polled_records=sum(polled),
        permitted_repeats=permitted_repeats(timeline),
        complete=timeline.complete,
        silences=silences(timeline),
    )


def explain(anomalies: Iterable[Anomaly], path: Path) -> Iterator[str]:
    """Anomalies with the lines of the history that show them: one for each operation, as its records say the same."""
    shown: Counter[str] = Counter()
    chosen: dict[tuple[str, int | str], Anomaly] = {}
    for anomaly in anomalies:
        place = (anomaly.kind, anomaly.lines[0] if anomaly.lines else anomaly.text)
        if place in chosen or shown[anomaly.kind] == SHOWN_MAX:
            continue
        shown[anomaly.kind] += 1
        chosen[place] = anomaly
    lines = _lines(path, {line for anomaly in chosen.values() for line in anomaly.lines})
    for anomaly in chosen.values():
        yield f"{anomaly.kind}: {anomaly.text}"
        for line in anomaly.lines:
            if line in lines:
                yield f"    {line}: {lines[line]}"


def _lines(path: Path, wanted: set[int]) -> dict[int, str]:
    with path.open() as lines:
        return {number: line.rstrip("\n")[:LINE_CHARS_MAX] for number, line in enumerate(lines, 1) if number in wanted}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    path = Path(arguments[0])
    try:
        report = check(h.read_history(path))
    except (OSError, h.HistoryError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in explain(report.anomalies, path):
        print(line)
    for line in report.summary():
        print(line)
    if report.anomalies:
        return 1
    return 0 if report.complete else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
