"""Distributed calibration and refinement, on `torch.distributed`.

Every rank runs the same program on the same images. Expensive work is shared by images and its results are reduced;
everything else is repeated on every rank, which keeps their states equal. Without a process group there is one rank,
and nothing here communicates.

Only tensors are exchanged. When a rank fails or dies its connections close: the others notice at their next exchange,
or after the timeout, and raise :class:`RankLostError`.
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
"""Seconds that a rank waits for the others: some work, such as conversion, only the first rank does."""
TIMEOUT_VARIABLE = "HARMOQ_RANK_TIMEOUT"
"""Environment variable that overrides `TIMEOUT`."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return world_size() > 1


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that prints, shows progress and writes files."""
    return rank() == 0


def is_mine(index: int) -> bool:
    """Whether an item belongs to the share of this rank, every `world_size`-th item."""
    return index % world_size() == rank()


@contextmanager
def launched_by_torchrun(timeout: float | None = None) -> Iterator[None]:
    """Context manager that joins the process group of torchrun's environment variables; a no-op without them.

    The backend is gloo, with NCCL for tensors on CUDA devices.

    Args:
        timeout: Seconds to wait for other ranks; by default :data:`TIMEOUT_VARIABLE`, or :data:`TIMEOUT`.

    Raises:
        ConfigError: The variables are inconsistent or incomplete, or the timeout is not a positive number.
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
    """Context manager for work that differs between ranks: an error gets the :attr:`HarmoqError.rank` it arose on."""
    try:
        yield
    except HarmoqError as error:
        if is_distributed() and not isinstance(error, RankLostError):
            error.rank = rank()
        raise


def wait_for_all() -> None:
    """Wait until every rank has reached this call.

    Raises:
        RankLostError: A rank did not.
    """
    all_sum(torch.zeros(1))


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Gather the tensors of all ranks, in rank order; all have one shape and type.

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
    """Sum over the ranks, bit-identical on each.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_min(tensor: Tensor) -> Tensor:
    """Elementwise minimum over the ranks.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.MIN)


def all_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum over the ranks.

    Raises:
        RankLostError: A rank did not take part.
    """
    return _reduced(tensor, dist.ReduceOp.MAX)


def broadcast_state(module: nn.Module) -> None:
    """Broadcast parameters and buffers of the first rank to all.

    Raises:
        RankLostError: A rank did not take part.
    """
    if not is_distributed():
        return
    with torch.no_grad(), _lost_ranks("taking over the first rank's state"):
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all ranks; one that is None everywhere stays None.

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
    """Context manager that turns the errors of an exchange into a :class:`RankLostError`."""
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
            "The environment variables of torchrun are incomplete",
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
            "The ranks in the environment are not valid",
            found=", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES[:3]),
            expected="numbers, with RANK below WORLD_SIZE",
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
