"""Upscaling of image files on a Ray cluster: workers that hold the model take one image after the other.

Actors rather than Ray Data: its actor pools by default retry without limit what a worker died on, while an image that
kills its worker again and again (too large for the memory, say) must end as one line in the list of failures. A result
appears under its name whole or not at all, so repeating an image is harmless.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from harmoq_ao.common.errors import ConfigError, HarmoqError, RayError
from harmoq_ao.common.optional import require
from harmoq_ao.runtime.file_jobs import Failure, Job, UpscaleFile, reason_for

ATTEMPTS = 3
"""Workers that an image may cost before it counts as failed."""


def upscale_on_ray(
    jobs: Sequence[Job],
    open_upscale: Callable[[], UpscaleFile],
    advance: Callable[[], None],
    *,
    workers: int | None = None,
) -> list[Failure]:
    """Do all jobs on the cluster of ``RAY_ADDRESS``, or on this machine where there is none.

    Every job ends once, done or as a failure, also when workers die; folders have to be shared by all machines.

    Args:
        jobs: With absolute paths.
        open_upscale: Called once in every worker, which has one CPU: opens the model.
        advance: Called after each job.
        workers: Number of workers; by default one per CPU of the cluster, at most one per job.

    Returns:
        Failures in the order of the jobs.

    Raises:
        RayError: Ray is not installed, does not start, or its workers cannot open the model.
        ConfigError: A setting that fits no image.
    """
    with _cluster() as ray:
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        pool = _Pool(ray, open_upscale, min(count, len(jobs)))
        return pool.run(jobs, advance)


class _Worker:
    """One process of the cluster: a model, and one image at a time."""

    def __init__(self, open_upscale: Callable[[], UpscaleFile]) -> None:
        torch.set_num_threads(1)
        self._upscale = open_upscale()

    def run(self, job: Job) -> HarmoqError | None:
        """The error of this image, or None."""
        try:
            self._upscale(job)
        except HarmoqError as error:
            return error
        return None


class _Pool:
    """The workers, the job of each, and the jobs that wait."""

    def __init__(self, ray: Any, open_upscale: Callable[[], UpscaleFile], size: int) -> None:
        self._ray, self._size = ray, size
        worker = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        self._start = lambda: worker.remote(open_upscale)
        self._running: dict[Any, tuple[int, Any]] = {}  # index of the job and worker by pending result
        self._waiting: deque[int] = deque()
        self._attempts: list[int] = []
        self._failures: dict[int, str] = {}

    def run(self, jobs: Sequence[Job], advance: Callable[[], None]) -> list[Failure]:
        """Do all jobs; a job leaves the pool when it is done or has failed for good."""
        self._waiting.extend(range(len(jobs)))
        self._attempts = [0] * len(jobs)
        for _ in range(self._size):
            self._give(self._start(), jobs)
        while self._running:
            (result,), _ = self._ray.wait(list(self._running), num_returns=1)
            index, worker = self._running.pop(result)
            ended, alive = self._outcome(index, result)
            if ended:
                advance()
            else:
                self._waiting.append(index)  # after the others: it may be what kills workers
            if self._waiting:
                self._give(worker if alive else self._start(), jobs)
        return [(jobs[index].image, self._failures[index]) for index in sorted(self._failures)]

    def _give(self, worker: Any, jobs: Sequence[Job]) -> None:
        index = self._waiting.popleft()
        self._attempts[index] += 1
        self._running[worker.run.remote(jobs[index])] = index, worker

    def _outcome(self, index: int, result: Any) -> tuple[bool, bool]:
        """Whether the job has ended, and whether its worker can take another one."""
        errors = self._ray.exceptions
        try:
            error = self._ray.get(result)
        except errors.RayTaskError as bug:
            self._failures[index] = reason_for(bug.cause)
            return True, True
        except errors.RayActorError as death:
            return self._died(index, death), False
        if isinstance(error, ConfigError):  # the same for every image
            raise error
        if error is not None:
            self._failures[index] = str(error)
        return True, True

    def _died(self, index: int, death: Any) -> bool:
        """Whether that was the last attempt of a job whose worker died."""
        if "__init__" in str(death):
            raise RayError(
                "A Ray worker could not open the model",
                found=str(death).strip().splitlines()[-1],
                remedy="check that every machine of the cluster has the model's files and harmoq-ao",
            ) from death
        if self._attempts[index] < ATTEMPTS:
            return False
        self._failures[index] = (
            f"{self._attempts[index]} workers died on it. "
            "What to do: upscale in tiles (--tile 256), or with fewer --workers, if the memory did not suffice."
        )
        return True


@contextmanager
def _cluster() -> Iterator[Any]:
    """Context manager that gives Ray, started and shut down again if it was not running."""
    ray = require("Ray", ("ray",), RayError, extra="ray", otherwise=", or use --engine local")
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, ConnectionError, OSError, ValueError) as error:
            raise RayError(
                "Ray does not start",
                found=str(error),
                expected="a cluster at RAY_ADDRESS, or none",
                remedy="check RAY_ADDRESS, or use --engine local",
            ) from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
