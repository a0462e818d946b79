"""What trainers save beside the weights: best scores as NumPy numbers, command lines, callbacks.

torch's weights-only unpickler refuses a file for any of them. They become stand-ins, which hold nothing: no package is
imported for them, nothing of theirs is called. What belongs to no package that trainers are known to save is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_KNOWN = (
    *("numpy.", "argparse.Namespace", "pathlib.", "collections.", "datetime.", "omegaconf.", "yacs.config."),
    *("ml_collections.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "mmengine.", "mmcv."),
)


class StandIn:
    """In place of an object that is not needed."""

    def __new__(cls, *_: Any) -> StandIn:
        """Whatever the object is made of."""
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Whatever it holds."""


def load_with_stand_ins(path: Path) -> Any:
    """What `torch.save` wrote, with stand-ins for what is beside the weights.

    Raises:
        Exception: As `torch.load`, or the file names something that no stand-in is made of.
    """
    known = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name.startswith(_KNOWN)]
    with torch.serialization.safe_globals([(StandIn, name) for name in known]):
        return torch.load(path, map_location="cpu", weights_only=True)
