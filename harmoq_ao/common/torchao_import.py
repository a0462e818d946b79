"""Imports torchao with the deprecation notice silenced that it logs through torch about its own enums."""

from __future__ import annotations

import logging

_log = logging.getLogger("torch.utils._pytree")
_level = _log.level
_log.setLevel(logging.ERROR)
try:
    import torchao.quantization.pt2e as pt2e
finally:
    _log.setLevel(_level)

__all__ = ["pt2e"]
