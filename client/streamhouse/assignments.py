"""Carries out changes of assignment: opens assigned partitions, stops revoked and lost partitions, and calls the
application's callbacks in between.

Owns: cursors of revoked partitions, the callback that runs. Does not own: the choice of partitions by the group or the
subscription, positions of partitions being read.
Invariants: one callback runs at a time, called by the task or thread that asks for records (`call_due`, or a thread
between `begin` and `finish`); `run` does steps without a callback. Records of a partition are handed over only after
on_assigned has returned, and not any more once on_revoked or on_lost is due. A callback that raises counts as called:
the hand-over continues, and the caller gets the error.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass

from shproto.errors import InvalidArgument

from streamhouse.core.handover import Changes, HandOver, Kind, Partitions, Step
from streamhouse.core.positions import Cursor
from streamhouse.reader import Reader
from streamhouse.records import TopicPartition
from streamhouse.start_positions import StartPositions

log = logging.getLogger(__name__)

Callback = Callable[[list[TopicPartition]], Awaitable[None] | None]
"""A callback: a plain function or a coroutine function, called with sorted partitions."""
PlainCallback = Callable[[list[TopicPartition]], None]

# Time for a cancelled callback to clean up (a rollback), on top of the time that `close` has.
CANCELLED_CALLBACK_MS_MAX = 100
# Callbacks that swallowed their cancellation: the event loop itself keeps no reference to a task.
_RUNNING_ON: set[asyncio.Task[None]] = set()

# The step in whose callback the current code runs. Tasks that a callback starts inherit the variable, and may outlive
# the step.
_INSIDE: ContextVar[Step | None] = ContextVar("step of a callback", default=None)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The application's callbacks for changes of assignment; None: not called."""

    on_assigned: Callback | None = None
    on_revoked: Callback | None = None
    on_lost: Callback | None = None

    def of(self, kind: Kind) -> Callback | None:
        """Returns the callback for a kind of step, None if there is none."""
        found: Callback | None = getattr(self, self.name(kind))
        return found

    def name(self, kind: Kind) -> str:
        """Returns the name of the callback for a kind of step; on_revoked stands in for a missing on_lost."""
        if kind is Kind.ASSIGNED:
            return "on_assigned"
        return "on_revoked" if kind is Kind.REVOKED or self.on_lost is None else "on_lost"

    def updated(self, given: "Callbacks") -> "Callbacks":
        """Returns the callbacks of `given`; where `given` has None, the callback of self."""
        return Callbacks(
            given.on_assigned or self.on_assigned, given.on_revoked or self.on_revoked, given.on_lost or self.on_lost
        )

    def kinds(self) -> set[Kind]:
        """Returns the kinds of steps that have a callback."""
        return {kind for kind in Kind if self.of(kind) is not None}


def callbacks_of(callbacks: Callbacks, *, plain: bool = False) -> Callbacks:
    """Returns the callbacks after checking them. plain: refuses coroutine functions, which plain code cannot await.
    Raises InvalidArgument."""
    for name in ("on_assigned", "on_revoked", "on_lost"):
        value = getattr(callbacks, name)
        if value is not None and not callable(value):
            raise InvalidArgument(f"{name} is {value!r:.100}, must be a callable or None", field=name, value=value)
        if plain and inspect.iscoroutinefunction(value):
            raise InvalidArgument(
                f"{name} is a coroutine function; the consumer for plain code takes plain functions",
                field=name,
                value=value,
            )
    return callbacks


class Assignments:
    """Brings partitions to the state that `assign` and `lose` ask for; the owner runs `run` as a task.
    `revoked(cursors)`: makes the last commit of revoked partitions. `changed()`: called when the owned
    partitions may have changed."""

    def __init__(
        self,
        reader: Reader,
        start_positions: StartPositions,
        callbacks: Callbacks,
        *,
        revoked: Callable[[dict[TopicPartition, Cursor]], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._start_positions = start_positions
        self._revoked = revoked
        self._changed = changed
        self._hand_over = HandOver()
        self._progress = asyncio.Event()
        self._step_due = asyncio.Event()
        self._is_beginning = False
        self._calling: asyncio.Task[None] | None = None
        self._is_awaited = False  # a task of the application awaits `_calling`
        self.callbacks = callbacks
        self.kept: dict[TopicPartition, Cursor] = {}  # of revoked partitions, until their step is finished
        # Read by the application's threads without a lock; True if a callback waits for a task or thread to call it.
        self.is_due = False
        # The thread that calls a callback now, from `begin` to `finish`.
        self.caller: object = None
        self.called: Step | None = None  # the last step with a callback called by `caller`

    # ---- what is owned

    @property
    def cursors(self) -> dict[TopicPartition, Cursor]:
        """Cursors of the partitions being read or revoked, as a copy; read from any thread."""
        return {**self.kept, **self._reader.cursors}

    @property
    def owned(self) -> Partitions:
        """Partitions that no other member may begin on."""
        return self._hand_over.owned

    @property
    def lost(self) -> Partitions:
        """Lost partitions that the application does not know of yet."""
        return self._hand_over.lost

    @property
    def is_settled(self) -> bool:
        """True if nothing is being handed over."""
        return self._hand_over.is_settled

    @property
    def announces(self) -> bool:
        """True if on_assigned has to be called before partitions are read."""
        return self.callbacks.on_assigned is not None

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Reads these partitions from now on, and revokes all others."""
        self._carry_out(self._hand_over.assign(partitions))

    def stop_reading(self) -> None:
        """Revokes all partitions."""
        self.assign(())

    def keep(self, is_kept: Callable[[TopicPartition], bool]) -> None:
        """Revokes the partitions for which `is_kept` returns False."""
        self.assign(filter(is_kept, self._hand_over.assigned))

    def lose(self, partitions: Iterable[TopicPartition] | None = None) -> None:
        """Stops reading these partitions, or all, at once: they do not belong to the consumer any more."""
        self._carry_out(self._hand_over.lose(partitions))

    def adopt(self, partitions: Iterable[TopicPartition]) -> None:
        """Takes over partitions whose cursors the reader already has."""
        self._hand_over.adopt(partitions, announce=self.announces)
        self._look()

    def opened(self, partitions: Iterable[TopicPartition]) -> None:
        """Marks partitions as opened: the reader has their cursors, at their start positions."""
        self._hand_over.opened(partitions, announce=self.announces)
        self._look()

    def _carry_out(self, changes: Changes) -> None:
        # Kept before the reader drops it: until the step is finished its position may be committed.
        for where in changes.revoked:
            self.kept[where] = self._reader.cursors[where]
        for where in changes.lost:
            self.kept.pop(where, None)
        for where in changes.revoked | changes.forgotten | changes.lost:
            self._reader.drop(where)
        for where in changes.released:
            self._reader.release(self._reader.cursors[where])
        if changes.forgotten:
            self._start_positions.forget(changes.forgotten)
        if changes.opening:
            self._start_positions.add(changes.opening)
        self._look()
        self._changed()

    def _look(self) -> None:
        """Wakes the task or thread that may do the next step: `run`, or a caller that asks for records."""
        self._progress.set()
        self._reader.notify()
        self._note_due()
        if self._hand_over.next_step(set(Kind) - self.callbacks.kinds()) is not None:
            self._step_due.set()

    def _note_due(self) -> None:
        """Sets `is_due`: True if a step with a callback is not begun yet, or a callback runs after its caller was
        cancelled. A callback that another task awaits is not due: asking again and again would leave the event loop no
        turn to run that callback."""
        if self._calling is not None:
            self.is_due = not self._is_awaited
        else:
            self.is_due = not self._is_beginning and self._hand_over.next_step(self.callbacks.kinds()) is not None

    def replace_callbacks(self, callbacks: Callbacks) -> None:
        """Uses these callbacks from now on."""
        self.callbacks = callbacks
        self._look()

    async def wait_revoked(self) -> bool:
        """Returns True once no revoked or lost partition is left; False if a callback has to be called
        first."""
        while self._hand_over.is_revoking and not self.is_due:
            self._progress.clear()
            await self._progress.wait()
        return not self._hand_over.is_revoking

    # ---- steps

    async def run(self) -> None:
        """Does the steps that have no callback, until cancelled."""
        while True:
            self._step_due.clear()
            while (step := await self._begin(with_callback=False)) is not None:
                self.finish(step)
            await self._step_due.wait()

    async def begin(self, caller: object) -> Step | None:
        """Returns the next step with a callback, for `caller` to call the callback and then `finish`; the same step
        again if an interrupt came between the two. Returns None if no step is due."""
        if self.caller is not None and self.caller is caller:
            return self._hand_over.running
        step = await self._begin(with_callback=True)
        if step is not None:
            self.caller = caller
        return step

    async def _begin(self, *, with_callback: bool) -> Step | None:
        if self._is_beginning:
            return None
        # Set before the await below: a second caller must not begin the same step.
        self._is_beginning = True
        self._note_due()
        committed: set[TopicPartition] = set()
        try:
            while True:
                kinds = self.callbacks.kinds()
                step = self._hand_over.next_step(kinds if with_callback else set(Kind) - kinds)
                if step is None or step.kind is not Kind.REVOKED or step.partitions <= committed:
                    break
                # The step begins only after the commit: until then the group may still report the member as lost
                # instead.
                committed |= step.partitions
                await self._revoked({where: self.kept[where] for where in step.partitions})
            if step is not None:
                self._hand_over.begin(step)
            return step
        finally:
            self._is_beginning = False
            self._look()

    def finish(self, step: Step) -> None:
        """Ends a step after its callback has returned or raised, or a step without a callback, and carries out the
        changes that follow."""
        self.caller = None
        for where in step.partitions:
            self.kept.pop(where, None)
        self._carry_out(self._hand_over.finish(step))

    async def call_due(self) -> None:
        """Calls the callbacks that are due. Raises the error of a callback.

        Each callback runs in a task of its own: timeouts and cancellations of the caller end its wait, not the
        callback. The next caller waits for that callback and gets its error.
        """
        while True:
            if self._calling is None:
                if not self.is_due:
                    return
                self._calling = asyncio.create_task(self._call(), name="callback")
            elif self._is_awaited:
                return  # another task waits for the callback; its partitions are not read meanwhile
            self._is_awaited = True
            self._note_due()
            calling = self._calling
            try:
                await asyncio.shield(calling)
            except asyncio.CancelledError:
                if not self._is_stopped(calling):
                    raise
                return  # `stop` has cancelled the callback, but not the task that waits here
            finally:
                self._is_awaited = False
                if calling.done():
                    self._calling = None
                self._look()

    def _is_stopped(self, calling: asyncio.Task[None]) -> bool:
        """Returns True if `stop` has cancelled this callback, and the current task is not cancelled itself."""
        task = asyncio.current_task()
        return self._calling is not calling and calling.cancelled() and task is not None and not task.cancelling()

    async def _call(self) -> None:
        step = await self._begin(with_callback=True)
        if step is None:
            return
        try:
            _INSIDE.set(step)
            result = self.callback(step)(sorted(step.partitions))
            if inspect.isawaitable(result):
                await result
        finally:
            self.finish(step)

    def callback(self, step: Step) -> Callback:
        """Returns the callback of a begun step."""
        found = self.callbacks.of(step.kind)
        assert found is not None, "the step was begun for it"
        return found

    def call_plainly(self, step: Step) -> None:
        """Calls the step's callback in the calling thread and records the step in `called`; `finish` follows. Raises
        the error of the callback, or KeyboardInterrupt before the call."""
        # In a context of its own, which ends with the call: no interrupt can come between the end of the call and a
        # reset of `_INSIDE`.
        copy_context().run(self._call_plainly, step)

    def _call_plainly(self, step: Step) -> None:
        _INSIDE.set(step)
        callback, partitions = self.callback(step), sorted(step.partitions)
        self.called = step
        callback(partitions)

    @property
    def is_inside(self) -> bool:
        """True in the code of a callback that has not returned."""
        step = _INSIDE.get()
        return step is not None and step is self._hand_over.running

    def refuse_inside(self, what: str) -> None:
        """Refuses `what`, a method of the consumer, inside a callback. Raises InvalidArgument."""
        if self.is_inside:
            raise InvalidArgument(
                f"{what} is not possible inside a callback of the same consumer: it would wait for itself",
                field="consumer",
            )

    @property
    def is_busy(self) -> bool:
        """True while a callback runs or is due."""
        return self._calling is not None or self.caller is not None or self.is_due

    async def idle(self) -> None:
        """Returns once no other task or thread calls a callback."""
        while self._is_awaited or self.caller is not None:
            self._progress.clear()
            await self._progress.wait()

    async def stop(self) -> None:
        """Cancels the running callback, and waits at most CANCELLED_CALLBACK_MS_MAX for its end. A callback that
        swallows its cancellation runs on by itself, which is logged, and does not keep the consumer from closing."""
        if self._calling is None:
            return
        calling, self._calling = self._calling, None
        step = self._hand_over.running
        calling.cancel()
        await asyncio.wait([calling], timeout=CANCELLED_CALLBACK_MS_MAX / 1000)
        if not calling.done():
            _RUNNING_ON.add(calling)
            calling.add_done_callback(_RUNNING_ON.discard)
            name = "a callback" if step is None else self.callbacks.name(step.kind)
            log.warning("closing: %s was cancelled and goes on all the same: nothing waits for it any longer", name)
        elif not calling.cancelled():
            calling.exception()  # marks the error as retrieved: the waiting task got it, or was cancelled as well
