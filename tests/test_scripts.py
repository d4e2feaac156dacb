"""What a person runs from scripts/, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from processes import ENVIRONMENT, LIMIT

ROOT = Path(__file__).parent.parent


def script(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / name, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, env=ENVIRONMENT)


def test_spin_lays_topologies_side_by_side(tmp_path: Path) -> None:
    done = script("spin.py", "ring", "base-k", "--nodes", "4", "--set", "train.rounds=3", "--out", tmp_path / "spun")
    assert done.returncode == 0, done.stderr
    assert "ring" in done.stdout and "base-k" in done.stdout and "predicted" in done.stdout
    assert "<svg" in (tmp_path / "spun" / "convergence.html").read_text()
    assert (tmp_path / "spun" / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_spin_passes_on_what_is_wrong(tmp_path: Path) -> None:
    done = script("spin.py", "rign", "--out", tmp_path / "spun")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'ring'?" in done.stderr


def test_chaos_ends_with_a_verdict(tmp_path: Path) -> None:
    settings = ("--set", "train.rounds=60", "--set", "network.suspicion=1")
    done = script("chaos.py", "ring-8", "--minutes", "0.1", "--seed", "3", "--out", tmp_path / "chaos", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise was kept" in done.stdout
