"""Counters that exist, at 0, from the start of a process.

OpenTelemetry shows a counter with its first addition. Until then a rate over it is no data instead of 0, and the first
event is missed: Prometheus takes an increase from one sample to the next, and there is none before.

Owns: the counters made here, by name. Does not own: the SDK, which `Telemetry.configure` installs.
Invariants: a counter shows 0 for each known value of its label, made before the SDK was installed or after.
"""

from collections.abc import Iterable
from enum import Enum

from opentelemetry.metrics import Counter, Meter, UpDownCounter

_made: dict[str, tuple[Counter | UpDownCounter, list[dict[str, str]]]] = {}


def counter(meter: Meter, name: str, description: str, label: str = "", values: Iterable[str] = ()) -> Counter:
    """Makes a counter of `meter`; `values`: those of its only label that are known beforehand."""
    made = meter.create_counter(name, description=description)
    _remember(name, made, [{label: value} for value in values] if label else [{}])
    return made


def up_down_counter(meter: Meter, name: str, description: str) -> UpDownCounter:
    """Makes a counter of `meter` that may fall as well, without labels."""
    made = meter.create_up_down_counter(name, description=description)
    _remember(name, made, [{}])
    return made


def names_of(kinds: type[Enum]) -> list[str]:
    """Returns the members' names in lower case, as labels show them."""
    return [kind.name.lower() for kind in kinds]


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
