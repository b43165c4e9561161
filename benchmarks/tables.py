"""What tables of committed rows are made of, and the tables of whole models: benchmarks.report's lower half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import rows
from .rows import Row

_FACTS = ("machine", "commit", "date", "bench")  # of a row, beside what was measured
MARKS = "\\* other processes used more than 0.25 cores. ~ memory bandwidth changed by more than 10 % during the run."


# ---- parts ----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three or more significant digits: 4.13, 56.2, 332, 26247."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table with aligned columns; the first ``left`` columns to the left, the others to the right."""
    body = [list(line) for line in lines]
    widths = [max(3, *(len(line[i]) for line in [header, *body])) for i in range(len(header))]

    def write(line: Sequence[str]) -> str:
        first = [text.ljust(w) for text, w in zip(line[:left], widths[:left], strict=True)]
        rest = [text.rjust(w) for text, w in zip(line[left:], widths[left:], strict=True)]
        return "| " + " | ".join(first + rest) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < left else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([write(header), rule, *map(write, body)])


def short_caption(found: Sequence[Row]) -> str:
    """The machine, the dates and the commits of one machine's rows."""
    commits = ", ".join(sorted({row["commit"] for row in found}))
    dates = sorted(row["date"][:10] for row in found)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"**{found[0]['machine']}**; {when}, commit {commits}."


def machines(found: Iterable[Row]) -> list[list[Row]]:
    """Rows by machine, machine names ascending."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(row["machine"], []).append(row)
    return [groups[name] for name in sorted(groups)]


def with_legend(parts: Sequence[str], legend: str, marks: str = MARKS) -> str:
    """Captions and tables in turn below what they mean, and what marks mean if there are some."""
    if not parts:
        return ""
    marks = f" {marks}" * any("\\*" in part or "~" in part for part in parts[1::2])
    return "\n\n".join([legend + marks, *parts])


# ---- tables ---------------------------------------------------------------------------------------------------------


MODEL_LEGEND = "Tokens per second of prompt (pp) and of generation (tg), engines interleaved."
RATIO_LEGEND = (
    " Where there are ratios, engines took turns of a fraction of a second. A ratio is the median, with its quartiles, "
    'of an engine\'s turns against those beside them of the engine under "ratios to", whose own ratios show how far '
    "the machine makes two turns differ. The share of bandwidth is a median over turns, of the larger reading beside."
)
MODEL_MARKS = (
    "\\* other processes used more than 0.25 cores. ~ the median is not known to within 5 %: its 95 % interval, 1.57 "
    "(q3 - q1) / sqrt(pairs) up and down, is wider, or there are fewer than three pairs."
)
MODEL_KEYS = ("model", "engine", "threads", "pp", "tg", "pp_tps", "tg_tps", "ttft_s", "ms_per_token", "rss_peak_gib")


def models(found: Sequence[Row]) -> str:
    """Whole models: rows of bench_models, the newest of each model, engine, settings and test."""
    parts = []
    for group in machines(found):
        newest: dict[tuple, Row] = {}
        for row in sorted(group, key=lambda r: r["date"]):
            missing = [key for key in MODEL_KEYS if key not in row]
            if missing:
                raise ValueError(f"a row of models*.jsonl has no {', '.join(missing)}")
            settings = tuple(row.get(key) for key in ("group", "form", "compute", "isa"))
            test = row["pp"], row["tg"], row.get("depth", 0), row.get("batch", 1)
            newest[row["model"], row["threads"], test, row["engine"], settings] = row
        paired = any("tg_ratio" in row for row in newest.values())
        body = []
        for key, row in sorted(newest.items(), key=lambda item: (*item[0][:3], -item[1]["tg_tps"])):
            shown = ", ".join(str(s) if i else f"g{s}" for i, s in enumerate(key[4]) if s is not None)
            engine = row["engine"] + (f" ({shown})" if shown else "")
            mark = "\\*" * ((row.get("foreign_cpu") or 0) > rows.FOREIGN_LIMIT)
            speeds = [number(row[name]) + mark for name in ("pp_tps", "tg_tps")]
            rest = [number(row[name]) for name in ("ttft_s", "ms_per_token", "rss_peak_gib")]
            test = "pp{}, tg{}".format(*key[2])
            test += f", depth {key[2][2]}" * (key[2][2] > 0) + f", batch {key[2][3]}" * (key[2][3] > 1)
            body.append([row["model"], engine, str(row["threads"]), test, *speeds, *rest])
            body[-1] += ratios(row) if paired else []
        header = ["model", "engine", "threads", "test", "pp tok/s", "tg tok/s", "TTFT s", "ms/token", "peak GiB"]
        header += ["pp ratio", "tg ratio", "ratios to", "% of bandwidth"] if paired else []
        parts += [short_caption(list(newest.values())), markdown(header, body, 2)]
    ratio_legend = RATIO_LEGEND * any("tg_ratio" in row for row in found)
    return with_legend(parts, MODEL_LEGEND + ratio_legend, MODEL_MARKS)


def ratios(row: Row) -> list[str]:
    """Cells of the paired ratios of a row of bench_models; empty for one from before there were any."""
    if "tg_ratio" not in row:
        return ["", "", "", ""]
    cells = []
    for name in ("pp_ratio", "tg_ratio"):
        low, middle, high = (row[f"{name}{part}"] for part in ("_q1", "", "_q3"))
        text = "" if middle is None else f"{middle:.2f} ({low:.2f}-{high:.2f})"
        cells.append(text + "~" * rows.uncertain(row, name))
    return [*cells, row["ratio_to"], f"{row['pct_bw']:.0f}"]


def experts(found: Sequence[Row]) -> str:
    """A mixture of experts: the newest comparison of each machine."""
    parts = []
    for group in machines(found):
        last = [row for row in group if row["date"] == max(r["date"] for r in group)]
        keys = ("ms_per_step", "speedup", "gbps", "pct_bw")
        body = [[row["what"], row["engine"], *(number(row[key]) for key in keys)] for row in last]
        header = ["what", "engine", "ms/step", "speed-up", "GB/s", "% of bandwidth"]
        parts += [short_caption(last), markdown(header, body, 2)]
    return "\n\n".join(parts)


def plain_table(found: Sequence[Row], every_date: bool = True) -> str:
    """Rows of any other benchmark as they are, their keys are the columns; or each machine's of its last date."""
    parts = []
    for group in machines(found):
        last = [row for row in group if every_date or row["date"] == max(r["date"] for r in group)]
        keys = dict.fromkeys(key for row in last for key in row if key not in _FACTS)
        body = [[_plain(row.get(key)) for key in keys] for row in last]
        parts += [short_caption(last), markdown([key.replace("_", " ") for key in keys], body)]
    return "\n\n".join(parts)


def _plain(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
