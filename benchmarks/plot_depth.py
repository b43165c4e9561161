"""A picture of decode speed against the tokens before it, from committed rows of bench_models.

``python -m benchmarks.plot_depth [--out docs/depth.png]``: one panel per machine, model and number of threads that was
measured at two or more depths with batch 1, one line per engine and its settings. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import rows
from .bench_models import Choice

Lines = dict[str, dict[int, float]]


def panels(found: Iterable[dict[str, Any]]) -> dict[str, Lines]:
    """Title -> engine -> {tokens before: decode tokens/s}. A later row supersedes an earlier one."""
    made: dict[str, Lines] = {}
    for row in found:
        if row.get("bench") != "models" or row.get("batch", 1) != 1 or row.get("isa"):
            continue
        title = f"{row['model']}, {row['threads']} threads\n{row['machine']}"
        label = Choice(row["engine"], row["group"], row["form"], row["compute"]).label
        made.setdefault(title, {}).setdefault(label, {})[row.get("depth", 0) + row["pp"]] = row["tg_tps"]
    kept = {title: {name: line for name, line in lines.items() if len(line) > 1} for title, lines in made.items()}
    return {title: lines for title, lines in sorted(kept.items()) if lines}


def draw(found: dict[str, Lines], out: Path) -> None:
    """Write the panels side by side to ``out``; ValueError where there are none."""
    if not found:
        raise ValueError("no rows of one model and engine at two depths: run bench_models with --depth first")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 4.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, line in sorted(lines.items()):
            axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=name)
        axes.set(title=title, xlabel="tokens before", ylabel="decode tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/depth.png"))
    args = parser.parse_args(argv)
    draw(panels(rows.read_other("models")), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
