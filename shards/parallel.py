"""Running jobs side by side, in threads or processes; the first failure ends them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_AHEAD = 2
"""Jobs under way or queued for each worker: no worker waits for the main process, and few jobs are in memory."""


def run_jobs(
    executor: Executor,
    count: int,
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    cancel: Callable[[], object] = lambda: None,
) -> Iterator[Result]:
    """Yield the results of `work` over the jobs, in the order of completion; few jobs are taken ahead of time.

    The first error of a job is raised; jobs that have not begun are then cancelled.

    Args:
        executor: runs `count` jobs at a time.
        cancel: makes jobs under way end soon; called once if a job fails or the caller gives up.
    """
    pending: set[Future[Result]] = set()
    try:
        for job in jobs:
            pending.add(executor.submit(work, job))
            while len(pending) >= count * _AHEAD:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BaseException:
        cancel()
        raise
    finally:
        for future in pending:
            future.cancel()


def run_threads(
    work: Callable[[Job], Result], jobs: Iterable[Job], threads: int, cancel: Callable[[], object] = lambda: None
) -> list[Result]:
    """Return the results of `work` over the jobs in their order, from threads; see `run_jobs`."""

    def numbered(job: tuple[int, Job]) -> tuple[int, Result]:
        return job[0], work(job[1])

    with ThreadPoolExecutor(threads) as pool:
        results = dict(run_jobs(pool, threads, numbered, enumerate(jobs), cancel))
    return [results[number] for number in sorted(results)]
