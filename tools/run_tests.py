"""Run all tests, in two lanes side by side: each waits much of its time, for processes to start and pages to load.

With --quick, only the tests that need no cluster, no processes beside them, no browser and no notebook, on both cores.
With other arguments, pytest gets them, and does nothing else.
"""

import subprocess
import sys
import threading
import time
from tempfile import TemporaryFile
from typing import IO

# Parts by their markers and files, one after the other. Every test belongs to one part, and both lanes take about as
# long: which is why the second one takes some files of clusters too.
_CLUSTERS = "(dask or notebook) and not browser"
_SHIFTED = "test_memory.py or test_scaling.py or test_processes_of_runs.py"
LANES = {
    "clusters": [["-m", _CLUSTERS, "-k", f"not ({_SHIFTED})"]],
    "others": [["-m", "not (dask or notebook or browser)"], ["-m", "browser"], ["-m", _CLUSTERS, "-k", _SHIFTED]],
}
PYTEST = [sys.executable, "-m", "pytest"]
# Three processes for two cores, as some tests wait; each gets more tests as it runs out of them.
QUICK = [*PYTEST, "-n", "3", "--dist", "worksteal", "-q", "-m", "not (dask or processes or notebook or browser)"]


class Lane:
    """Some parts, run one after the other.

    Parameters
    ----------
    name : str
    output : file or None
        Where all is written that is told; None for this process's own output.
    """

    def __init__(self, name: str, output: IO[str] | None) -> None:
        self.name, self.output = name, output
        self.worst = 0  # of the exit codes
        self._ended = False
        self._part: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for part in LANES[self.name]:
            # A cache of its own, because both lanes would write to one.
            command = [*PYTEST, *part, "-o", f"cache_dir=.pytest_cache/{self.name}"]
            if self._ended:
                return
            with subprocess.Popen(command, stdout=self.output, stderr=self.output and subprocess.STDOUT) as self._part:
                self.worst = max(self.worst, abs(self._part.wait()))

    def wait(self) -> None:
        # With a limit, because an interrupt does not wake a thread that waits without one on all systems.
        while self._thread.is_alive():
            self._thread.join(1.0)

    def end(self) -> None:
        self._ended = True
        if self._part is not None:
            self._part.terminate()


def main() -> int:
    if sys.argv[1:2] == ["--quick"]:
        return subprocess.call([*QUICK, *sys.argv[2:]])
    if sys.argv[1:]:
        return subprocess.call([*PYTEST, *sys.argv[1:]])
    began = time.monotonic()
    with TemporaryFile("w+", encoding="utf-8") as output:
        lanes = [Lane("clusters", None), Lane("others", output)]
        try:
            for lane in lanes:
                lane.wait()
        except BaseException:
            for lane in lanes:
                lane.end()
            raise
        output.seek(0)
        sys.stdout.write(output.read())
    print(f"All tests: {(time.monotonic() - began) / 60:.1f} minutes")
    return max(lane.worst for lane in lanes)


if __name__ == "__main__":
    sys.exit(main())
