"""Runs code in a fresh process in which the package is installed as pyproject.toml says, entry points included."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install_into(folder: Path) -> Path:
    """The package's metadata in ``folder``, for PYTHONPATH: a checkout may be older than its installation or newer."""
    text = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."?([\w.]+)"?\]\n((?:[^\[\n].*\n)+)', text, re.M)
    info = folder / "torch_cpullm-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_cpullm\nVersion: 0\n")
    lines = [f"[{name}]\n{body.replace(chr(34), '')}" for name, body in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def environment(installed: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that has the package and its entry points."""
    path = os.pathsep.join([str(installed), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def run(code: str, installed: Path, *arguments: object, check: bool = True, **variables: str):
    """A finished process that ran ``code`` with these arguments in sys.argv; outside of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=installed,
        env=environment(installed, **variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
