"""One architecture is imported without the others, torchvision and torch's compiler; spandrel itself still works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harmoq_ao.zoo.spandrel_import import import_architecture

ROOT = Path(__file__).parents[2]

_ALONE = """
import sys
from harmoq_ao.zoo.spandrel_import import import_architecture
module = import_architecture("spandrel.architectures.DAT.__arch.DAT")
assert module.DAT.__name__ == "DAT"
heavy = {"torchvision", "torch._dynamo", "sympy", "spandrel.architectures.SwinIR"} & set(sys.modules)
assert not heavy, heavy
import spandrel
assert not hasattr(spandrel, "__no_such_dunder__")
assert "spandrel.architectures.SwinIR" not in sys.modules
assert not hasattr(spandrel, "no_such_name")
assert "spandrel.architectures.SwinIR" in sys.modules
from spandrel import MAIN_REGISTRY, ModelLoader
assert "DAT" in {str(support.architecture.id) for support in MAIN_REGISTRY}
assert spandrel.architectures.DAT.DAT is module.DAT
"""

_COMPILED = """
import torch
from harmoq_ao.zoo.spandrel_import import import_architecture
import_architecture("spandrel.architectures.DAT.__arch.DAT")
from einops import rearrange
def swapped(x):
    return rearrange(x, "a b -> b a") + 1
x = torch.arange(6.0).reshape(2, 3)
assert torch.equal(torch.compile(swapped, backend="eager", fullgraph=True)(x), x.T + 1)
"""


@pytest.mark.parametrize("code", [_ALONE, _COMPILED], ids=["alone", "compiled"])
def test_in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        import_architecture("spandrel.architectures.NoSuchThing")
