"""Counters that exist, at 0, from the start of a process.

OpenTelemetry shows a counter with its first addition. Until then a rate over it is no data instead of 0, and the first
event is missed: Prometheus takes an increase from one sample to the next, and none is before the first.

Owns: the counters made here, by name. Does not own: the SDK, which `Telemetry.configure` installs. Invariants: a
counter shows 0 for each known value of its label, made before the SDK was installed or after.
"""

from collections.abc import Callable, Iterable
from enum import Enum

from opentelemetry.metrics import CallbackOptions, Counter, Meter, Observation, UpDownCounter

_made: dict[str, tuple[Counter | UpDownCounter, list[dict[str, str]]]] = {}


def counter(meter: Meter, name: str, description: str, label: str = "", values: Iterable[str] = ()) -> Counter:
    """Returns a counter of `meter`; `values`: the values of its only label that are known beforehand."""
    made = meter.create_counter(name, description=description)
    _remember(name, made, [{label: value} for value in values] if label else [{}])
    return made


def up_down_counter(meter: Meter, name: str, description: str) -> UpDownCounter:
    """Returns a counter of `meter` that may fall as well, without labels."""
    made = meter.create_up_down_counter(name, description=description)
    _remember(name, made, [{}])
    return made


def names_of(kinds: type[Enum]) -> list[str]:
    """Returns the members' names in lower case, as labels show them."""
    return [kind.name.lower() for kind in kinds]


OTHER_TOPICS = "(other)"
"""Value of the label for topics beyond the limit; no topic may be called so."""


class TopicCounter:
    """A counter by topic. The first `topics_max` topics that count anything have their own, until the process ends;
    all others count together, as OTHER_TOPICS."""

    def __init__(self, meter: Meter, name: str, description: str, topics_max: int) -> None:
        self._topics_max = topics_max
        self._other = 0
        self._counts: dict[str, int] = {}
        callbacks: list[Callable[[CallbackOptions], Iterable[Observation]]] = [self._observe]
        meter.create_observable_counter(name, callbacks, description=description)

    def add(self, topic: str, amount: int) -> None:
        """Counts; a single look-up, as it is called for every batch."""
        count = self._counts.get(topic)
        if count is not None:
            self._counts[topic] = count + amount
        elif len(self._counts) < self._topics_max:
            self._counts[topic] = amount
        else:
            self._other += amount

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        """Returns all counts. Runs in the thread of a scrape."""
        counts = [(OTHER_TOPICS, self._other), *list(self._counts.items())]
        return [Observation(count, {"topic": topic}) for topic, count in counts]


def start_at_zero() -> None:
    """Shows every counter that was made before the SDK was installed."""
    for made, label_sets in _made.values():
        _add_zero(made, label_sets)


def _remember(name: str, made: Counter | UpDownCounter, label_sets: list[dict[str, str]]) -> None:
    _made[name] = (made, label_sets)
    _add_zero(made, label_sets)


def _add_zero(made: Counter | UpDownCounter, label_sets: list[dict[str, str]]) -> None:
    for labels in label_sets:
        made.add(0, labels)
