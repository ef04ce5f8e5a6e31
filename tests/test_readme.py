"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.dask
def test_the_first_example_runs_and_says_what_it_claims(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    call = re.search(r"^(pk\.evaluate\(.*?\)) +# (<.*>)$", example, re.MULTILINE)
    assert call is not None
    shown = example.replace(call[0], f"print({call[1]})")
    script = tmp_path / "example.py"
    script.write_text('if __name__ == "__main__":\n' + textwrap.indent(shown, "    "))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    said, shown_there = ([float(n) for n in re.findall(r"[\d.]+", text)] for text in (done.stdout, call[2]))
    assert said == pytest.approx(shown_there, rel=0.02)  # loss, accuracy, samples; other processors round differently
