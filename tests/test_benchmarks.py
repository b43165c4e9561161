"""The benchmarks' own rights and wrongs: rows, weights, limits, tables. No timing is asserted."""

import json
import platform
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from torch_cpullm import ops
from torch_cpullm.packing import dequantize

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # `pytest` alone does not add it, `python -m pytest` does

from benchmarks import bench_ops, cells, machine, report, rows, tables  # noqa: E402

X86 = platform.machine() == "x86_64"
TINY = [
    "--budget", "0.002", "--rounds", "2", "--retries", "0", "--buffer-mib", "2", "--rotate-mib", "1", "--threads", "1",
]  # fmt: skip


def sample(**changes):
    """A row as a run makes it: 4096x11008, M=1, 25.4 MB of weights in 400 µs, 63.5 GB/s."""
    known = {
        "op": "linear", "engine": "cpullm", "m": 1, "n": 11008, "k": 4096, "group": 128, "form": "sym", "bits": 4,
        "compute": "int8", "isa": "avx512", "threads": 2, "x_dtype": "bfloat16", "us": 400.0, "us_min": 390.0,
        "reps": 1000, "bytes": 25_400_000, "foreign_cpu": 0.01, "machine": "Some CPU, 2 cores",
        "date": "2030-01-02T03:04:05.678Z", "commit": "0123456789", "torch": "2.13.0", "bw_before": 66.0,
        "bw_after": 65.0, "peak_gops": 1800.0,
    }  # fmt: skip
    return rows.make(**{**known, **changes})


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_has_the_keys_in_order_and_what_follows_from_the_measured_ones():
    row = sample()
    assert list(row) == list(rows.KEYS)
    assert row["case"] == "linear/cpullm/4096x11008/m1/g128/sym/b4/int8/avx512/t2"
    assert row["gbps"] == 63.5
    assert row["pct_bw"] == 96.21  # 63.5 of 66
    assert row["gops"] == 225.4  # 2 * 4096 * 11008 in 400 µs
    assert row["pct_peak"] == 12.52
    assert row["unstable"] is False


def test_keys_that_the_issue_names_never_go():
    promised = (
        "case m n k group form bits compute isa threads us gbps pct_bw gops pct_peak foreign_cpu machine date commit "
        "bw_before bw_after peak_gops us_min reps bytes torch engine"
    )
    assert set(promised.split()) <= rows.KEYS.keys()


@pytest.mark.parametrize(("after", "unstable"), [(59.5, False), (59.3, True), (74.0, True)])
def test_bandwidth_is_unstable_beyond_ten_percent_of_the_larger(after, unstable):
    assert sample(bw_after=after)["unstable"] is unstable


def test_shares_are_null_where_no_limit_was_measured():
    assert sample(compute="fp32")["pct_peak"] is None
    assert sample(isa="ref", peak_gops=None)["pct_peak"] is None
    quantize = sample(op="quantize", n=0, bytes=0)
    assert (quantize["gbps"], quantize["gops"], quantize["pct_bw"]) == (None, None, None)
    assert sample(rotated=False)["pct_bw"] is None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("us", "400", "us must be int or float, got '400'"),
        ("m", True, "m must be int, got True"),
        ("isa", None, "isa must be str, got None"),
        ("unstable", 0, "unstable must be bool, got 0"),
        ("m", 2, "case is"),
        ("us", 0.0, "must be positive"),
        ("extra", 1, "unknown keys: extra"),
    ],
)
def test_a_wrong_row_is_refused(key, value, says):
    with pytest.raises(ValueError, match=says):
        rows.check({**sample(), key: value})


def test_a_row_without_a_key_is_refused():
    row = sample()
    del row["bw_after"]
    with pytest.raises(ValueError, match="missing keys: bw_after"):
        rows.check(row)


def test_append_read_and_the_newest_of_each_case(tmp_path):
    path = tmp_path / "new" / "ops_a.jsonl"
    old, new, other = sample(us=500.0), sample(date="2031-01-01T00:00:00.000Z"), sample(machine="Other, 4 cores")
    rows.append(path, [new])
    rows.append(path, [old, other])
    assert rows.read(path) == [new, old, other]
    assert rows.newest(rows.read_all(path.parent)) == [new, other]
    assert rows.read_all(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("line", "says"), [("{", "not JSON"), ("3", "JSON object"), ("{}", "missing keys: bits")])
def test_a_bad_file_is_named_with_its_line(tmp_path, line, says):
    path = tmp_path / "ops.jsonl"
    rows.append(path, [sample()])
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"ops\.jsonl:3: .*{says}"):
        rows.read(path)


def test_nothing_is_appended_where_one_row_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="unknown keys"):
        rows.append(tmp_path / "ops.jsonl", [sample(), {**sample(), "x": 1}])
    assert list(tmp_path.iterdir()) == []


# ---- the machine ----------------------------------------------------------------------------------------------------


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_machine_is_named_by_its_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.launch, "cpu_affinity", lambda: frozenset({0, 1}))
    write(tmp_path, "proc/cpuinfo", "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n")
    assert machine.machine_name(tmp_path) == "AMD EPYC (family 26 model 2), 2 cores"
    write(tmp_path, "proc/cpuinfo", "model name\t: Odd\n")
    assert machine.machine_name(tmp_path) == "Odd, 2 cores"


def test_last_level_caches_are_added_up_over_the_usable_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.launch, "cpu_affinity", lambda: frozenset(range(4)))
    assert machine.l3_bytes(tmp_path) == machine.UNKNOWN_L3_BYTES
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [(1, "Data", "48K", cpu), (2, "Unified", "1M", cpu), (3, "Unified", "16384K", "0-1" if cpu < 2 else "2-3")]
        ):
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                write(tmp_path, f"{folder}/{name}", f"{text}\n")
    assert machine.l3_bytes(tmp_path) == 32 << 20


def test_foreign_cpu_is_busy_time_without_ones_own(tmp_path, monkeypatch):
    clocks = iter([0.0, 2.0])
    own = iter([5.0, 6.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clocks))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    write(tmp_path, "proc/stat", "cpu  100 0 10 5000 30 0 0 0 0 0\ncpu0 1 2 3\n")
    with (meter := machine.ForeignCpu(tmp_path)):
        write(tmp_path, "proc/stat", "cpu  220 10 20 9000 90 5 5 50 7 7\ncpu0 1 2 3\n")  # 2 s busy, 0.5 of them stolen
    assert meter.cores == pytest.approx((2.0 - 1.0) / 2.0)


def test_foreign_cpu_is_unknown_where_the_counters_stand_still(tmp_path):
    meter = machine.ForeignCpu(tmp_path)
    assert meter.cores is None
    meter.wall_s, meter.own_s = 1.0, 0.9
    assert meter.cores is None


def test_limits_are_read_with_the_threads_asked_for(isa):
    torch.set_num_threads(1)
    memory = machine.Memory(1 << 21)
    assert memory.size_bytes == 1 << 21
    assert memory.read_gbps(2) > 0
    assert machine.peak_gops(isa, 2, seconds=0.001, reps=1) > 0
    assert torch.get_num_threads() == 1
    assert ops.isa() == isa


def test_threads_below_one_are_refused():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        machine.Threads(0)


# ---- cells ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "form", "bits"), [(32, "sym", 4), (128, "zero", 4), (-1, "min", 4), (128, "sym", 8)])
def test_random_weights_are_weights(group, form, bits):
    k, n = 160, 40  # both padded, the last group of 128 short
    pool = cells.Pool([(k, n), (64, 64)], [4, 8], [32, 128, -1], 1 << 14)
    copies = pool.weights(k, n, group, form, bits)
    assert len(copies) * copies[0].codes.nbytes >= 1 << 14
    assert len({weight.codes.data_ptr() for weight in copies}) == len(copies)
    assert copies[0].bits_per_weight >= bits
    assert len(pool.weights(k, n, group, form, bits, most=1)) == 1
    x = torch.randn(3, k)
    for weight in (copies[0], copies[-1]):
        wanted = x @ dequantize(weight).T
        torch.testing.assert_close(ops.linear(x, weight, compute="fp32"), wanted, rtol=1e-4, atol=1e-4)
        assert wanted.abs().max() > 0.01


def test_eight_bit_weights_come_once_whatever_the_forms():
    pool = cells.Pool([(64, 64)], [4, 8], [32], 1 << 12)
    found = cells.own_cells(
        pool, cells.Activations(), (64, 64), [1, 2],
        groups=[32], forms=["sym", "zero", "min"], bits=[4, 8], computes=["int8", "fp32"], isas=["ref"], threads=1,
    )  # fmt: skip
    kinds = [(cell.bits, cell.form, cell.compute, cell.m) for cell in found]
    assert len(set(kinds)) == len(kinds) == (3 + 1) * 2 * 2
    assert found[0].bytes == 64 * 64 // 2 + 64 * 2 * 2  # codes and fp16 scales


@pytest.mark.skipif(not X86, reason="the peers' kernels are for x86")
def test_peers_compute_a_linear():
    k, n, m = 128, 64, 3
    pool = cells.Pool([(k, n)], [4], [128], 1 << 14)
    found = list(cells.peer_cells(pool, cells.Activations(), (k, n), [m], [128, 48, -1], 1))
    assert [cell.engine for cell in found] == list(cells.PEERS)
    for cell in found:
        assert len(cell.calls) * cell.bytes >= 1 << 14
        y = cell.next_call()()
        assert y.shape == (m, n)
        assert torch.isfinite(y).all()


def fake(name, log, isa="native"):
    return cells.Cell(
        name,
        1,
        32,
        32,
        32,
        "sym",
        4,
        "int8",
        isa,
        1,
        "float32",
        512,
        [partial(log.append, (name, i)) for i in range(2)],
    )


def test_cells_alternate_and_their_weights_rotate():
    log = []
    both = [fake("a", log), fake("b", log)]
    bench_ops.interleave(both, 0.0, 3)
    assert [name for name, _ in log] == ["a", "b", "b", "a", "a", "b"]
    assert [copy for name, copy in log if name == "a"] == [1, 0, 1]
    assert [len(cell.samples_s) for cell in both] == [3, 3]


def test_only_ref_is_left_out_for_being_slow():
    log = []
    slow, fast = fake("a", log, "ref"), fake("b", log)
    again = fake("a", log, "ref")
    assert bench_ops.warm_up([slow, again, fast], -1.0) == [fast]
    assert bench_ops.warm_up([slow, again, fast], 60.0) == [slow, again, fast]
    assert slow.samples_s == []


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_quick_run_prints_and_appends_rows(tmp_path, capsys):
    path = tmp_path / "ops_here.jsonl"
    peers = ["--peers"] if X86 else []
    argv = ["--quick", "--shapes", "64x96", "--m", "1", "4", "--groups", "32", "--json", str(path), *peers, *TINY]
    assert bench_ops.main(argv) == 0
    found = rows.read(path)
    assert {row["engine"] for row in found} == {"cpullm", *(cells.PEERS if X86 else ())}
    assert {(row["k"], row["n"], row["threads"]) for row in found} == {(64, 96, 1)}
    assert len({row["date"] for row in found}) == 1
    assert len({row["case"] for row in found}) == len(found)
    text = capsys.readouterr().out
    assert "64x96 (k x n), 1 thread\n" in text
    assert text.count("\ncpullm ") == 2
    assert report.main(["--results", str(tmp_path), "--print", "kernels"]) == 0
    assert "| 64x96 | 32" in capsys.readouterr().out


def test_every_level_form_and_compute_type_runs(tmp_path):
    path = tmp_path / "ops.jsonl"
    bench_ops.main([
        "--shapes", "64x32", "--m", "1", "--groups", "-1", "--forms", *cells.FORMS, "--bits", "4", "8",
        "--compute", "int8", "fp32", "--isa", "all", "--json", str(path), "--commit", "abc", *TINY,
    ])  # fmt: skip
    found = rows.read(path)
    levels = {name for name, can_run in ops.isa_levels().items() if can_run}
    assert {row["isa"] for row in found} == levels
    assert len(found) == len(levels) * 4 * 2
    assert {row["commit"] for row in found} == {"abc"}


def test_curve_prints_every_m(capsys):
    bench_ops.main(["--curve", "--shapes", "64x32", *TINY])
    curve = capsys.readouterr().out.partition("curve of cpullm 4 128 sym int8")[2].splitlines()[2:]
    assert [int(line.split()[0]) for line in curve] == list(range(1, 65))


def test_fixed_costs(tmp_path, capsys):
    path = tmp_path / "ops.jsonl"
    bench_ops.main(["--call", "--json", str(path), *TINY])
    assert [(row["op"], row["m"]) for row in rows.read(path)] == [
        ("call", 1), ("call", 1), ("region", 0), ("barrier", 0), ("quantize", 1), ("quantize", 512), ("linear", 1),
        ("linear", 512),
    ]  # fmt: skip
    assert "quantising activations, M=512, k=4096" in capsys.readouterr().out
    table = report.table("calls", tmp_path)
    assert all(words in table for words in ("one call, 64x64", "one parallel region", "one barrier"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--shapes", "4096"], "a shape must be KxN"),
        (["--m", "0"], "--m must be at least 1, got 0"),
        (["--groups", "48"], "group_size must be"),
        (["--isa", "mmx"], "invalid choice: 'mmx'"),
    ],
)
def test_wrong_arguments_end_with_a_message(argv, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_ops.parse([*argv, "--threads", "2"])
    assert says in capsys.readouterr().err


def test_defaults_cover_the_issues_shapes():
    args = bench_ops.parse(["--threads", "2"])
    assert [bench_ops.parse_shape(shape) for shape in args.shapes][1] == (4096, 11008)
    assert (len(args.shapes), args.m[0], args.m[-1]) == (8, 1, 512)
    assert len(bench_ops.parse(["--threads", "2", "--quick"]).shapes) == 2


def test_lines_stay_within_100_columns():
    long = {
        "engine": "torch_int4pack", "m": 512, "isa": "avx_vnni", "form": "zero", "compute": "int8", "us": 1234567.0,
        "foreign_cpu": 15.25, "bw_after": 10.0, "k": 896, "n": 151936, "peak_gops": 30000.0,
    }  # fmt: skip
    for row in (sample(**long), sample(**{**long, "us": 2.5, "m": 1, "bytes": 500_000})):
        assert len(bench_ops.line(row)) <= 100
    assert len(bench_ops.HEADER.rstrip()) <= 100


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    rows.append(folder / "ops_a.jsonl", [
        sample(),
        sample(m=512, us=30000.0),
        sample(group=32, us=450.0, bytes=28_000_000),
        sample(n=4096, us=200.0, bytes=9_400_000, foreign_cpu=0.3),
        sample(form="zero", us=410.0),
        sample(isa="avx2", us=420.0, peak_gops=450.0),
        sample(threads=1, us=700.0, bw_before=38.0, bw_after=33.0),
        sample(engine="torch_bf16", isa="native", group=0, form="none", bits=16, compute="bf16", us=3800.0),
        sample(engine="onednn_int8", isa="native", group=-1, bits=8, us=390.0),
    ])  # fmt: skip
    rows.append(folder / "ops_b.jsonl", [sample(machine="Another CPU, 16 cores", isa="amx", threads=16)])
    return folder


def lines_of(text, start):
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith(start)]


def test_kernel_table(results):
    text = report.table("kernels", results)
    assert text.index("**Another CPU, 16 cores**") < text.index("**Some CPU, 2 cores**; 2 threads: memory 66 GB/s")
    assert lines_of(text, "| 4096x") == [
        "| 4096x11008 | 128 | 400 (96 %) |",  # on the other machine
        "| 4096x11008 | 32 | 450 (94 %) | |",
        "| 4096x11008 | 128 | 400 (96 %) | 30000 (86 %) |",
        "| 4096x4096 | 128 | 200 (71 %)\\* | |",
    ]
    assert tables.MARKS in text


def test_tables_by_form_level_and_threads(results):
    assert "| 4096x11008 | 4 | zero points | int8 | 128 | 410 (94 %) | |" in lines_of(
        report.table("forms", results), "|"
    )
    levels = lines_of(report.table("levels", results), "| 4096x11008 | 128")
    assert [line.split(" | ")[2] for line in levels] == ["avx2", "avx512"]
    threads = lines_of(report.table("threads", results), "| 4096x11008 | 128")
    assert threads[0] == "| 4096x11008 | 128 | 1 | 700 (95 %)~ | |"


def test_peers_table_shows_what_we_lose(results):
    peers = lines_of(report.table("peers", results), "| 4096x11008")
    assert peers[0] == "| 4096x11008 | torch_cpullm, group 32 | 450 | |"
    assert peers[1] == "| 4096x11008 | torch_cpullm, group 128 | 400 | **30000** |"
    assert peers[2] == "| 4096x11008 | `F.linear` bf16 | 3800 | |"
    assert "| **390** |" in peers[3]


def test_peers_are_compared_within_one_comparison_only(results):
    later = sample(date="2031-01-01T00:00:00.000Z", us=1.0)
    rows.append(results / "ops_a.jsonl", [later])
    assert "1.00 (" in report.table("kernels", results)
    assert "1.00" not in report.table("peers", results)


def test_other_benchmarks_tables(tmp_path):
    common = {"machine": "Some CPU", "commit": "0123", "date": "2030-01-02"}
    model = {
        **common, "model": "tiny", "engine": "cpullm", "group": 32, "form": "sym", "compute": "int8", "threads": 2,
        "pp": 512, "tg": 64, "pp_tps": 700.0, "tg_tps": 88.8, "ttft_s": 0.73, "ms_per_token": 11.26,
        "rss_peak_gib": 0.9, "foreign_cpu": 0.5,
    }  # fmt: skip
    (tmp_path / "models.jsonl").write_text(json.dumps(model) + "\n")
    (tmp_path / "quality.jsonl").write_text(json.dumps({**common, "recipe": "rtn", "ppl": 17.31}) + "\n")
    wanted = "| tiny | cpullm (g32, sym, int8) | 2 | pp512, tg64 | 700\\* | 88.8\\* | 0.73 | 11.3 | 0.90 |"
    assert wanted in lines_of(report.table("models", tmp_path), "|")
    assert lines_of(report.table("quality", tmp_path), "|")[::2] == ["| recipe | ppl |", "| rtn | 17.31 |"]
    (tmp_path / "models.jsonl").write_text(json.dumps(common) + "\n")
    with pytest.raises(ValueError, match=r"models\*\.jsonl has no model, engine"):
        report.table("models", tmp_path)


def test_pages_are_rewritten_and_checked(tmp_path, results, capsys):
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    text = "# A\n<!-- table:kernels -->\nold\n<!-- end -->\nB\n\n<!-- table:quality -->\n<!-- end -->\n"
    page.write_text(text)
    argv = ["--root", str(tmp_path), "--results", str(results)]
    assert report.main([*argv, "--check"]) == 1
    assert "speed.md" in capsys.readouterr().out
    assert page.read_text() == text
    assert report.main(argv) == 0
    new = page.read_text()
    assert new.startswith("# A\n<!-- table:kernels -->\n\nSymmetric")
    assert new.endswith("|\n\n<!-- end -->\nB\n\n<!-- table:quality -->\n<!-- end -->\n")
    assert report.main([*argv, "--check"]) == 0
    assert report.main(argv) == 0
    assert page.read_text() == new


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table:kernel -->\n<!-- end -->\n", "unknown table 'kernel'"),
        ("<!-- table:kernels -->\n", "needs a line <!-- end -->"),
        ("<!-- table:kernels -->\n<!-- table:peers -->\n<!-- end -->\n", "needs a line <!-- end -->"),
    ],
)
def test_a_wrong_marker_is_an_error(tmp_path, results, text, says, capsys):
    (tmp_path / "README.md").write_text(text)
    assert report.main(["--root", str(tmp_path), "--results", str(results)]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_the_projects_pages_are_what_its_rows_say():
    stale = report.stale(ROOT)
    assert not stale, f"run `python -m benchmarks.report`: {', '.join(str(path) for path in stale)}"


def test_the_projects_rows_are_right():
    assert len(rows.newest(rows.read_all())) <= len(rows.read_all())
    assert all(row["commit"] and row["machine"] for kind in report.OTHER for row in rows.read_other(kind))
