"""Carries out hand-overs: opens partitions that a consumer is given, stops those it gives up or has lost, and calls the
application's callbacks in between.

Owns: the positions of partitions that are being given up, the callback that runs. Does not own: which partitions the
group or the subscription gives, positions of what is read.
Invariants: one callback runs at a time, by whoever asks for records (`call_due`, or a thread between `begin` and
`finish`); steps without a callback are done by `run`. Records of a partition are handed over only after on_assigned has
returned, and not any more once on_revoked or on_lost is due. A callback that raises has been called: the hand-over goes
on, and the error is its caller's.
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
"""Called with partitions, in order; a plain function or a coroutine function."""
PlainCallback = Callable[[list[TopicPartition]], None]

# What a callback that was cancelled may take for its own end (a rollback), on top of the time that `close` has.
CANCELLED_CALLBACK_MS_MAX = 100
# Callbacks that swallowed their cancellation: the event loop itself keeps no task.
_RUNNING_ON: set[asyncio.Task[None]] = set()

# The step whose callback the code belongs to. Tasks that a callback starts have it as well, and may outlive the step.
_INSIDE: ContextVar[Step | None] = ContextVar("step of a callback", default=None)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions of the application that hear of its partitions; None: not told."""

    on_assigned: Callback | None = None
    on_revoked: Callback | None = None
    on_lost: Callback | None = None

    def of(self, kind: Kind) -> Callback | None:
        """Returns the callback for a kind of step, None if there is none."""
        found: Callback | None = getattr(self, self.name(kind))
        return found

    def name(self, kind: Kind) -> str:
        """Returns the name of the callback for a kind of step: on_revoked stands in for on_lost."""
        if kind is Kind.ASSIGNED:
            return "on_assigned"
        return "on_revoked" if kind is Kind.REVOKED or self.on_lost is None else "on_lost"

    def updated(self, given: "Callbacks") -> "Callbacks":
        """Returns the callbacks of `given`, and for those that are None there the ones of self."""
        return Callbacks(
            given.on_assigned or self.on_assigned, given.on_revoked or self.on_revoked, given.on_lost or self.on_lost
        )

    def kinds(self) -> set[Kind]:
        """Returns the steps that have a callback."""
        return {kind for kind in Kind if self.of(kind) is not None}


def callbacks_of(callbacks: Callbacks, *, plain: bool = False) -> Callbacks:
    """Checks the callbacks, and returns them. plain: refuses coroutine functions, which plain code could not await.
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
    """`want` and `lose` as the group or the subscription says, with `run` as a task of the owner. `revoked(cursors)`:
    the last commit of partitions before they are given up. `changed()`: told when what is owned may have changed."""

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
        self._news = asyncio.Event()
        self._is_beginning = False
        self._calling: asyncio.Task[None] | None = None
        self._is_awaited = False  # the task above, by a task of the application
        self.callbacks = callbacks
        self.kept: dict[TopicPartition, Cursor] = {}  # of what is being given up
        # Read by the application's threads, without a lock: a callback waits for one of them.
        self.is_due = False
        # The thread whose call is under way, from `begin` to `finish`.
        self.caller: object = None
        self.called: Step | None = None  # the last step whose callback it has called

    # ---- what is owned

    @property
    def cursors(self) -> dict[TopicPartition, Cursor]:
        """Cursors of what is read or being given up, as they are now; asked for from any thread."""
        return {**self.kept, **self._reader.cursors}

    @property
    def owned(self) -> Partitions:
        """Partitions that no other member may begin on."""
        return self._hand_over.owned

    @property
    def lost(self) -> Partitions:
        """Partitions that were lost without the application knowing yet."""
        return self._hand_over.lost

    @property
    def is_settled(self) -> bool:
        """True if nothing is being handed over."""
        return self._hand_over.is_settled

    @property
    def announces(self) -> bool:
        """True if the application is to be told of partitions before they are read."""
        return self.callbacks.on_assigned is not None

    def want(self, partitions: Iterable[TopicPartition]) -> None:
        """Reads these partitions from now on, and gives up all others."""
        self._carry_out(self._hand_over.want(partitions))

    def stop_reading(self) -> None:
        """Gives up all partitions."""
        self.want(())

    def keep(self, is_kept: Callable[[TopicPartition], bool]) -> None:
        """Gives up the partitions that are not to be kept."""
        self.want(filter(is_kept, self._hand_over.wanted))

    def lose(self, partitions: Iterable[TopicPartition] | None = None) -> None:
        """Stops reading these partitions, or all, at once: they are not the consumer's any more."""
        self._carry_out(self._hand_over.lose(partitions))

    def adopt(self, partitions: Iterable[TopicPartition]) -> None:
        """Takes over partitions whose cursors the reader has already."""
        self._hand_over.adopt(partitions, announce=self.announces)
        self._look()

    def opened(self, partitions: Iterable[TopicPartition]) -> None:
        """Notes that the reader has the cursors of these partitions: it is known where to begin."""
        self._hand_over.opened(partitions, announce=self.announces)
        self._look()

    def _carry_out(self, changes: Changes) -> None:
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
        """Wakes those who may do the next step: `run`, or whoever asks for records."""
        self._progress.set()
        self._reader.notify()
        self._note_due()
        if self._hand_over.next_step(set(Kind) - self.callbacks.kinds()) is not None:
            self._news.set()

    def _note_due(self) -> None:
        """Says in `is_due` whether there is something for whoever asks for records: a step that nobody has begun, or a
        callback that runs and whose caller was cancelled. What another does is nothing to ask for: asking again and
        again would leave the event loop no turn to do it."""
        if self._calling is not None:
            self.is_due = not self._is_awaited
        else:
            self.is_due = not self._is_beginning and self._hand_over.next_step(self.callbacks.kinds()) is not None

    def replace_callbacks(self, callbacks: Callbacks) -> None:
        """Calls these from now on."""
        self.callbacks = callbacks
        self._look()

    async def given_up(self) -> bool:
        """Returns True once nothing is left of what was taken away; False if a callback is to be called before."""
        while self._hand_over.is_giving_up and not self.is_due:
            self._progress.clear()
            await self._progress.wait()
        return not self._hand_over.is_giving_up

    # ---- steps

    async def run(self) -> None:
        """Does the steps that have no callback, until cancelled."""
        while True:
            self._news.clear()
            while (step := await self._begin(with_callback=False)) is not None:
                self.finish(step)
            await self._news.wait()

    async def begin(self, caller: object) -> Step | None:
        """Returns the step whose callback `caller` is to call, before `finish`: the same one again if an interrupt came
        between the two. None if none is due."""
        if self.caller is not None and self.caller is caller:
            return self._hand_over.running
        step = await self._begin(with_callback=True)
        if step is not None:
            self.caller = caller
        return step

    async def _begin(self, *, with_callback: bool) -> Step | None:
        if self._is_beginning:
            return None
        self._is_beginning = True
        self._note_due()
        committed: set[TopicPartition] = set()
        try:
            while True:
                kinds = self.callbacks.kinds()
                step = self._hand_over.next_step(kinds if with_callback else set(Kind) - kinds)
                if step is None or step.kind is not Kind.REVOKED or step.partitions <= committed:
                    break
                # Begun only when that is done: until then the group may still find the member lost instead.
                committed |= step.partitions
                await self._revoked({where: self.kept[where] for where in step.partitions})
            if step is not None:
                self._hand_over.begin(step)
            return step
        finally:
            self._is_beginning = False
            self._look()

    def finish(self, step: Step) -> None:
        """Ends a step whose callback has returned or raised, or that has none, and carries out what follows."""
        self.caller = None
        for where in step.partitions:
            self.kept.pop(where, None)
        self._carry_out(self._hand_over.finish(step))

    async def call_due(self) -> None:
        """Calls the callbacks that are due. Raises what a callback raises.

        Each call has a task of its own: the caller's timeouts and cancellations end its wait, not the callback. Who
        asks next waits for that and gets its error.
        """
        while True:
            if self._calling is None:
                if not self.is_due:
                    return
                self._calling = asyncio.create_task(self._call(), name="callback")
            elif self._is_awaited:
                return  # another task's; what it is about is not read meanwhile
            self._is_awaited = True
            self._note_due()
            calling = self._calling
            try:
                await asyncio.shield(calling)
            except asyncio.CancelledError:
                if not self._is_stopped(calling):
                    raise
                return  # `stop` has cancelled the callback, nobody the task that waits for it
            finally:
                self._is_awaited = False
                if calling.done():
                    self._calling = None
                self._look()

    def _is_stopped(self, calling: asyncio.Task[None]) -> bool:
        """True if `stop` has cancelled this callback, and the task that runs is not cancelled itself."""
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
        """Returns the callback of a step that has one."""
        found = self.callbacks.of(step.kind)
        assert found is not None, "the step was begun for it"
        return found

    def call_plainly(self, step: Step) -> None:
        """Calls the step's callback in the calling thread, and notes that in `called`; `finish` follows. Raises what
        the callback raises, or KeyboardInterrupt before the call."""
        # In a context of its own: an interrupt cannot come between its end and saying that it is over.
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
        """Refuses `what`, a call of the consumer, inside a callback. Raises InvalidArgument."""
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
        """Returns once nobody else calls a callback."""
        while self._is_awaited or self.caller is not None:
            self._progress.clear()
            await self._progress.wait()

    async def stop(self) -> None:
        """Cancels the callback that runs, and waits CANCELLED_CALLBACK_MS_MAX at most for its end: one that swallows
        its cancellation runs on by itself, which is logged, and does not keep the consumer from being closed."""
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
            calling.exception()  # asked for: whoever waited for the callback has got it, or has been cancelled, too
