"""Which versions of transformers the package works with: its tests, run with each.

`python -m benchmarks.matrix PYTHON...` runs the tests below with each interpreter (make test-matrix makes them) and
appends their counts to results/support.jsonl; report.py makes the table. Warnings are no errors there: those of other
versions are not ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from . import rows
from .rows import Row

ROOT = Path(__file__).resolve().parents[1]

TOPICS = {
    "optimize() on every family": ["test_families"],
    "from_pretrained(quantization_config=)": ["test_hf_quantizer", "test_overrides"],
    "save, reload, pipeline, serve": ["test_save_reload"],
    "generate(): every mode": ["test_generation"],
    "KV cache": ["test_kv_cache", "test_kv_cache_layers"],
    "layers as one operator": ["test_layer_match", "test_layer_stack"],
    "load_gguf()": ["test_gguf"],
    "torch.compile backend": ["test_backend", "test_backend_layers"],
    "text and pictures": ["test_multimodal"],
    "PEFT adapters": ["test_peft"],
}
"""What the table says -> files of tests that look at it."""

_VERSIONS = (
    "import json, sys, torch, transformers as t; print(json.dumps([t.__version__, torch.__version__, sys.version]))"
)


def run(python: str, known: Row) -> list[Row]:
    """Rows of one interpreter, a topic each: ``known``, versions, tests that passed, failed and were skipped.

    RuntimeError: pytest did not run.
    """
    files = [f"tests/{name}.py" for names in TOPICS.values() for name in names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [python, "-c", _VERSIONS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    transformers, torch, version = json.loads(told.stdout)
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--tb=short"]
        command += ["--continue-on-collection-errors"]
        print(f"transformers {transformers}: {len(files)} files of tests, some minutes", flush=True)
        subprocess.run([*command, f"--junitxml={report.name}", *files], cwd=ROOT, env=environment, check=False)
        text = Path(report.name).read_text(encoding="utf-8")
    counts = count(text) if text else {}
    if not counts:
        raise RuntimeError(f"{python}: no test ran")
    known = {**known, "transformers": transformers, "torch": torch, "python": version.split()[0]}
    return [
        {**known, "topic": topic, **{kind: sum(counts.get(n, {}).get(kind, 0) for n in names) for kind in KINDS}}
        for topic, names in TOPICS.items()
    ]


KINDS = ("passed", "failed", "skipped")


def count(junit: str) -> dict[str, dict[str, int]]:
    """File of tests -> how many of each kind, from a report that pytest wrote."""
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        found = {child.tag for child in case}
        kind = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        # A file that cannot be collected is a case without a class, whose name is the file's.
        name = (case.get("classname") or case.get("name", "")).split(".")[1]
        counts.setdefault(name, dict.fromkeys(KINDS, 0))[kind] += 1
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if a test failed somewhere."""
    from . import report  # it imports this module
    from .machine import git_commit, machine_name, now

    parser = argparse.ArgumentParser("python -m benchmarks.matrix", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters that have transformers and pytest")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "support.jsonl", help="file that takes the rows")
    args = parser.parse_args(argv)
    known = {"machine": machine_name(), "commit": git_commit(), "date": now()}
    failed = 0
    for python in args.pythons:
        made = run(python, known)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        passed, wrong = (sum(row[kind] for row in made) for kind in ("passed", "failed"))
        print(f"transformers {made[0]['transformers']}: {passed} tests passed, {wrong} failed", flush=True)
        failed += wrong
    print(report.support(rows.read_other(args.out.stem, args.out.parent)))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
