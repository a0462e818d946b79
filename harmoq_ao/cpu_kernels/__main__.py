"""``python -m harmoq_ao.cpu_kernels`` builds the CPU kernels for this machine, unless they are, and says what is used.

The exit status is 1 where they cannot be used.
"""

from __future__ import annotations

import sys

from harmoq_ao.cpu_kernels.library import status

if __name__ == "__main__":
    result = status()
    sys.stdout.write(f"{result.sentence}\n")
    sys.exit(not result.available)
