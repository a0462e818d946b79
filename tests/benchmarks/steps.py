"""What the processes of `test_processes` do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.plan import Step


def act(step: Step) -> dict[str, Any]:
    """As the step's subject says."""
    kind, _, value = step.subject.partition(" ")
    if kind == "return":
        return {"value": int(value), "process": os.getpid()}
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(int(value))
    if kind == "raise":
        raise RuntimeError(value)
    if kind == "print":
        print(value)  # noqa: T201 - for the log
        return {"ok": False}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        print(child.pid, flush=True)  # noqa: T201
        time.sleep(600)
    return {}
