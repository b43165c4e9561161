"""Thread choice and container limits on fake /proc and /sys trees, then on this machine."""

import logging
import os
import subprocess
import sys
import types

import pytest

from torch_cpullm import launch

V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_CPU_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V1_MEMORY_MOUNT = "33 31 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
NO_V1_MEMORY_LIMIT = 9223372036854771712


@pytest.fixture
def tree(tmp_path):
    """A function that writes {path: text} below a fake root and returns the root."""

    def build(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return build


def topology(siblings):
    """/sys files of the CPUs: {cpu: thread_siblings_list}."""
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{s}\n" for cpu, s in siblings.items()}


def smt(cores):
    """Topology of ``cores`` cores with two threads each, numbered as Linux does: core c has CPUs c and c + cores."""
    return topology({cpu: f"{cpu % cores},{cpu % cores + cores}" for cpu in range(2 * cores)})


# ---- cgroup v2 ------------------------------------------------------------------------------------------------------


def test_v2_quota_of_the_own_group(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/user.slice/job/cpu.max": "250000 100000\n",
        }
    )
    assert launch.cgroup_cpu_quota(root) == 2.5


def test_v2_smallest_quota_along_the_hierarchy(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a/b/c/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/other/cpu.max": "100000 100000\n",  # a sibling's limit is not ours
        }
    )
    assert launch.cgroup_cpu_quota(root) == 3.0


def test_v2_container_sees_its_own_group_at_the_mount_point(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/memory.max": "1073741824\n",
        }
    )
    assert launch.cgroup_cpu_quota(root) == 1.5
    assert launch.cgroup_memory_limit_bytes(root) == 1 << 30


def test_v2_without_mountinfo_uses_the_usual_place(tree):
    root = tree({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "400000 100000\n"})
    assert launch.cgroup_cpu_quota(root) == 4.0


def test_v2_path_outside_of_the_mount_falls_back_to_the_mount_point(tree):
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    files = {"proc/self/mountinfo": mount, "sys/fs/cgroup/cpu.max": "200000 100000\n"}
    for own in ("/docker/abc", "/../other", "/elsewhere"):
        assert launch.cgroup_cpu_quota(tree({**files, "proc/self/cgroup": f"0::{own}\n"})) == 2.0


@pytest.mark.parametrize("text", ["max 100000\n", "", "0 100000\n", "100000 0\n", "garbage\n", "-1 100000\n"])
def test_no_quota(tree, text):
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/cpu.max": text}
    assert launch.cgroup_cpu_quota(tree(files)) is None


def test_empty_machine(tmp_path):
    assert launch.cgroup_cpu_quota(tmp_path) is None
    assert launch.cgroup_memory_limit_bytes(tmp_path) is None
    assert launch.openmp_runtimes(root=tmp_path) == []
    assert launch.default_threads(root=tmp_path, affinity={0, 1, 2}).count == 3


# ---- cgroup v1 ------------------------------------------------------------------------------------------------------


def v1(root="/", own="/job", **limits):
    """A v1 tree; limits: {"job": (quota, period)} for directories below the mount point."""
    files = {
        "proc/self/cgroup": f"5:cpuset:/\n4:memory:{own}\n3:cpu,cpuacct:{own}\n0::/unified\n",
        "proc/self/mountinfo": V1_CPU_MOUNT.format(root=root) + V1_MEMORY_MOUNT.format(root=root),
    }
    for directory, (quota, period) in limits.get("cpu", {}).items():
        files[f"sys/fs/cgroup/cpu,cpuacct/{directory}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"sys/fs/cgroup/cpu,cpuacct/{directory}/cpu.cfs_period_us"] = f"{period}\n"
    for directory, limit in limits.get("memory", {}).items():
        files[f"sys/fs/cgroup/memory/{directory}/memory.limit_in_bytes"] = f"{limit}\n"
    return files


def test_v1_smallest_quota_along_the_hierarchy(tree):
    cpu = {".": (-1, 100000), "job": (400000, 100000), "job/step": (100000, 50000)}
    assert launch.cgroup_cpu_quota(tree(v1(own="/job/step", cpu=cpu))) == 2.0


def test_v1_container_without_namespace(tree):
    files = v1(root="/docker/abc", own="/docker/abc", cpu={".": (350000, 100000)})
    assert launch.cgroup_cpu_quota(tree(files)) == 3.5


def test_v1_group_below_the_mounted_part(tree):
    files = v1(root="/docker/abc", own="/docker/abc/inner", cpu={".": (-1, 100000), "inner": (50000, 100000)})
    assert launch.cgroup_cpu_quota(tree(files)) == 0.5


def test_v1_unlimited(tree):
    root = tree(v1(cpu={"job": (-1, 100000)}, memory={"job": NO_V1_MEMORY_LIMIT}))
    assert launch.cgroup_cpu_quota(root) is None
    assert launch.cgroup_memory_limit_bytes(root) is None


def test_v1_memory_limit(tree):
    root = tree(v1(own="/job/step", memory={".": NO_V1_MEMORY_LIMIT, "job": 2 << 30, "job/step": 3 << 30}))
    assert launch.cgroup_memory_limit_bytes(root) == 2 << 30


def test_v1_without_mountinfo_uses_the_usual_places(tree):
    files = v1(cpu={"job": (600000, 100000)})
    del files["proc/self/mountinfo"]
    assert launch.cgroup_cpu_quota(tree(files)) == 6.0


def test_mixed_hierarchies_take_the_smaller(tree):
    files = v1(cpu={"job": (600000, 100000)})
    files["proc/self/cgroup"] = "3:cpu,cpuacct:/job\n0::/unified\n"
    files["proc/self/mountinfo"] += V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    files["sys/fs/cgroup/unified/unified/cpu.max"] = "500000 100000\n"
    assert launch.cgroup_cpu_quota(tree(files)) == 5.0


def test_mount_point_with_a_blank(tree):
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/odd\\040place"),
        "odd place/cpu.max": "700000 100000\n",
    }
    assert launch.cgroup_cpu_quota(tree(files)) == 7.0


# ---- physical cores -------------------------------------------------------------------------------------------------


def test_hyper_threads_count_once(tree):
    root = tree(smt(4))
    assert launch.physical_cores(range(8), root=root) == 4
    assert launch.physical_cores({0, 4}, root=root) == 1
    assert launch.physical_cores({0, 4, 1}, root=root) == 2


def test_package_and_core_where_no_siblings_are_listed(tree):
    files = {}
    for cpu, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)]):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"] = f"{package}\n"
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/core_id"] = f"{core}\n"
    root = tree(files)
    assert launch.physical_cores(range(6), root=root) == 4
    assert launch.physical_cores({0, 4}, root=root) == 1


# ---- the choice -----------------------------------------------------------------------------------------------------


def v2_quota(text):
    return {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/cpu.max": f"{text} 100000\n"}


@pytest.mark.parametrize(
    ("affinity", "quota", "count"),
    [
        (range(16), "max", 8),  # physical cores decide
        (range(3), "max", 3),  # the mask decides
        (range(16), "390000", 3),  # the quota decides, rounded down
        (range(16), "50000", 1),  # half a CPU is still one thread
        ({0, 8}, "max", 1),  # two threads of one core
    ],
)
def test_smallest_of_three(tree, affinity, quota, count):
    choice = launch.default_threads(root=tree({**smt(8), **v2_quota(quota)}), affinity=affinity)
    assert choice.count == count
    assert choice.source == "default"
    assert choice.affinity == len(affinity)


def test_reason_names_all_three(tree):
    choice = launch.default_threads(root=tree({**smt(8), **v2_quota("250000")}), affinity=range(12))
    assert choice.reason == "least of: affinity 12, cgroup quota 2.5, physical cores 8"
    assert (choice.count, choice.cgroup_quota, choice.physical_cores) == (2, 2.5, 8)


@pytest.fixture
def process(monkeypatch):
    """A process with 16 CPUs on 8 cores and a quota of 5, whose torch starts with 16 threads: the fake torch."""
    for name in launch.USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch = types.SimpleNamespace(threads=16)
    torch.get_num_threads = lambda: torch.threads
    torch.set_num_threads = lambda count: setattr(torch, "threads", count)
    default = launch.ThreadChoice(5, 16, 5.5, 8, "default", "least of")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(launch, "default_threads", lambda: default)
    monkeypatch.setattr(launch, "_applied", None)
    monkeypatch.setattr(launch, "_torch_threads_at_import", 16)
    return torch


def test_default_is_applied_and_said_once(process, caplog):
    with caplog.at_level(logging.INFO, logger="torch_cpullm"):
        choice = launch.apply_default_threads()
        assert launch.apply_default_threads() == choice
    assert process.threads == choice.count == 5
    assert [record.getMessage() for record in caplog.records] == ["torch_cpullm uses 5 threads (least of)"]


@pytest.mark.parametrize("at_import", [16, 8, None])
def test_any_start_value_of_torch_is_replaced(process, monkeypatch, at_import):
    monkeypatch.setattr(launch, "_torch_threads_at_import", at_import)
    process.threads = at_import or 16
    assert launch.apply_default_threads().count == process.threads == 5


@pytest.mark.parametrize("name", launch.USER_VARIABLES)
def test_openmp_variables_win(process, monkeypatch, name):
    monkeypatch.setenv(name, "3")
    process.threads = 3
    choice = launch.apply_default_threads()
    assert process.threads == choice.count == 3
    assert choice.source == name


def test_empty_and_false_variables_do_not_count(process, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert launch.apply_default_threads().source == "default"


@pytest.mark.parametrize("at_import", [16, 3, None])
def test_set_num_threads_wins(process, monkeypatch, at_import):
    """Called after the import (16 -> 3), before it (3), or not known when (None)."""
    monkeypatch.setattr(launch, "_torch_threads_at_import", at_import)
    process.threads = 3
    choice = launch.apply_default_threads()
    assert process.threads == choice.count == 3
    assert choice.source == "torch.set_num_threads"


def test_set_num_threads_after_ours_wins(process):
    assert launch.apply_default_threads().count == 5
    process.set_num_threads(8)  # a number torch might start with, but it was 5 a moment ago
    assert launch.apply_default_threads().count == process.threads == 8
    assert launch.apply_default_threads().source == "torch.set_num_threads"


def test_argument_wins_over_everything(process, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.set_threads(16).source == "argument"
    assert launch.apply_default_threads().count == process.threads == 16
    with pytest.raises(ValueError, match="at least 1, got 0"):
        launch.set_threads(0)


# ---- OpenMP runtimes ------------------------------------------------------------------------------------------------

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 11 /env/torch/lib/libgomp.so.1
7f02-7f03 r--p 00000000 08:01 11 /env/torch/lib/libgomp.so.1
7f04-7f05 r-xp 00000000 08:01 11 /other/name/libgomp.so.1
7f06-7f07 r-xp 00000000 08:01 12 /env/torch/lib/libtorch_cpu.so
7f08-7f09 rw-p 00000000 00:00 0 [heap]
7f0a-7f0b rw-p 00000000 00:00 0
"""


def test_one_runtime_under_two_names_counts_once(tree):
    assert launch.openmp_runtimes(root=tree({"proc/self/maps": MAPS})) == ["/env/torch/lib/libgomp.so.1"]


@pytest.mark.parametrize(
    "name", ["libiomp5.so", "libomp.so", "libomp.so.5", "libgomp-a34b3233.so.1.0.0", "libgomp.so.1 (deleted)"]
)
def test_second_runtime_is_found(tree, name):
    maps = MAPS + f"7f0c-7f0d r-xp 00000000 08:01 13 /else where/{name}\n"
    runtimes = launch.openmp_runtimes(root=tree({"proc/self/maps": maps}))
    assert runtimes == ["/env/torch/lib/libgomp.so.1", f"/else where/{name.removesuffix(' (deleted)')}"]


def test_similar_names_are_no_runtimes(tree):
    maps = "".join(f"1-2 r-xp 0 08:01 {i} /x/{n}\n" for i, n in enumerate(["libompi.so", "libgomp.py", "libompt2.so"]))
    assert launch.openmp_runtimes(root=tree({"proc/self/maps": maps})) == []


# ---- this machine ---------------------------------------------------------------------------------------------------


def python(code, **environment):
    """Output of ``code`` in a new interpreter without OpenMP variables of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in launch.USER_VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_changes_no_thread_count():
    before, after = python(
        "import torch; before = torch.get_num_threads(); import torch_cpullm; print(before, torch.get_num_threads())"
    )
    assert before == after


def test_this_machine():
    applied, torchs, default, runtimes, source = python(
        "from torch_cpullm import launch; import torch\n"
        "choice = launch.apply_default_threads()\n"
        "print(choice.count, torch.get_num_threads(), launch.default_threads().count,"
        "      len(launch.openmp_runtimes()), choice.source)"
    )
    assert applied == torchs == default
    assert 1 <= int(applied) <= (os.cpu_count() or 1)
    assert int(runtimes) == 1
    assert source == "default"


def test_variable_set_for_a_real_process():
    code = "from torch_cpullm import launch; c = launch.apply_default_threads(); print(c.count, c.source)"
    assert python(code, OMP_NUM_THREADS="1") == ["1", "OMP_NUM_THREADS"]
