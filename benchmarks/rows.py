"""Measurements as JSON lines, one row per cell: the keys, their check, reading and appending. Needs no torch.

A file only grows: a later row of the same machine and case supersedes an earlier one. Rows that were measured
interleaved, and may be compared with each other, share their ``date``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).with_name("results")
"""Where committed rows live, one .jsonl file per machine."""

LADDER = ("ref", "avx2", "avx_vnni", "avx512", "amx")
"""Kernel levels, lowest first."""

FOREIGN_LIMIT = 0.25
"""Cores used by other processes above which a row is marked."""

UNSTABLE_LIMIT = 0.10
"""A row is marked above it: difference of the bandwidths read before and after, or width of a ratio's interval."""

FEWEST_PAIRS = 3
"""Rounds and turns of bench_models below which their ratios have no quartiles to speak of."""

_TEXT, _COUNT, _NUMBER, _MAYBE, _FLAG = (str,), (int,), (int, float), (int, float, type(None)), (bool,)

KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "case": (_TEXT, "what was measured: the keys from op to threads in one string, see case_name()"),
    "op": (
        _TEXT,
        "linear; call (a tiny linear in cache); region (an empty parallel region); barrier (in one); quantize",
    ),
    "engine": (_TEXT, "cpullm; or a peer: torch_bf16, torch_fp32, torch_int4pack, onednn_int8"),
    "m": (_COUNT, "rows of activations"),
    "n": (_COUNT, "output columns (0 for quantize)"),
    "k": (_COUNT, "inputs"),
    "group": (_COUNT, "inputs per weight group; -1 one group per column; 0 no groups"),
    "form": (_TEXT, "zero points: sym, zero (uint8), min (float minimum); none for weights without scales"),
    "bits": (_COUNT, "bits per weight, without scales"),
    "compute": (_TEXT, "type of the products: int8, bf16, fp32"),
    "isa": (_TEXT, "kernel level; native for peers, which choose their own"),
    "threads": (_COUNT, "threads"),
    "x_dtype": (_TEXT, "element type of the activations as passed in"),
    "us": (_NUMBER, "median time of one call, µs"),
    "us_min": (_NUMBER, "shortest time of one call, µs"),
    "reps": (_COUNT, "calls timed"),
    "bytes": (_COUNT, "stored bytes of the weight: codes, scales, zeros; activations are not counted"),
    "gbps": (_MAYBE, "bytes / us, GB/s (1e9)"),
    "pct_bw": (_MAYBE, "gbps in percent of the larger of bw_before and bw_after"),
    "gops": (_MAYBE, "2 m n k / us, GOP/s (1e9)"),
    "pct_peak": (_MAYBE, "gops in percent of peak_gops; null where no peak is measured (compute other than int8)"),
    "foreign_cpu": (_MAYBE, "CPU time of other processes while the cell ran, in cores; null where unknown"),
    "machine": (_TEXT, "CPU model and cores"),
    "date": (_TEXT, "UTC start of the comparison, shared by all of its rows"),
    "commit": (_TEXT, "commit of this project, with + where the working tree differed"),
    "torch": (_TEXT, "version of torch"),
    "bw_before": (_NUMBER, "memory read bandwidth with the same threads before the comparison, GB/s"),
    "bw_after": (_NUMBER, "the same after it, GB/s"),
    "peak_gops": (_MAYBE, "int8 dot products of this level on registers with the same threads, GOP/s"),
    "unstable": (_FLAG, "bw_before and bw_after differ by more than 10 %"),
}
"""Key -> (types, meaning). Every row has exactly these."""


def case_name(row: Row) -> str:
    """The identity of a cell, the keys op to threads: ``linear/cpullm/4096x11008/m1/g128/sym/b4/int8/avx512/t2``."""
    return (
        f"{row['op']}/{row['engine']}/{row['k']}x{row['n']}/m{row['m']}/g{row['group']}/{row['form']}/b{row['bits']}/"
        f"{row['compute']}/{row['isa']}/t{row['threads']}"
    )


def unstable(before_gbps: float, after_gbps: float) -> bool:
    """Whether two readings of the bandwidth differ by more than 10 % of the larger."""
    return abs(before_gbps - after_gbps) > UNSTABLE_LIMIT * max(before_gbps, after_gbps)


def uncertain(row: Row, ratio: str) -> bool:
    """Whether the median of a ratio of bench_models, tg_ratio or pp_ratio, is not known to within 5 % up or down.

    The 95 % interval of a median is +- 1.57 (q3 - q1) / sqrt(pairs). False for a row from before there were ratios.
    Source: McGill, Tukey and Larsen, Variations of box plots, 1978 (the notches).
    """
    if ratio not in row:
        return False
    low, middle, high = (row[f"{ratio}{part}"] for part in ("_q1", "", "_q3"))
    pairs = row["turns" if ratio == "tg_ratio" else "rounds"]
    return pairs < FEWEST_PAIRS or middle is None or 2 * 1.57 * (high - low) / pairs**0.5 > UNSTABLE_LIMIT * middle


def make(*, rotated: bool = True, **known: Any) -> Row:
    """A checked row from the measured keys; case, gbps, pct_bw, gops, pct_peak and unstable are computed.

    rotated: the weights came from memory, so that a share of its bandwidth means something.
    """
    row = dict(known)
    seconds = row["us"] * 1e-6
    bandwidth = max(row["bw_before"], row["bw_after"])
    gbps = row["bytes"] / seconds / 1e9 if row["bytes"] else None
    gops = 2 * row["m"] * row["n"] * row["k"] / seconds / 1e9 if row["n"] else None
    peak = row["peak_gops"] if row["compute"] == "int8" and gops is not None else None
    row.update(
        case=case_name(row),
        gbps=_rounded(gbps),
        pct_bw=_rounded(100 * gbps / bandwidth) if gbps is not None and rotated else None,
        gops=_rounded(gops),
        pct_peak=_rounded(100 * gops / peak) if gops is not None and peak else None,
        peak_gops=_rounded(peak),
        unstable=unstable(row["bw_before"], row["bw_after"]),
    )
    for key in ("us", "us_min", "foreign_cpu", "bw_before", "bw_after"):
        row[key] = _rounded(row[key])
    check(row)
    return {key: row[key] for key in KEYS}


def write(row: dict[str, Any], path: str | Path | None) -> None:
    """Print a row of another benchmark, with machine, commit and date, and append it to ``path`` if there is one."""
    from . import machine  # which imports torch; tables are made without it

    row |= {"machine": machine.machine_name(), "commit": machine.git_commit()}
    row |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    line = json.dumps(row, ensure_ascii=False)
    print(line, flush=True)
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _rounded(value: float | None) -> float | None:
    """Four significant digits, and never fewer than the units."""
    if value is None or value == 0:
        return value
    return float(f"{value:.4g}") if abs(value) < 1000 else float(round(value))


def check(row: Row, where: str = "row") -> None:
    """Raise ValueError unless ``row`` has exactly KEYS with values of the right types, and the case that follows."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for word, keys in (("missing", KEYS.keys() - row.keys()), ("unknown", row.keys() - KEYS.keys())):
        if keys:
            raise ValueError(f"{where}: {word} keys: {', '.join(sorted(keys))}")
    for key, (types, _) in KEYS.items():
        value = row[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{where}: {key} must be {names}, got {value!r}")
    if row["case"] != case_name(row):
        raise ValueError(f"{where}: case is {row['case']!r}, its keys say {case_name(row)!r}")
    if row["us"] <= 0 or row["bw_before"] <= 0 or row["bw_after"] <= 0:
        raise ValueError(f"{where}: us, bw_before and bw_after must be positive")


def append(path: str | Path, new: Iterable[Row]) -> None:
    """Check every row and append them to ``path`` as JSON lines; the file and its folder are made if missing."""
    new = list(new)
    for row in new:
        check(row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in new:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(path: str | Path) -> list[Row]:
    """The rows of a file in order, checked. Raises ValueError naming file and line of the first bad one."""
    found = []
    for where, row in _lines(path):
        check(row, where)
        found.append(row)
    return found


def _lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line that is not empty."""
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None


def read_all(folder: str | Path = RESULTS) -> list[Row]:
    """The rows of every ops*.jsonl file in ``folder``, file names ascending; none if the folder is missing."""
    return [row for path in sorted(Path(folder).glob("ops*.jsonl")) for row in read(path)]


def read_other(kind: str, folder: str | Path = RESULTS) -> list[Row]:
    """Rows of another benchmark, every ``kind*.jsonl`` in ``folder``; only machine, commit and date are checked."""
    found = []
    for path in sorted(Path(folder).glob(f"{kind}*.jsonl")):
        for where, row in _lines(path):
            if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("machine", "commit", "date")):
                raise ValueError(f"{where}: expected a JSON object with machine, commit and date")
            found.append(row)
    return found


def newest(all_rows: Iterable[Row]) -> list[Row]:
    """One row per machine and case: the one with the latest date (the last of equals)."""
    found: dict[tuple[str, str], Row] = {}
    for row in all_rows:
        key = (row["machine"], row["case"])
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def busy(row: Row) -> bool:
    """Whether other processes used more than FOREIGN_LIMIT cores while the cell ran."""
    return row["foreign_cpu"] is not None and row["foreign_cpu"] > FOREIGN_LIMIT
