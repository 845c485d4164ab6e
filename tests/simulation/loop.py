"""An event loop whose time is virtual and whose order of events comes from a seed.

Time stands still while anything can run, then jumps to the next timer. There is no I/O and there are no threads: what
goes to an executor runs on the loop, later. Every callback belongs to a Process (a group of tasks that lives, pauses
and dies together), found by the context it was scheduled in. Within a process callbacks run in their order, as asyncio
promises; which process runs next is drawn.

Deterministic: tasks and futures hash by number, because asyncio and its users iterate over sets of them.
"""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

STEPS_PER_INSTANT_MAX = 100_000
"""Callbacks without time passing; beyond that something spins. A healthy instant has some hundred."""

PRUNE_TASKS = 256

PROCESS: ContextVar["Process"] = ContextVar("process")


class PowerCut(BaseException):
    """Raised by the simulated disk in the middle of an operation: the process that asked for it is gone."""


class Stuck(Exception):
    """Nothing can ever happen any more, or something spins without time passing."""


class Step:
    """asyncio.Handle and asyncio.TimerHandle, as far as anybody uses them: there are tens of thousands per run."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "when_s")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, when: float) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.when_s = when
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def when(self) -> float:
        return self.when_s

    def cancelled(self) -> bool:
        return self.is_cancelled


class Process:
    """Tasks that share a fate. A dead one never runs again, not even its `finally`: its memory is simply gone."""

    def __init__(self, loop: "SimLoop", name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.paused = False
        self.pauses = 0
        self.ready: deque[Step] = deque()
        self.steps_left: int | None = None  # dies when it comes to 0
        self.tasks: dict[int, SimTask] = {}  # strong: what is dropped would run its `finally`
        self.on_death: list[Callable[[], None]] = []
        self.context = copy_context()
        self.context.run(PROCESS.set, self)
        loop.processes.append(self)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str = "") -> "SimTask":
        return self.loop.create_task(coroutine, name=name or None, context=self.context.copy())

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs it at once, as part of this process."""
        return self.context.copy().run(function, *args)

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1
        self.loop.hold(self)

    def resume(self) -> None:
        self.paused = False
        self.loop.release(self)

    def die(self) -> None:
        if self.alive:
            self.alive = False
            self.loop.hold(self)
            for callback in self.on_death:
                callback()


# Spreads numbers over the hashes: sets of consecutive numbers, most of them deleted again, probe for ever.
_SPREAD = 0x9E3779B97F4A7C15
_HASH_MASK = (1 << 61) - 2


class SimTask(asyncio.Task[Any]):
    number = 0
    process: Process

    def __hash__(self) -> int:
        return self.number * _SPREAD & _HASH_MASK


class SimFuture(asyncio.Future[Any]):
    number = 0

    def __hash__(self) -> int:
        return self.number * _SPREAD & _HASH_MASK


class SimLoop(asyncio.BaseEventLoop):
    """`died` is told of a process that dies in the middle of a step: (process, why)."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._now = 0.0
        self._number = 0
        self._runnable: list[Process] = []
        self._timers: list[tuple[float, int, Step]] = []
        self._executor_free_at: dict[Any, float] = {}
        self._in_executor = False
        self.steps = 0
        self._instant_ends = STEPS_PER_INSTANT_MAX
        self.processes: list[Process] = []
        self.world = Process(self, "world")
        self.died: Callable[[Process, str], None] = lambda process, why: process.die()
        self.executor_delay: Callable[[Process, bool], float] = lambda process, own: 0.0002
        self.connect: Callable[[str, int], Any] | None = None

    # ---- time and order

    get_debug = staticmethod(bool)  # asked for every future, so it may cost nothing

    def time(self) -> float:
        return self._now

    # The callers are asyncio's own: nothing is won by repeating its generic signatures.
    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        step = Step(callback, args, context if context is not None else copy_context(), 0.0)
        self._enqueue(step)
        return step

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)  # there is no other thread

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        timer = Step(callback, args, context if context is not None else copy_context(), when)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        when = self._now + delay
        timer = Step(callback, args, context if context is not None else copy_context(), when)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, timer))
        return timer

    def _enqueue(self, step: Step) -> None:
        process = step.context.get(PROCESS, self.world)
        ready = process.ready
        ready.append(step)
        if len(ready) == 1 and process.alive and not process.paused:
            self._runnable.append(process)

    def hold(self, process: Process) -> None:
        if process in self._runnable:
            self._runnable.remove(process)

    def release(self, process: Process) -> None:
        if process.ready and process.alive and process not in self._runnable:
            self._runnable.append(process)

    def _run_once(self) -> None:
        runnable, step, advance = self._runnable, self._step, self._advance
        while not self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop has it
            if runnable:
                step()
            else:
                advance()

    def _step(self) -> None:
        runnable = self._runnable
        at = int(self._rng.random() * len(runnable)) if len(runnable) > 1 else 0
        process = runnable[at]
        if process.steps_left is not None and self._counted_out(process):
            return
        step = process.ready.popleft()
        if not process.ready:
            runnable[at] = runnable[-1]
            runnable.pop()
        self.steps += 1
        if self.steps > self._instant_ends:
            last = f"{step.callback} of {process.name}"
            raise Stuck(f"{STEPS_PER_INSTANT_MAX} steps at {self._now:.6f}, the last one {last}")
        if not step.is_cancelled:
            try:
                step.context.run(step.callback, *step.args)
            except Exception as error:  # noqa: BLE001 - as in asyncio.Handle: it is told to the loop's handler
                self.call_exception_handler({"message": f"exception in {step.callback}", "exception": error})

    def _counted_out(self, process: Process) -> bool:
        assert process.steps_left is not None
        process.steps_left -= 1
        if process.steps_left > 0:
            return False
        process.steps_left = None
        self.died(process, "killed between two steps")
        return not process.alive

    def _advance(self) -> None:
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Stuck(f"nothing is left to happen at {self._now:.6f}")
        self._now = max(self._now, timers[0][0])
        self._instant_ends = self.steps + STEPS_PER_INSTANT_MAX
        while timers and timers[0][0] <= self._now:
            timer = heapq.heappop(timers)[2]
            if not timer.is_cancelled:
                self._enqueue(timer)

    # ---- tasks, futures, executors

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def create_future(self) -> SimFuture:
        future = SimFuture(loop=self)
        future.number = self._next_number()
        return future

    def create_task(  # type: ignore[override]
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> SimTask:
        number = self._next_number()
        task = SimTask.__new__(SimTask)
        task.number = number  # before asyncio puts it into a set
        task.__init__(coro, loop=self, name=name or f"task {number}", context=context)  # type: ignore[misc]
        process = context.get(PROCESS, self.world) if context is not None else PROCESS.get(self.world)
        task.process = process
        process.tasks[number] = task
        if number % PRUNE_TASKS == 0:
            process.tasks = {key: kept for key, kept in process.tasks.items() if not kept.done()}
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """One call after the other for an executor of its own, at once for the common one (None)."""
        process, future = PROCESS.get(self.world), self.create_future()
        start = self._now
        if executor is not None:
            start = max(start, self._executor_free_at.get(executor, 0.0))
        start += self.executor_delay(process, executor is not None)
        end = start + self.executor_delay(process, executor is not None)
        if executor is not None:
            self._executor_free_at[executor] = end
        self.call_at(start, self._execute, process, future, end, func, args)
        return future

    def _execute(self, process: Process, future: SimFuture, end: float, func: Any, args: Any) -> None:
        if future.cancelled() and self._rng.random() < 0.5:
            return  # it had not begun; or the thread goes on although nobody waits
        self._in_executor = True
        try:
            result, error = func(*args), None
        except PowerCut:
            self.died(process, "lost its power in the middle of a disk operation")
            return
        except Exception as failure:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
            result, error = None, failure
        finally:
            self._in_executor = False
        self.call_at(end, _deliver, future, result, error)

    @property
    def in_executor(self) -> bool:
        """Whether what runs now runs "in a thread"."""
        return self._in_executor

    # ---- what BaseEventLoop leaves to its subclasses

    def _process_events(self, event_list: Any) -> None:
        raise AssertionError("there is no I/O")

    def _write_to_self(self) -> None:
        raise AssertionError("there are no other threads")

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        assert self.connect is not None
        await self.connect(host, port)
        return _NoTransport(), protocol_factory()


def _deliver(future: SimFuture, result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class _NoTransport(asyncio.Transport):
    """Of a connection that is only opened to see whether somebody is there."""

    def close(self) -> None:
        """Nothing is open."""

    def is_closing(self) -> bool:
        return True
