"""torch's own attention modules, whose fused forward computes without calling what lies within.

In evaluation without gradients, ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` may call one fused
function (the fast path of ``torch.backends.mha``). It reads the weights past their sites, and differs from their Python
by the rounding of float32 sums. The Python is what is traced, and what a prepared model equals.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.backends import mha

_lock = threading.Lock()
_users = 0
_before = True


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Context manager in which torch's attention modules run their Python; of the process, as torch's switch is."""
    global _users, _before
    with _lock:
        if _users == 0:
            _before = mha.get_fastpath_enabled()
            mha.set_fastpath_enabled(False)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                mha.set_fastpath_enabled(_before)


def leave_fast_path(model: nn.Module) -> None:
    """Let the encoders and encoder layers within `model` always call their submodules, which will be sites.

    ``nn.MultiheadAttention`` needs nothing: it becomes a graph, traced :func:`without_fast_path`.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "neither": only the fast path asks
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
