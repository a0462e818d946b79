"""Several processes at one quantization: what calibration and refinement need of `torch.distributed`.

Every rank runs the same program on the same images and takes its share of them where the work is large; what they found
is put together, and everything else is repeated on every rank, which keeps their states equal. Without a process group
there is one rank that owns all, and nothing here communicates.

Only tensors travel. A rank that fails or dies closes its connections: the others notice in their next exchange, or
after the timeout, and raise :class:`RankLostError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harmoq_ao.common.errors import ConfigError, HarmoqError, RankLostError

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others: some work, such as conversion, is done by the first rank alone."""
TIMEOUT_VARIABLE = "HARMOQ_RANK_TIMEOUT"
"""Environment variable with another number of seconds."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Whether this process shares the work with others."""
    return world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that prints, shows progress and writes."""
    return rank() == 0


def is_mine(index: int) -> bool:
    """Whether an item belongs to the share of this rank: every rank takes each `world_size`-th."""
    return index % world_size() == rank()


@contextmanager
def launched_by_torchrun(timeout: float | None = None) -> Iterator[None]:
    """Within, this process is a rank of the group that torchrun's environment variables tell of; else nothing changes.

    The backend is gloo, with NCCL for tensors on CUDA devices.

    Args:
        timeout: Seconds to wait for other ranks; by default :data:`TIMEOUT_VARIABLE`, or :data:`TIMEOUT`.

    Raises:
        ConfigError: The variables contradict each other or are incomplete, or the timeout is no positive number.
        RankLostError: The other ranks cannot be reached.
    """
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        yield
        return
    _check_environment()
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with _lost_ranks("joining the group"):
        dist.init_process_group(backend, timeout=timedelta(seconds=_seconds(timeout)))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def own_share() -> Iterator[None]:
    """Within, ranks do different work: an error is this rank's own (:func:`is_own`), no other will tell of it."""
    try:
        yield
    except HarmoqError as error:
        if is_distributed() and not isinstance(error, RankLostError):
            error.add_note(f"rank {rank()}")
        raise


def is_own(error: HarmoqError) -> bool:
    """Whether the error arose within :func:`own_share` and not on every rank alike."""
    return bool(getattr(error, "__notes__", None))


def wait_for_all() -> None:
    """Return when every rank has come here.

    Raises:
        RankLostError: One did not.
    """
    all_sum(torch.zeros(1))


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks in their order; all of one shape and type.

    Raises:
        RankLostError: A rank did not take part.
    """
    if not is_distributed():
        return [tensor]
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    with _lost_ranks("gathering"):
        dist.all_gather(found, tensor.contiguous())
    return found


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks, the same bits on each.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_min(tensor: Tensor) -> Tensor:
    """Smallest over the ranks, entry by entry.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.MIN)


def all_max(tensor: Tensor) -> Tensor:
    """Largest over the ranks, entry by entry.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.MAX)


def broadcast_state(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of the first one.

    Raises:
        RankLostError: A rank did not take part.
    """
    if not is_distributed():
        return
    with torch.no_grad(), _lost_ranks("taking over the first rank's state"):
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks; one that no rank has stays None.

    Args:
        parameters: In the same order on every rank.

    Raises:
        RankLostError: A rank did not take part.
    """
    if not is_distributed():
        return
    learned = list(parameters)
    if not learned:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().reshape(-1) for p in learned])
    present = all_max(flat.new_tensor([p.grad is not None for p in learned])).tolist()
    for parameter, there, total in zip(
        learned, present, all_sum(flat).split([p.numel() for p in learned]), strict=True
    ):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if there else None


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not is_distributed():
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    with _lost_ranks("putting results together"):
        dist.all_reduce(result, operation)
    return result


@contextmanager
def _lost_ranks(doing: str) -> Iterator[None]:
    """Turns the errors of an exchange into one that says what happened and what to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
        if isinstance(error, HarmoqError):
            raise
        raise RankLostError(
            f"Another rank was lost while {doing}",
            found=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            expected=f"{os.environ.get('WORLD_SIZE', world_size())} ranks that run to the end",
            remedy="look for the first error of another rank, then run the same command again: refinement resumes "
            "from its last checkpoint",
        ) from error


def _check_environment() -> None:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            "The environment tells of several ranks, but not all about them",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            expected=", ".join(_VARIABLES),
            remedy="start with torchrun, or unset WORLD_SIZE for a single process",
        )
    try:
        number, size, _ = (int(os.environ[name]) for name in _VARIABLES[:3])
    except ValueError:
        number, size = -1, 0
    if not 0 <= number < size:
        raise ConfigError(
            "The environment's ranks are not readable",
            found=", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES[:3]),
            expected="numbers, the rank below WORLD_SIZE",
            remedy="start with torchrun, or unset WORLD_SIZE for a single process",
        )


def _seconds(timeout: float | None) -> float:
    given = os.environ.get(TIMEOUT_VARIABLE, TIMEOUT) if timeout is None else timeout
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ConfigError("The timeout of ranks is out of range", found=given, expected="a positive number of seconds")
    return seconds
