"""``cpullm run``, the choice: CPUs, threads, node and libraries, on fake machines."""

import shutil
import sys
from pathlib import Path

import pytest

from torch_cpullm import launch, numa, run
from torch_cpullm.runner import InputError

WIDTH = 100


# ---- lists of CPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 2 , 4 - 5 ", {2, 4, 5}), ("1,1-2", {1, 2})]
)
def test_lists_of_cpus(text, cpus):
    assert numa.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", ",", "a", "0-", "-1", "3-1", "0:3", "1.5", "99999", "9999999", "0,,1", "٣"])
def test_no_lists_of_cpus(text):
    if text == "٣":  # a digit to Python
        assert numa.parse_cpus(text) == {3}
        return
    with pytest.raises(ValueError, match=r"neither|backwards|too large"):
        numa.parse_cpus(text)


def test_cpus_in_words():
    assert numa.format_cpus({8, 0, 1, 2, 3}) == "0-3,8"
    assert numa.format_cpus(range(0, 20, 2)) == "0,2,4,...,18"
    assert numa.format_cpus([]) == ""


# ---- deciding, on fake machines -------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """A function that builds a fake machine: two sockets of ``cores`` cores, two threads each, one node per socket."""

    def build(cores=4, nodes=None, quota="max"):
        half = 2 * cores
        for cpu in range(2 * half):
            write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % half},{cpu % half + half}")
        if nodes is None:
            nodes = {
                0: f"0-{cores - 1},{half}-{half + cores - 1}",
                1: f"{cores}-{half - 1},{half + cores}-{2 * half - 1}",
            }
        for node, cpus in nodes.items():
            write(f"sys/devices/system/node/node{node}/cpulist", cpus)
        write("proc/self/cgroup", "0::/")
        write("proc/self/mountinfo", "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
        write("sys/fs/cgroup/cpu.max", f"{quota} 100000")
        return tmp_path

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    return build


def decide(root, affinity=range(16), environment=None, **options):
    return run.decide(run.Options(**options), root=root, affinity=affinity, environment=environment or {})


def test_one_thread_per_core_of_the_first_node(machine):
    plan = decide(machine())
    assert (plan.cpus, plan.threads, plan.node, plan.where) == ({0, 1, 2, 3}, "4", 0, "node 0")
    assert plan.variables == {"OMP_NUM_THREADS": "4"}
    assert plan.notes == plan.preload == []


def test_the_node_with_the_most_usable_cores(machine):
    plan = decide(machine(), affinity={0, 1, 8, 9, 4, 5, 14})
    assert (plan.cpus, plan.node) == ({4, 5, 14}, 1)


def test_a_named_node(machine):
    plan = decide(machine(), node=1)
    assert (plan.cpus, plan.node, plan.threads) == ({4, 5, 6, 7}, 1, "4")


def test_fewer_threads_keep_the_cores_of_the_node(machine):
    plan = decide(machine(), threads=2)
    assert (plan.cpus, plan.threads) == ({0, 1, 2, 3}, "2")


def test_more_threads_than_cores_take_hyper_threads(machine):
    plan = decide(machine(), threads=6)
    assert (plan.cpus, plan.threads) == ({0, 1, 2, 3, 8, 9, 10, 11}, "6")


def test_listed_cpus(machine):
    plan = decide(machine(), cores="0-3,8-9")
    assert (plan.cpus, plan.threads, plan.node) == ({0, 1, 2, 3, 8, 9}, "4", 0)


def test_listed_cpus_of_two_nodes_have_no_node(machine):
    plan = decide(machine(), cores="0-7")
    assert (plan.threads, plan.node, plan.where) == ("8", None, "nodes 0-1")


def test_a_quota_limits_threads_and_not_cpus(machine):
    """All containers of a machine would meet on the first CPUs of the list."""
    plan = decide(machine(quota="250000"))
    assert (plan.cpus, plan.threads, plan.notes) == ({0, 1, 2, 3}, "2", [])


def test_more_threads_than_the_quota_are_warned_of(machine):
    root = machine(quota="250000")
    assert decide(root, threads=4).notes == ["4 threads share a cgroup quota of 2.5 CPUs"]
    assert decide(root, environment={"OMP_NUM_THREADS": "3"}).notes == ["3 threads share a cgroup quota of 2.5 CPUs"]


def test_the_users_threads(machine):
    root = machine()
    assert decide(root, environment={"OMP_NUM_THREADS": "3"}).threads == "3"
    assert decide(root, environment={"OMP_NUM_THREADS": "3,1"}).variables["OMP_NUM_THREADS"] == "3,1"
    assert decide(root, environment={"OMP_NUM_THREADS": " "}).threads == "4"
    assert decide(root, environment={"OMP_NUM_THREADS": "odd"}).notes == []
    assert decide(root, environment={"OMP_NUM_THREADS": "3"}, threads=2).threads == "2"
    (note,) = decide(root, environment={"OMP_NUM_THREADS": "16"}).notes
    assert note == "OMP_NUM_THREADS=16 is more than the 4 CPUs to run on"


@pytest.mark.parametrize("nodes", [{}, {0: "0-15"}, {0: "garbage"}, {0: "99"}])
def test_one_node_or_none(machine, nodes):
    plan = decide(machine(nodes=nodes))
    assert (plan.cpus, plan.threads, plan.node, plan.where) == (set(range(8)), "8", None, "")


def test_memory_as_it_comes(machine):
    plan = decide(machine(), memory="any")
    assert (plan.node, plan.where) == (None, "node 0")


def test_nodes_without_cpus(machine):
    """High-bandwidth or remote memory is a node of its own."""
    root = machine(nodes={0: "0-15", 1: ""})
    assert decide(root).node == 0
    with pytest.raises(InputError, match="--node: node 1 has no CPU that can be used here; there is node 0"):
        decide(root, node=1)


def test_empty_machine(tmp_path):
    plan = decide(tmp_path, affinity={5, 7})
    assert (plan.cpus, plan.threads, plan.node) == ({5, 7}, "2", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cores": "0", "node": 0}, "--cores and --node exclude each other"),
        ({"cores": "x"}, "--cores: 'x' is neither a number nor a range like 0-7"),
        ({"cores": "12-20"}, "--cores: CPU 16-20 is not available here; there is 0-15"),
        ({"cores": "0-3", "threads": 5}, "--threads: 5 threads, but --cores names 4 CPUs"),
        (
            {"cores": "0-7", "memory": "bind"},
            "--memory bind needs the CPUs of one node; --cores has those of nodes 0-1",
        ),
        ({"node": 2}, "--node: node 2 has no CPU that can be used here; there is node 0-1"),
        ({"threads": 9}, "--threads: 9 threads, but 8 CPUs to run on; --cores can name CPUs of several nodes"),
        ({"threads": 17}, "--threads: 17 threads, but 8 CPUs to run on"),
    ],
)
def test_what_does_not_fit(machine, options, message):
    with pytest.raises(InputError) as error:
        decide(machine(), **options)
    assert str(error.value) == message
    assert len(message) + len("error: ") <= WIDTH


# ---- libraries ------------------------------------------------------------------------------------------------------


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A function that makes harmless libraries of the given names, the only ones there are; returns their folder."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setattr(run, "_directories", lambda name, env: [tmp_path / "missing", folder])
    source = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libm.so" in line)

    def make(*names):
        for name in names:
            shutil.copy(source, folder / name)
        return folder

    return make


def test_libraries_and_their_variables(machine, libraries):
    folder = libraries("libiomp5.so", "libjemalloc.so.2")
    plan = decide(machine(), openmp="intel", malloc="jemalloc")
    assert plan.preload == [folder / "libiomp5.so", folder / "libjemalloc.so.2"]
    assert plan.variables == {
        "OMP_NUM_THREADS": "4",
        "LD_PRELOAD": f"{folder}/libiomp5.so:{folder}/libjemalloc.so.2",
        "KMP_BLOCKTIME": "1",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto",
    }


def test_the_users_variables_are_kept(machine, libraries):
    folder = libraries("libiomp5.so")
    env = {"LD_PRELOAD": f"/a.so {folder}/libiomp5.so:/b.so", "KMP_BLOCKTIME": "7", "OMP_PROC_BIND": "close"}
    variables = decide(machine(), environment=env, openmp="intel").variables
    assert variables == {"OMP_NUM_THREADS": "4", "LD_PRELOAD": f"{folder}/libiomp5.so:/a.so:/b.so"}


def test_pinned_only_where_each_thread_has_its_cpu(machine, libraries):
    libraries("libiomp5.so")
    assert "KMP_AFFINITY" not in decide(machine(), openmp="intel", threads=3).variables
    assert "KMP_AFFINITY" not in decide(machine(quota="200000"), openmp="intel").variables


def test_the_smaller_tcmalloc_will_do(machine, libraries):
    folder = libraries("libtcmalloc_minimal.so.4")
    assert decide(machine(), malloc="tcmalloc").preload == [folder / "libtcmalloc_minimal.so.4"]
    libraries("libtcmalloc.so.4")
    assert decide(machine(), malloc="tcmalloc").preload == [folder / "libtcmalloc.so.4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"openmp": "intel"}, "--openmp intel: not found; try: pip install intel-openmp"),
        ({"malloc": "jemalloc"}, "--malloc jemalloc: not found; try: apt install libjem"),
        ({"malloc": "tcmalloc"}, "--malloc tcmalloc: not found; try: apt install libtcm"),
    ],
)
def test_missing_libraries_name_what_to_install(machine, libraries, options, message):
    libraries()
    with pytest.raises(InputError) as error:
        decide(machine(), **options)
    assert str(error.value).startswith(message)
    assert len(str(error.value)) + len("error: ") <= WIDTH


def test_libraries_of_another_machine_are_passed_over(machine, libraries):
    folder = libraries("libiomp5.so")
    head = bytearray((folder / "libiomp5.so").read_bytes())
    for at, value in [(4, 1), (18, 0xFF), (16, 2), (0, 0)]:  # 32 bits; another processor; a program; no ELF
        changed = head.copy()
        changed[at] = value
        (folder / "libiomp5.so").write_bytes(changed)
        with pytest.raises(InputError, match="not found"):
            decide(machine(), openmp="intel")
    (folder / "libiomp5.so").write_bytes(head[:10])
    with pytest.raises(InputError, match="not found"):
        decide(machine(), openmp="intel")


def test_a_path_that_the_loader_would_split(machine, libraries, monkeypatch):
    folder = libraries("libiomp5.so").rename(Path(machine(), "a b"))
    monkeypatch.setattr(run, "_directories", lambda name, env: [folder])
    with pytest.raises(InputError, match="cannot be preloaded: its name has a blank or a colon"):
        decide(machine(), openmp="intel")


def test_where_libraries_are_looked_for():
    env = {"LD_LIBRARY_PATH": ":/mine::/too", "CONDA_PREFIX": "/conda"}
    places = [str(path) for path in run._directories("jemalloc", env)]
    assert places[:2] == ["/mine", "/too"]
    assert {"/conda/lib", f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib64"} < set(places)


def test_a_preloaded_runtime_stands_before_the_others(tmp_path):
    gomp, iomp = tmp_path / "libgomp.so.1", tmp_path / "libiomp5.so"
    for path in (gomp, iomp):
        path.touch()
    both = [str(gomp), str(iomp)]
    assert launch.openmp_in_use(both, f"/x.so:{iomp}") == [str(iomp)]
    assert launch.openmp_in_use(both, f"/x.so {iomp} /y.so") == [str(iomp)]
    assert launch.openmp_in_use(both, "") == both
    assert launch.openmp_in_use(both, str(gomp)) == both  # has not all of libiomp5's functions
    assert launch.openmp_in_use([*both, "/gone"], str(tmp_path / "other.so")) == [*both, "/gone"]


# ---- ranks ----------------------------------------------------------------------------------------------------------


def of_ranks(root, count, cpus=range(16), **options):
    plans = [
        run.decide(run.Options(rank=(i, count), **options), root=root, affinity=cpus, environment={})
        for i in range(count)
    ]
    return [(sorted(plan.cpus), plan.threads, plan.node) for plan in plans]


def test_ranks_get_a_node_each_or_an_even_part_of_the_cores(machine):
    root = machine()
    assert of_ranks(root, 2) == [([0, 1, 2, 3], "4", 0), ([4, 5, 6, 7], "4", 1)]
    assert of_ranks(root, 4) == [([0, 1], "2", 0), ([2, 3], "2", 0), ([4, 5], "2", 1), ([6, 7], "2", 1)]
    assert of_ranks(root, 2, node=1) == [([4, 5], "2", 1), ([6, 7], "2", 1)]
    assert of_ranks(root, 2, cores="0-5") == [([0, 1, 2, 3], "4", 0), ([4, 5], "2", 1)]
    assert of_ranks(root, 3, cores="0-3", threads=1) == [([0], "1", 0), ([1], "1", 0), ([2, 3], "1", 0)]


def test_ranks_of_a_machine_without_nodes(machine):
    assert of_ranks(machine(nodes={}), 2, cpus=range(4)) == [([0, 1], "2", None), ([2, 3], "2", None)]


def test_ranks_share_a_quota(machine):
    assert [threads for _, threads, _ in of_ranks(machine(quota="400000"), 2)] == ["2", "2"]


def test_more_ranks_than_cores(machine):
    with pytest.raises(InputError, match="--nproc: 9 ranks, but 8 cores to run on"):
        of_ranks(machine(), 9)
    with pytest.raises(InputError, match="--nproc: 2 ranks, but 0 cores to run on"):
        of_ranks(machine(), 2, node=7)


def test_a_rank_is_one_of_torchs_launcher():
    started = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert run.rank_of(2, started) == (1, 2)
    assert run.rank_of(3, started) is None, "another job's"
    assert run.rank_of(2, {}) is None
