"""What the README shows, does what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from processes import run

README = Path(__file__).parent.parent / "README.md"


def files() -> dict[str, str]:
    """The Python files that the README shows: the first line of each names it."""
    blocks = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return dict(blocks)


def test_the_rule_of_ones_own_passes_its_test_and_bears_a_liar(tmp_path: Path) -> None:
    assert set(files()) == {"own_rule.py", "test_own_rule.py"}
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_own_rule.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    (command,) = re.findall(r"^    \$ p2pfl (simulate complete .*own_rule.*)$", README.read_text("utf-8"), re.MULTILINE)
    few = ["--set", "train.rounds=8", "--json"]
    borne = run(*shlex.split(command), "--run-dir", "with", *few, cwd=tmp_path)
    given_in = run(*shlex.split(command), "--run-dir", "without", *few, "--set", "mix.rule=mean", cwd=tmp_path)
    assert accuracy(borne.stdout) > accuracy(given_in.stdout) + 0.5


def accuracy(summary: str) -> float:
    return float(json.loads(summary)["metrics"]["accuracy"]["mean"])
