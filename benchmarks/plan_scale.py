"""Can the planner handle 10,000 workers? Simulates an hour of HALoS on 100 regions of 100 workers.

Runs the command that a user would run, in a process of its own, and prints its wall-clock seconds and its peak memory,
imports included. Exits with 1 if one is beyond its limit. Run: python benchmarks/plan_scale.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

COMMAND = ["plan", "--random-cluster", "100x100", "--hours", "1", "--algorithm", "halos"]
SECONDS_LIMIT = 60.0
GIGABYTES_LIMIT = 2.0


def main() -> int:
    """Measures, prints, and returns the exit status."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lightning_halos.cli", *COMMAND], check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    # ru_maxrss is in bytes on macOS, in kibibytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    print(done.stdout.decode())
    print(f"time    {seconds:6.2f} s   (limit {SECONDS_LIMIT:g})")
    print(f"memory  {gigabytes:6.2f} GB  (limit {GIGABYTES_LIMIT:g})")
    return int(seconds > SECONDS_LIMIT or gigabytes > GIGABYTES_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
