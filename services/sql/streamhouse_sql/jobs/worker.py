"""Holds jobs: asks the coordinator which are this worker's, runs them, and gives them back.

Owns: the runs, how often a job failed at a micro-batch. Does not own: leases, which the coordinator grants and which
end with the session.
Invariants: at most one run of a job. A job that another worker holds is stopped within a tick, and writes nothing
before that either: journal, pointer and output refuse its epoch. A job that fails again and again at the same
micro-batch is reported as failed, with its place, and harms no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shproto.errors import DataLoss, Fenced, InvalidStatement, StreamHouseError, Unavailable, UnknownTopic
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb
from shruntime.tasks import cancel_and_wait, outcomes

from streamhouse_sql import telemetry
from streamhouse_sql.jobs.run import JobParts, JobRun
from streamhouse_sql.jobs.takeover import CrashLimit

log = logging.getLogger(__name__)

# Reasons of the coordinator to stop a job, as in SqlJobStop.
MOVING, DROPPED = "moving", "dropped"
# Progress is a row in PostgreSQL: every tick would be too often.
REPORT_MS = 5_000
# Objects of dropped jobs whose worker was gone are looked for now and then.
SWEEP_MS = 3_600_000
# Errors that no later try mends.
_FINAL = (InvalidStatement, UnknownTopic, DataLoss, CrashLimit)


@dataclass(slots=True)
class _Held:
    run: JobRun
    task: asyncio.Task[None]


@dataclass(slots=True)
class _Failures:
    """Failures of a job at the same micro-batch."""

    number: int = -1
    count: int = 0


class JobWorker:
    """Runs the jobs of this worker. `token` returns that of its session, empty while there is none."""

    def __init__(self, parts: JobParts, coordinator: CoordinatorApi, token: Callable[[], str]) -> None:
        self.parts = parts
        self._coordinator = coordinator
        self._token = token
        self._clock = parts.reads.clock
        self._settings = parts.settings
        self._held: dict[str, _Held] = {}
        # Runs of jobs that were taken from this worker, and the deletion of their objects, by id of the job: they
        # end beside the ticks, however long the program or the object store takes.
        self._ending: dict[asyncio.Task[None], str] = {}
        self._failures: dict[str, _Failures] = {}
        self._released: dict[str, int] = {}  # epochs of jobs that are stored, and free for others
        self._ended: dict[str, int] = {}  # epochs that ended with an error, and are tried again
        self._is_leaving = False
        self._wake = asyncio.Event()
        self._answered_ms: int | None = None
        self._reported_ms = 0

    # ---- for statements

    @property
    def runs(self) -> Mapping[str, JobRun]:
        """Runs of the jobs that this worker holds, by name of the job."""
        return {held.run.job.job: held.run for held in self._held.values()}

    def gauges(self) -> dict[str, tuple[str, Callable[[], int]]]:
        """Returns what is measured of the jobs that this worker holds: (description, function) by name."""

        def total(value: Callable[[JobRun], int]) -> Callable[[], int]:
            return lambda: sum(value(held.run) for held in self._held.values())

        return {
            "streamhouse_sql_jobs_running": ("jobs that this worker holds", total(lambda run: 1)),
            "streamhouse_sql_job_lag_records": (
                "records written to the inputs of its jobs and not read yet",
                total(lambda run: run.progress().lag_records),
            ),
            "streamhouse_sql_job_state_bytes": (
                "memory of the state of its jobs",
                total(lambda run: run.progress().state_bytes),
            ),
            "streamhouse_sql_job_threads_lost": (
                "threads of jobs that heeded no interrupt and go on",
                lambda: self.parts.programs.lost,
            ),
            "streamhouse_sql_jobs_waiting": (
                "jobs that wait for output or input that exists and does not come",
                total(lambda run: bool(run.trouble)),
            ),
        }

    def trouble(self, job: str) -> str:
        """Returns the reason for which a job that runs here waits, empty if it does not."""
        run = self.runs.get(job)
        return run.trouble if run is not None else ""

    def wake(self) -> None:
        """Makes the next tick begin at once: there may be a job for this worker."""
        self._wake.set()

    def check_holder(self) -> None:
        """Checks that this worker may still speak for its jobs. Raises Unavailable if it has heard no coordinator for
        long: another may hold them."""
        limit_ms = self._settings.sql_view_stale_ms_max
        if self._answered_ms is None or self._clock.monotonic_ms() - self._answered_ms > limit_ms:
            raise Unavailable(
                f"this worker has heard no coordinator for {limit_ms} ms (sql_view_stale_ms_max); another may have "
                "taken over the job of the view",
                retry_after_ms=1_000,
            )

    # ---- running

    async def run(self) -> None:
        """Holds and runs jobs until cancelled; cancelled runs store nothing, as `stop` does before."""
        journal = asyncio.create_task(self.parts.journal.run(), name="job journal")
        sweep = asyncio.create_task(self._sweep(), name="job sweep")
        try:
            while True:
                if journal.done():
                    journal.result()
                await self._tick_once()
                await self._rest()
        finally:
            held = [held.task for held in self._held.values()]
            await cancel_and_wait(journal, sweep, *held, *self._ending)
            self.parts.close()

    async def stop(self) -> None:
        """Ends all runs with their checkpoints stored, and gives the jobs to others; `run` goes on meanwhile, and is
        to be cancelled after it."""
        self._is_leaving = True
        for held in self._held.values():
            held.run.stop()
        tasks = [held.task for held in self._held.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.sql_job_stop_ms / 1000)
        await cancel_and_wait(*tasks)
        with contextlib.suppress(StreamHouseError):  # the session ends soon, and the leases with it
            await self._claim(is_leaving=True)

    async def _rest(self) -> None:
        try:
            async with asyncio.timeout(self._settings.sql_job_tick_ms / 1000):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _tick_once(self) -> None:
        if not self._token() or self._is_leaving:
            return
        try:
            answer = await self._claim()
        except StreamHouseError as error:
            log.info("no coordinator says which jobs this worker holds: %s", error.message)
            return
        self._answered_ms = self._clock.monotonic_ms()
        for stop in answer.stop:
            self._stop(stop)
        for grant in answer.granted:
            if self._is_leaving:  # since the claim was sent: given back untouched
                self._released[grant.job.job_id] = grant.job.epoch
            else:
                self._start(grant)

    async def _claim(self, *, is_leaving: bool = False) -> pb.ClaimSqlJobsResponse:
        now_ms = self._clock.monotonic_ms()
        reports = now_ms - self._reported_ms >= REPORT_MS
        if reports:
            self._reported_ms = now_ms
        released, ended = dict(self._released), dict(self._ended)
        request = pb.ClaimSqlJobsRequest(
            session_token=self._token(),
            held=[
                pb.SqlJobHold(
                    job_id=job_id, epoch=held.run.job.epoch, progress=held.run.progress() if reports else None
                )
                for job_id, held in self._held.items()
            ],
            released=[pb.SqlJobHold(job_id=job_id, epoch=epoch) for job_id, epoch in released.items()],
            ended=[pb.SqlJobHold(job_id=job_id, epoch=epoch) for job_id, epoch in ended.items()],
            is_leaving=is_leaving,
        )
        answer = await self._coordinator.claim_sql_jobs(request)
        _forget(self._released, released)
        _forget(self._ended, ended)
        return answer

    def _stop(self, stop: pb.SqlJobStop) -> None:
        held = self._held.get(stop.job_id)
        if held is None or held.run.job.epoch != stop.epoch:
            return
        log.info("job %s: epoch %d stops: %s", held.run.job.job, stop.epoch, stop.why)
        if stop.why == MOVING:
            held.run.stop()  # its end releases the job
            return
        self._end(stop.job_id)
        if stop.why == DROPPED:
            self._failures.pop(stop.job_id, None)
            drop = self._drop(stop.job_id, self._former(stop.job_id))
            self._ends(stop.job_id, asyncio.create_task(drop, name=f"job drop {held.run.job.job}"))

    def _end(self, job_id: str) -> None:
        """Cancels the run of a job, which ends beside the ticks; the next run of the job waits for it."""
        held = self._held.pop(job_id)
        held.task.cancel()
        self._ends(job_id, held.task)

    def _ends(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._ending[task] = job_id

        def ended(task: asyncio.Task[None]) -> None:
            del self._ending[task]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("job %s: a defect in how it ends", job_id, exc_info=error)

        task.add_done_callback(ended)

    def _former(self, job_id: str) -> list[asyncio.Task[None]]:
        return [task for task, ending in self._ending.items() if ending == job_id]

    async def _drop(self, job_id: str, former: list[asyncio.Task[None]]) -> None:
        """Deletes the objects of a dropped job once its runs have ended, which might write more."""
        await outcomes(*former)
        await self.parts.checkpoints.drop(job_id)

    def _start(self, grant: pb.SqlJobGrant) -> None:
        job_id = grant.job.job_id
        if job_id in self._held:
            # Granted once more although it runs here: the epoch of that run is over.
            self._end(job_id)
        run = JobRun(self.parts, grant)
        task = asyncio.create_task(self._run(run, self._former(job_id)), name=f"job {grant.job.job}")
        self._held[job_id] = _Held(run, task)

    async def _run(self, run: JobRun, former: list[asyncio.Task[None]]) -> None:
        """Runs a job to its end, once its former runs have ended, and notes how it ended."""
        job = run.job
        try:
            await outcomes(*former)
            await run.run()
            self._released[job.job_id] = job.epoch
            log.info("job %s: epoch %d is stored and given back", job.job, job.epoch)
        except Fenced as error:
            log.info("job %s: epoch %d is over: %s", job.job, job.epoch, error.message)
        except StreamHouseError as error:
            await self._failed(run, error)
        except Exception as error:
            log.exception("job %s: a defect", job.job)
            await self._failed(run, error)
        finally:
            held = self._held.get(job.job_id)
            if held is not None and held.run is run:
                # Missing in the next tick, so that the coordinator grants the job anew.
                del self._held[job.job_id]

    async def _failed(self, run: JobRun, error: Exception) -> None:
        """Counts a failure; reports the job as failed once there are too many at the same micro-batch."""
        job = run.job
        message = error.message if isinstance(error, StreamHouseError) else f"{type(error).__name__}: {error}"
        reason = f"{run.where}: {message}" if run.where else message
        failures = self._failures.setdefault(job.job_id, _Failures())
        if failures.number != run.number:
            failures.number, failures.count = run.number, 0
        if not (isinstance(error, StreamHouseError) and error.retriable):
            failures.count += 1
        if failures.count < self._settings.sql_job_attempts_max and not isinstance(error, _FINAL):
            self._ended[job.job_id] = job.epoch
            telemetry.job_failures.add(1, {"outcome": "tried_again"})
            log.warning("job %s: epoch %d ends, and is tried again: %s", job.job, job.epoch, reason)
            return
        telemetry.job_failures.add(1, {"outcome": "failed"})
        log.error("job %s has failed: %s", job.job, reason)
        del self._failures[job.job_id]
        request = pb.FailSqlJobRequest(session_token=self._token(), job_id=job.job_id, epoch=job.epoch, reason=reason)
        try:
            await self._coordinator.fail_sql_job(request)
        except StreamHouseError as failure:
            # Tried again, and fails again, if nobody hears of it now.
            log.warning("job %s: the failure is not reported: %s", job.job, failure.message)

    async def _sweep(self) -> None:
        """Deletes objects of dropped jobs now and then."""

        async def known() -> list[str]:
            listed = await self._coordinator.list_sql_jobs(pb.ListSqlJobsRequest())
            return [job.job_id for job in listed.jobs]

        while True:
            await self._clock.sleep_ms(SWEEP_MS)
            try:
                await self.parts.checkpoints.sweep_dropped(known)
            except StreamHouseError as error:
                log.info("objects of dropped jobs are left for the next sweep: %s", error.message)


def _forget(epochs: dict[str, int], told: Mapping[str, int]) -> None:
    """Removes epochs that the coordinator was told; there may be newer ones, and two calls may have told the same."""
    for job_id, epoch in told.items():
        if epochs.get(job_id) == epoch:
            del epochs[job_id]
