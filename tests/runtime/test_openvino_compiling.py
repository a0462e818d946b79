"""Signals after OpenVINO compiled: its signal stack must not stay behind."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

import harmoq_ao
from harmoq_ao.runtime.openvino import compiling
from harmoq_ao.runtime.openvino.compiling import SignalStack, signal_stack

DISABLED = compiling._DISABLED
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO: pip install harmoq-ao[openvino]")
def test_a_signal_after_two_models_that_went_in_the_order_they_came(tmp_path: Path) -> None:
    """The process died of SIGSEGV when its handler ran. The second model comes from a file."""
    program = dedent("""
        import gc, os, signal, sys
        from pathlib import Path
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops
        from harmoq_ao.runtime.openvino.compiling import compile_on_cpu

        def model():
            image = ops.parameter([1, 8], np.float32)
            return ov.Model([ops.relu(image)], [image])

        first = compile_on_cpu(model())
        ov.save_model(model(), sys.argv[1])
        second = compile_on_cpu(Path(sys.argv[1]))
        for compiled in (first, second):
            compiled(np.zeros((1, 8), np.float32))
        del compiled, first
        gc.collect()
        del second
        gc.collect()
        signal.signal(signal.SIGINT, lambda *_: print("handled"))
        os.kill(os.getpid(), signal.SIGINT)
    """)
    root = Path(harmoq_ao.__file__).parents[1]
    command = [sys.executable, "-c", program, str(tmp_path / "model.xml")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@linux
@pytest.mark.parametrize(("size", "after"), [(1 << 17, 0), (16, DISABLED)], ids=["taken back", "refused as too small"])
def test_the_stack_of_a_thread_afterwards(monkeypatch: pytest.MonkeyPatch, size: int, after: int) -> None:
    memory = ctypes.create_string_buffer(1 << 17)
    before = SignalStack(ctypes.addressof(memory), 0, size)
    monkeypatch.setattr(compiling, "signal_stack", lambda: before)

    def work() -> SignalStack | None:
        with compiling.signal_stack_kept():
            pass
        found = signal_stack()
        compiling._sigaltstack(SignalStack(None, DISABLED, 0), None)  # before its memory goes
        return found

    with ThreadPoolExecutor(1) as pool:  # a thread of its own, without a stack at first
        found = pool.submit(work).result()
    assert found is not None
    assert found.flags == after
    assert after or (found.start, found.size) == (before.start, size)
