"""How many processors this process may use."""

import contextlib
import os
import sys
from pathlib import Path


def processors() -> int:
    """Those of its affinity, within its cgroup's quota; at least 1."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, quota // period))
    return count
