"""Run all tests: those of clusters, notebooks and the browser one after the other, and beside them all others.

The first kind waits much of its time, for processes to start and pages to load; the second computes. With arguments,
pytest gets them, and does nothing else.
"""

import subprocess
import sys
import tempfile
import time

WAITING = "dask or notebook or browser"


def main() -> int:
    command = [sys.executable, "-m", "pytest"]
    if sys.argv[1:]:
        return subprocess.call([*command, *sys.argv[1:]])
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # Its own cache, because both would write to one.
        beside = [*command, "-m", f"not ({WAITING})", "-o", "cache_dir=.pytest_cache/computing"]
        with subprocess.Popen(beside, stdout=output, stderr=subprocess.STDOUT) as computing:
            try:
                waiting = subprocess.call([*command, "-m", WAITING])
                computed = computing.wait()
            except BaseException:
                computing.terminate()
                raise
        output.seek(0)
        sys.stdout.write(output.read())
    print(f"All tests: {(time.monotonic() - began) / 60:.1f} minutes")
    return waiting or computed


if __name__ == "__main__":
    sys.exit(main())
