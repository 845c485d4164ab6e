"""Event time in programs: windows of rows in microseconds, and as timestamps."""

from __future__ import annotations

from dataclasses import dataclass

from shproto.errors import InvalidStatement

from streamhouse_sql.core.continuous.model import Guard
from streamhouse_sql.core.continuous.nodes import WINDOW_COLUMNS, Node, Select, Windowed
from streamhouse_sql.core.quoting import quoted
from streamhouse_sql.core.windows import Window

_WITH_ZONE = {"TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE"}
_PLAIN = {"TIMESTAMP", "DATETIME", "TIMESTAMP WITHOUT TIME ZONE", "DATE"}


def timestamp(us: str, type_: str) -> str:
    """Returns SQL of a time in microseconds as a timestamp of the time column's type. Raises InvalidStatement."""
    if type_.upper() in _WITH_ZONE:
        return f"make_timestamptz({us})"
    if type_.upper() in _PLAIN:
        return f"make_timestamp({us})"
    what = f"has type {type_}" if type_ else "has no type"
    raise InvalidStatement(
        f"the column of the WATERMARK {what}; windows need TIMESTAMP or TIMESTAMPTZ: name TIMESTAMP AS …",
        clause="WATERMARK",
    )


def aligned(us: str, step_us: int, offset_us: int) -> str:
    """Returns SQL of the last multiple of a step, plus the offset, at or before a time in microseconds."""
    shift = offset_us % step_us
    return f"({us} - ((({us} - {shift}) % {step_us}) + {step_us}) % {step_us})"


def step_of(window: Window) -> int:
    """Returns the distance of two ends of windows."""
    return window.sizes.get("SLIDE") or window.sizes.get("STEP") or window.sizes["SIZE"]


def guard_of(window: Window) -> Guard:
    """Returns the condition that a window may have ended."""
    step = step_of(window)
    return Guard(step_us=step, offset_us=window.sizes.get("OFFSET", 0) % step)


def in_windows(source_sql: str, node: Windowed) -> str:
    """Returns a SELECT of the source's rows in each window that has them, with the window's columns."""
    window, time = node.window, f"epoch_us({quoted(node.window.time.strip(chr(34)))})"
    size, step, offset = window.sizes["SIZE"], step_of(window), window.sizes.get("OFFSET", 0)
    rows = f'SELECT *, {time} AS "#e" FROM ({source_sql}) WHERE {time} IS NOT NULL'
    last = aligned('"#e"', step, offset)
    if window.function == "TUMBLE":
        rows = f'SELECT *, {last} AS "#start" FROM ({rows})'
        rows = f'SELECT *, "#start" + {size} AS "#end" FROM ({rows})'
    elif window.function == "HOP":
        rows = f'SELECT *, unnest(range({last} - {size - step}, {last} + 1, {step})) AS "#start" FROM ({rows})'
        rows = f'SELECT *, "#start" + {size} AS "#end" FROM ({rows})'
    else:
        rows = f'SELECT *, {aligned(chr(34) + "#e" + chr(34), size, offset)} AS "#start" FROM ({rows})'
        rows = f'SELECT *, unnest(range({last} + {step}, "#start" + {size + 1}, {step})) AS "#end" FROM ({rows})'
    values = (
        timestamp('"#start"', node.time_type),
        timestamp('"#end"', node.time_type),
        timestamp('"#end" - 1000', node.time_type),
    )
    shown = ", ".join(f"{value} AS {quoted(name)}" for value, name in zip(values, WINDOW_COLUMNS, strict=True))
    return f'SELECT * EXCLUDE ("#e"), {shown} FROM ({rows})'


def bare(source_sql: str, node: Windowed) -> str:
    """Returns a SELECT of the source's rows, each once, with the slice that has them. The window's columns have no
    values."""
    time = f"epoch_us({quoted(node.window.time.strip(chr(34)))})"
    rows = f'SELECT *, {time} AS "#e" FROM ({source_sql}) WHERE {time} IS NOT NULL'
    none = ", ".join(f"NULL::TIMESTAMP AS {quoted(name)}" for name in WINDOW_COLUMNS)
    if node.window.function == "SESSION":
        return f"SELECT *, {none} FROM ({rows})"
    step = step_of(node.window)
    slice_ = aligned('"#e"', step, node.window.sizes.get("OFFSET", 0))
    return f'SELECT * EXCLUDE ("#e"), {slice_} AS "#slice", {none} FROM ({rows})'


def hidden_of(node: Windowed, *, is_bare: bool) -> tuple[str, ...]:
    """Returns the hidden columns that a window adds."""
    if not is_bare:
        return ("#start", "#end")
    return ("#e",) if node.window.function == "SESSION" else ("#slice",)


def names_window(node: Node) -> bool:
    """True if a node above the windows computes with their columns, and not only passes them on."""
    if not isinstance(node, Select):
        return False
    below = window_below(node.source)
    if below is None:
        return False
    names = [quoted(name) for name in below.names]
    texts = [node.where, *(sql for _, sql in node.unnests), *(sql for _, sql in node.items if sql not in names)]
    return any(name in text for name in names for text in texts) or names_window(node.source)


@dataclass(frozen=True, slots=True)
class Below:
    """The windows that a node's rows are in. `names`: of the window's columns, by those that the node's rows have."""

    node: Windowed
    names: dict[str, str]


def window_below(node: Node) -> Below | None:
    """Returns the windows below a node without state, None without any."""
    if isinstance(node, Windowed):
        return Below(node, {name: name for name in WINDOW_COLUMNS})
    if isinstance(node, Select):
        found = window_below(node.source)
        if found is not None:
            passed = {sql: name for name, sql in node.items}
            return Below(
                found.node, {passed[quoted(name)]: of for name, of in found.names.items() if quoted(name) in passed}
            )
    return None
