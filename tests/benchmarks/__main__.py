"""All benchmarks, one after the other, each in a process of its own; then a picture, and a table for a README.

    python -m tests.benchmarks [--quick] [--picture bench.png] [--markdown FILE] [NAME ...]

No benchmark asserts a time. A quarter of an hour on two cores; with --quick, some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import pictures, step_time
from tests.benchmarks.reports import Report, heading, load

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("step_time", "all_reduce", "overheads", "starting", "growth", "memory", "looking")


def main() -> int:
    options = _options()
    began = time.monotonic()
    reports, failed = collect(options.names or NAMES, [*(["--quick"] if options.quick else []), *options.rest])
    if options.markdown:
        options.markdown.write_text(markdown(reports), encoding="utf-8")
        print(f"tables: {options.markdown}")
    if reports:
        pictures.draw(reports, options.picture)
        print(f"picture: {options.picture}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller sizes")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--picture", type=Path, default=ROOT / "bench.png")
    parser.add_argument("--markdown", type=Path, help="a file for the tables")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options.rest = [f"--repeats={options.repeats}"] if options.repeats else []
    return options


def collect(names: tuple[str, ...], arguments: list[str]) -> tuple[list[Report], list[str]]:
    """What each benchmark found, and which failed; an interrupt ends the present one, and keeps what is there."""
    reports: list[Report] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            place = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", f"tests.benchmarks.{name}", f"--json={place}", *arguments]
            try:
                if subprocess.run(command, cwd=ROOT, check=False).returncode:
                    failed.append(name)
            except KeyboardInterrupt:
                failed.append(f"{name} (interrupted)")
                break
            finally:
                reports += load(place)
    return reports, failed


def markdown(reports: list[Report]) -> str:
    """All tables, headed by the machine; step times once more in brief, before all others."""
    brief = [step_time.summary(report) for report in reports if report.name == "step_time"]
    parts = [report.markdown() for report in [*brief, *reports]]
    return "\n".join([f"On {heading()}; median (quartiles).", "", *parts])


if __name__ == "__main__":
    sys.exit(main())
