"""What a run says: lines on standard output, progress on standard error."""

import os
import shutil
import sys
import time

from tqdm import tqdm


def say(text):
    """Print a line. The job goes on where nobody can read it: a closed pipe, a full disk."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        mute()
    except OSError as e:
        mute()
        print(f"standard output: {e.strerror}; the job goes on without it", file=sys.stderr)


def mute():
    """Send standard output nowhere, so that the flush at the end of Python cannot fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """How far a job of `total` bytes is: a tqdm bar on a terminal, else a line every 10 s.

    `total` is None where nobody knows it. The rate counts what was done after `start`.
    """

    def __init__(self, job, total, start=0, every=10.0):
        self.job, self.total, self.start, self.every = job, total, start, every
        self.began = self.told = time.monotonic()
        self.bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            columns, rows = shutil.get_terminal_size()  # 0 x 0, as in a container, becomes 80 x 24
            self.bar = tqdm(total=total, initial=start, desc=job, unit="B", unit_scale=True,
                            ncols=columns, nrows=rows)

    def at(self, position):
        """Say that `position` bytes are done."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(position - self.bar.n)
        elif now - self.told >= self.every:
            self.told, rate = now, (position - self.start) / (now - self.began)
            of, left = "", ""
            if self.total is not None:
                of = f" of {self.total / 1e6:,.0f}"
                left = f", {(self.total - position) / max(rate, 1):,.0f} s left"
            print(f"{self.job}: {position / 1e6:,.0f}{of} MB, {rate / 1e6:.2f} MB/s{left}",
                  file=sys.stderr, flush=True)

    def close(self):
        """Take the bar off."""
        if self.bar is not None:
            self.bar.close()
