"""Tables of the committed rows, written into the project's pages between ``<!-- table:NAME -->`` and ``<!-- end -->``.

`python -m benchmarks.report` rewrites README.md, CONTRIBUTING.md and docs; `--check` changes nothing and fails if a
page is stale; `--print NAME` shows one table. Tables are never typed: rows we lose are shown, and marks say which to
distrust.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from . import rows
from .matrix import TOPICS
from .rows import Row
from .tables import experts, machines, markdown, models, number, plain_table, short_caption, with_legend

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
SMALL_M = 8  # up to here a cell is held against the memory bandwidth, above against the int8 peak

ENGINES = {
    "cpullm": "torch_cpullm",
    "torch_bf16": "`F.linear` bf16",
    "torch_fp32": "`F.linear` fp32",
    "torch_int4pack": "`_weight_int4pack_mm_for_cpu`",
    "onednn_int8": "oneDNN int8 (`qlinear_pointwise`, activations quantised beforehand)",
}
FORMS = {"sym": "symmetric", "zero": "zero points", "min": "minima"}


# ---- cells of a table -----------------------------------------------------------------------------------------------


def marks(row: Row) -> str:
    """What to distrust a row for."""
    return "\\*" * rows.busy(row) + "~" * row["unstable"]


def cell(row: Row | None) -> str:
    """``332 (96 %)``: µs, and the share of what limits this M; or an empty cell."""
    if row is None:
        return ""
    share = row["pct_bw"] if row["m"] <= SMALL_M else row["pct_peak"]
    return number(row["us"]) + (f" ({share:.0f} %)" if share is not None else "") + marks(row)


def caption(found: Sequence[Row]) -> str:
    """The machine, and what its limits were over ``found``: one machine's rows."""
    by_threads: dict[int, list[Row]] = {}
    for row in found:
        by_threads.setdefault(row["threads"], []).append(row)
    limits = []
    for threads, part in sorted(by_threads.items()):
        reads = [max(row["bw_before"], row["bw_after"]) for row in part]
        text = f"{threads} thread{'s' * (threads != 1)}: memory {_span(reads)} GB/s"
        for isa in rows.LADDER:
            peaks = [row["peak_gops"] for row in part if row["isa"] == isa and row["peak_gops"]]
            text += f", {isa} int8 peak {_span(peaks)} GOP/s" if peaks else ""
        limits.append(text)
    versions = ", ".join(sorted({f"torch {row['torch']}" for row in found}))
    machine, _, rest = short_caption(found).partition("; ")
    return f"{machine}; {'; '.join(limits)}; {versions}; {rest}"


def _span(values: Sequence[float]) -> str:
    return "-".join(dict.fromkeys((f"{min(values):.0f}", f"{max(values):.0f}")))


def shape(row: Row) -> str:
    """``4096x11008``: k inputs x n outputs."""
    return f"{row['k']}x{row['n']}"


def group_of(row: Row) -> str:
    """``128``, or ``column``: one scale per column."""
    return "column" if row["group"] == -1 else str(row["group"])


def by_size(row: Row) -> tuple[int, int]:
    """Sort key: larger weights first, then fewer inputs first."""
    return (-row["n"] * row["k"], row["k"])


def best_level(found: Iterable[Row]) -> str:
    """The highest kernel level among rows of ours."""
    return max((row["isa"] for row in found if row["isa"] in rows.LADDER), key=rows.LADDER.index, default="")


def ours(found: Iterable[Row]) -> list[Row]:
    """Rows of our linear operator."""
    return [row for row in found if row["op"] == "linear" and row["engine"] == "cpullm"]


def plain(found: Iterable[Row]) -> list[Row]:
    """Symmetric 4-bit weights with int8 activations, among rows of ours."""
    return [r for r in ours(found) if (r["form"], r["bits"], r["compute"]) == ("sym", 4, "int8")]


def most_threads(found: Sequence[Row]) -> list[Row]:
    """Rows with the largest thread count that occurs."""
    most = max((row["threads"] for row in found), default=0)
    return [row for row in found if row["threads"] == most]


def grid(
    found: Sequence[Row],
    header: Sequence[str],
    key: Callable[[Row], tuple[str, ...]],
    order: Callable[[Row], Hashable],
    ms: Sequence[int] | None = None,
) -> str:
    """One line per ``key`` in ``order``, one column per M of ``ms`` that was measured; empty where there is none."""
    shown = [row for row in found if ms is None or row["m"] in ms]
    if not shown:
        return ""
    columns = sorted({row["m"] for row in shown})
    lines: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in sorted(shown, key=order):  # type: ignore[arg-type]
        lines.setdefault(key(row), {})[row["m"]] = row
    head = [*header, *(f"M={m}" for m in columns)]
    return markdown(head, ([*name, *(cell(line.get(m)) for m in columns)] for name, line in lines.items()), len(header))


# ---- tables ---------------------------------------------------------------------------------------------------------

LEGEND = (
    f"µs per call; in brackets the share of the memory bandwidth (M <= {SMALL_M}) or of the level's int8 peak (above), "
    "both measured in the same run with the same threads."
)
FEW_M = (1, 4, 8, 16, 32, 128, 512)
END_M = (1, 8, 512)


def kernels(found: Sequence[Row]) -> str:
    """Shape x M x group on the best level of each machine with all its threads."""
    parts = []
    for group in machines(plain(found)):
        top = best_level(group)
        chosen = most_threads([row for row in group if row["isa"] == top])
        table = grid(
            chosen,
            ("k x n", "group"),
            lambda row: (shape(row), group_of(row)),
            lambda row: (by_size(row), row["group"]),
            FEW_M,
        )
        parts += [caption(chosen), table] if table else []
    return with_legend(parts, f"Symmetric 4-bit weights, int8 compute; {LEGEND}")


def forms(found: Sequence[Row]) -> str:
    """Bits, zero forms, groups and compute types on the best level, for the shapes measured with more than one."""
    parts = []
    for group in machines(ours(found)):
        top = best_level(group)
        rest = most_threads([row for row in group if row["isa"] == top])
        kinds: dict[str, set] = {}
        for row in rest:
            kinds.setdefault(shape(row), set()).add((row["bits"], row["form"], row["compute"]))
        chosen = [row for row in rest if len(kinds[shape(row)]) > 1]
        table = grid(
            chosen,
            ("k x n", "bits", "zero form", "compute", "group"),
            lambda row: (shape(row), str(row["bits"]), FORMS[row["form"]], row["compute"], group_of(row)),
            lambda row: (by_size(row), row["bits"], list(FORMS).index(row["form"]), row["compute"], row["group"]),
            END_M,
        )
        parts += [caption(chosen), table] if table else []
    return with_legend(parts, LEGEND)


def levels(found: Sequence[Row]) -> str:
    """Every kernel level against its own peak, for the shapes measured on more than one."""
    parts = []
    for group in machines(plain(found)):
        seen: dict[tuple[str, int], set[str]] = {}
        for row in group:
            seen.setdefault((shape(row), row["threads"]), set()).add(row["isa"])
        chosen = most_threads([row for row in group if len(seen[shape(row), row["threads"]]) > 1])
        table = grid(
            chosen,
            ("k x n", "group", "level"),
            lambda row: (shape(row), group_of(row), row["isa"]),
            lambda row: (by_size(row), row["group"], rows.LADDER.index(row["isa"])),
            END_M,
        )
        parts += [caption(chosen), table] if table else []
    return with_legend(parts, f"Symmetric 4-bit weights, int8 compute; {LEGEND}")


def threads(found: Sequence[Row]) -> str:
    """Thread counts on the best level, for the shapes measured with more than one."""
    parts = []
    for group in machines(plain(found)):
        top = best_level(group)
        rest = [row for row in group if row["isa"] == top]
        counts: dict[str, set[int]] = {}
        for row in rest:
            counts.setdefault(shape(row), set()).add(row["threads"])
        chosen = [row for row in rest if len(counts[shape(row)]) > 1]
        table = grid(
            chosen,
            ("k x n", "group", "threads"),
            lambda row: (shape(row), group_of(row), str(row["threads"])),
            lambda row: (by_size(row), row["group"], row["threads"]),
            END_M,
        )
        parts += [caption(chosen), table] if table else []
    return with_legend(parts, f"Symmetric 4-bit weights, int8 compute; {LEGEND}")


def peers(all_rows: Sequence[Row]) -> str:
    """Ours and the peers of the newest interleaved comparison of each shape; the fastest at each M is bold."""
    parts = []
    for group in machines(all_rows):
        top = best_level(ours(group))
        foreign = most_threads([row for row in group if row["op"] == "linear" and row["engine"] != "cpullm"])
        newest: dict[str, str] = {}
        for row in foreign:
            newest[shape(row)] = max(newest.get(shape(row), ""), row["date"])
        same = [
            row
            for row in group
            if row["op"] == "linear"
            and row["date"] == newest.get(shape(row))
            and row["threads"] == foreign[0]["threads"]
        ]
        chosen = [row for row in same if row["engine"] != "cpullm"] + [
            row for row in plain(same) if row["isa"] == top and row["group"] in (32, 128)
        ]
        columns = sorted({row["m"] for row in chosen if row["m"] in FEW_M})
        lines: dict[tuple[str, str, int], dict[int, Row]] = {}
        for row in sorted(chosen, key=lambda r: (by_size(r), list(ENGINES).index(r["engine"]), r["group"])):
            lines.setdefault((shape(row), row["engine"], row["group"]), {})[row["m"]] = row
        body = []
        for (name, engine, size), line in lines.items():
            text = ENGINES[engine] + (f", group {size}" if size > 0 else "")
            filled = []
            for m in columns:
                rivals = [other[m]["us"] for key, other in lines.items() if key[0] == name and m in other]
                shown = number(line[m]["us"]) if m in line else ""
                fastest = m in line and line[m]["us"] == min(rivals)
                filled.append((f"**{shown}**" if fastest else shown) + (marks(line[m]) if m in line else ""))
            body.append([name, text, *filled])
        if body:
            parts += [caption(chosen), markdown(["k x n", "kernel", *(f"M={m}" for m in columns)], body, 2)]
    return with_legend(parts, "µs per call, measured interleaved with the same threads; the fastest is bold.")


def curve(found: Sequence[Row]) -> str:
    """Time over M = 1..64 for shapes measured at all of them: eight to a line."""
    parts = []
    for group in machines(plain(found)):
        top = best_level(group)
        runs: dict[tuple[str, int], dict[int, Row]] = {}
        for row in sorted(most_threads([r for r in group if r["isa"] == top]), key=by_size):
            runs.setdefault((shape(row), row["group"]), {})[row["m"]] = row
        for (name, size), run in runs.items():
            if not all(m in run for m in range(1, 65)):
                continue
            body = [
                [f"{m}-{m + 7}", *(number(run[i]["us"]) + marks(run[i]) for i in range(m, m + 8))]
                for m in range(1, 65, 8)
            ]
            table = markdown([f"M, {name} g{size}", *(f"+{i}" for i in range(8))], body)
            parts += [caption([run[m] for m in range(1, 65)]), table]
    return with_legend(parts, "µs per call for every number of rows from 1 to 64.")


def calls(found: Sequence[Row]) -> str:
    """The cost of one call, of a parallel region and a barrier in it, and quantising activations."""
    parts = []
    for group in machines(row for row in found if row["op"] in ("call", "region", "barrier", "quantize")):
        body = []
        for row in sorted(group, key=lambda r: (r["threads"], r["op"], r["engine"], r["m"])):
            names = {"call": f"one call, {shape(row)}", "region": "one parallel region", "barrier": "one barrier"}
            what = names.get(row["op"], f"quantising activations, k={row['k']}")
            us = number(row["us"]) + marks(row)
            body.append([what, ENGINES[row["engine"]], str(row["threads"]), str(row["m"]), us])
        parts += [caption(group), markdown(["what", "kernel", "threads", "M", "µs"], body, 2)]
    return with_legend(parts, "Weights and activations in cache.")


def support(found: Sequence[Row]) -> str:
    """Topic x version of transformers, newest rows: yes, tests passed of those run, or no where most were left out."""
    newest = {(row["topic"], row["transformers"]): row for row in sorted(found, key=lambda row: row["date"])}
    if not newest:
        return ""
    versions = sorted({version for _, version in newest}, key=lambda version: [*map(int, version.split(".")[:3])])

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        ran, left = row["passed"] + row["failed"], row["skipped"]
        text = f"yes, {ran} tests" if ran and not row["failed"] else f"{row['passed']} of {ran} tests"
        return "no" if left > ran else text + f", {left} left out" * (left > 0)

    body = [[topic, *(cell(newest.get((topic, version))) for version in versions)] for topic in TOPICS]
    return f"{short_caption(list(newest.values()))}\n\n" + markdown(["transformers", *versions], body)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "kernels": kernels,
    "forms": forms,
    "levels": levels,
    "threads": threads,
    "peers": peers,
    "curve": curve,
    "calls": calls,
}
"""Name -> the function that makes it from rows of bench_ops: peers from all, others from the newest of each case."""

RECIPES = ("quality", "calibration", "kld", "trained", "stories", "compute", "tasks")
USE = ("cqil_quality", "cqil_speed", "families", "serve", "load", "context", "busy", "overhead")
PLAIN = (*USE, "ranks", "sums", "shares", "sockets")
OTHER: dict[str, Callable[[Sequence[Row]], str]] = {
    "models": models,
    "experts": experts,
    "support": support,
    **dict.fromkeys(PLAIN, lambda found: plain_table(found, every_date=False)),
    **dict.fromkeys((*RECIPES, "load"), plain_table),  # losses and memory hold on another day, unlike a speed
}
"""Name -> the function that makes it from the rows in NAME*.jsonl."""


# ---- pages ----------------------------------------------------------------------------------------------------------

_MARKER = re.compile(
    r"(?P<open>^<!-- table:(?P<name>\S+) -->\n)(?P<body>.*?)(?P<end>^<!-- end -->)", re.MULTILINE | re.DOTALL
)


def table(name: str, results: Path = rows.RESULTS) -> str:
    """The markdown of one table, empty without rows. Raises ValueError for an unknown name or bad rows."""
    if name in OTHER:
        return OTHER[name](rows.read_other(name, results))
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}; there are: {', '.join([*TABLES, *OTHER])}")
    found = rows.read_all(results)
    return TABLES[name](found if name == "peers" else rows.newest(found))


def fill(text: str, results: Path = rows.RESULTS, where: str = "page") -> str:
    """``text`` with every marked table made anew. Raises ValueError as table(), and for a marker without its end."""

    def replace(found: re.Match[str]) -> str:
        made = table(found["name"], results)
        return found["open"] + (f"\n{made}\n\n" if made else "") + found["end"]

    opened = len(re.findall(r"^<!-- table:", text, re.MULTILINE))
    matches = list(_MARKER.finditer(text))
    if opened != len(matches) or any("<!-- table:" in match["body"] for match in matches):
        raise ValueError(f"{where}: every line <!-- table:NAME --> needs a line <!-- end --> after it")
    try:
        return _MARKER.sub(replace, text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def stale(root: Path, results: Path = rows.RESULTS) -> dict[Path, str]:
    """Pages below ``root`` whose tables are not what the rows say, and what they should hold."""
    found = {}
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        text = path.read_text(encoding="utf-8")
        wanted = fill(text, results, str(path.relative_to(root)))
        if wanted != text:
            found[path] = wanted
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 for a stale page with --check, 2 for bad rows or markers."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=(__doc__ or "").split("\n\n")[0])
    names = [*TABLES, *OTHER]
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is stale")
    parser.add_argument("--print", choices=names, metavar="NAME", help=f"show one table: {', '.join(names)}")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows (benchmarks/results)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs (the project)")
    args = parser.parse_args(argv)
    try:
        if args.print:
            print(table(args.print, args.results) or "no rows")
            return 0
        pages = stale(args.root, args.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, text in pages.items():
        if not args.check:
            path.write_text(text, encoding="utf-8")
        print(f"{'stale, run python -m benchmarks.report' if args.check else 'rewritten'}: {path}")
    return 1 if args.check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
