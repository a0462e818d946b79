"""Devices by name."""

from __future__ import annotations

import re

import torch

from harmoq_ao.common.distributed import is_distributed
from harmoq_ao.common.errors import ConfigError, shown

_NAME = re.compile(r"cpu|cuda(?::(?P<index>[0-9]{1,4}))?")


def device_named(text: str) -> torch.device:
    """Resolve ``cpu``, ``cuda`` (the current GPU; each rank has its own) or ``cuda:1``.

    Raises:
        ConfigError: The name is unknown, the device is missing, or several ranks would share a GPU.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError("Unknown device", found=shown(text), expected="cpu, cuda, or cuda:0 and so on")
    if text == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if match["index"] is not None and is_distributed():
        raise ConfigError("Several ranks cannot share a GPU", found=text, expected="cuda: each rank takes its own GPU")
    if int(match["index"] or 0) >= count:
        raise ConfigError(
            "The device is not available",
            found=f"{text}, where torch {torch.__version__} sees {count} GPUs",
            expected="cpu" if count == 0 else f"cpu, or cuda:0 to cuda:{count - 1}",
            remedy="choose another device, or install a torch that supports this GPU",
        )
    return torch.device("cuda", torch.cuda.current_device() if match["index"] is None else int(match["index"]))
