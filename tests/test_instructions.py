"""Instruction counts of the kernels, beside those committed here: a guard against slow code that results do not show.

Two ways, neither of which needs more than the compiler's tools. Dynamic: ``count_instructions.cpp`` runs a kernel of
each level that this CPU has, instruction by instruction. Static: inner loops in the disassembly, of all levels.
"""

import functools
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from torch_cpullm import ops

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build/cpullm/x86_64/kernels"
TOLERANCE = 1.15
"""Compilers differ; what a kernel costs more than that is a change of the kernel."""

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (OBJECTS / "avx512.o").exists(),
    reason="counts need the objects of an x86-64 build in this tree (make build)",
)

DOTS = {
    "avx2": ("vpmaddubsw", 32),
    "avx_vnni": ("vpdpbusd", 32),
    "avx512": ("vpdpbusd", 64),
}
"""Level -> the instruction that multiplies codes and activations, and how many products it makes."""

# (kernel, m, k, group, bits): instructions for one panel of 32 columns. A failure prints the number found.
COUNTS = {
    "ref": {
        ("quantize", 1, 512, 128, 4): 36576,
        ("int8", 1, 128, 32, 4): 117365,
    },
    "avx2": {
        ("quantize", 1, 512, 128, 4): 2355,
        ("int8", 1, 512, 32, 4): 3228,
        ("int8", 1, 512, 128, 4): 3347,
        ("int8", 1, 512, 128, 8): 6376,
        ("int8", 4, 512, 128, 4): 9351,
        ("int8", 16, 256, 128, 4): 17722,
        ("int8", 64, 256, 128, 4): 64850,
        ("int8", 64, 256, 32, 4): 80727,
        ("fp32", 1, 512, 128, 4): 13789,
        ("fp32", 12, 256, 128, 4): 35944,
    },
    "avx512": {
        ("quantize", 1, 512, 128, 4): 1686,
        ("int8", 1, 512, 32, 4): 1505,
        ("int8", 1, 512, 128, 4): 1356,
        ("int8", 1, 512, 128, 8): 1331,
        ("int8", 4, 512, 128, 4): 3565,
        ("int8", 8, 512, 32, 4): 8394,
        ("int8", 16, 256, 128, 4): 6860,
        ("int8", 64, 256, 128, 4): 22459,
        ("int8", 64, 256, 32, 4): 26611,
        ("fp32", 1, 512, 128, 4): 5665,
        ("fp32", 12, 256, 128, 4): 14178,
        ("bf16", 14, 512, 128, 4): 18286,
    },
}


def objdump(path):
    """Function name -> [(address, mnemonic, operands)] of an object or program."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    functions, code = {}, []
    for line in text.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            code = functions.setdefault(header[1], [])
        elif match := re.match(r"\s+([0-9a-f]+):\t(?:\{vex\} )?(\S+)\s*([^#]*)", line):
            code.append((int(match[1], 16), match[2], match[3].strip()))
    return functions


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """(level, kernel, m, k, group, bits) -> {mnemonic: how often it runs} for one panel of 32 columns."""
    program = tmp_path_factory.mktemp("count") / "count_instructions"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    flags = ["-std=c++17", "-O1", "-no-pie", "-Icsrc"]
    objects = sorted(map(str, OBJECTS.glob("*.o")))
    subprocess.run([*compiler, *flags, "tests/count_instructions.cpp", *objects, "-o", program], cwd=ROOT, check=True)
    mnemonics = {address: name for code in objdump(program).values() for address, name, _ in code}

    @functools.cache
    def count(level, kernel, m, k, group, bits):
        arguments = [level, kernel, *map(str, (m, k, 32, group, bits))]
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
        found: dict[str, int] = {}
        for line in done.stdout.splitlines():
            address, times = line.split()
            name = mnemonics[int(address, 16)]
            found[name] = found.get(name, 0) + int(times)
        return found

    return count


@pytest.mark.parametrize("level", COUNTS)
def test_instructions_of_a_kernel_stay_what_they_were(level, counted):
    if not ops.isa_levels()[level]:
        pytest.skip(f"this CPU has no {level}: its inner loops are checked below")
    worse = []
    for case, baseline in COUNTS[level].items():
        found = sum(counted(level, *case).values())
        if found > TOLERANCE * baseline:
            worse.append(f"{case}: {found} instructions, {baseline} before")
    assert not worse, f"{level}: " + "; ".join(worse)


@pytest.mark.parametrize("level", COUNTS.keys() & DOTS)
def test_no_product_is_computed_twice(level, counted):
    """As many dot products as the product has, not one more."""
    if not ops.isa_levels()[level]:
        pytest.skip(f"this CPU has no {level}: its inner loops are checked below")
    name, products = DOTS[level]
    for kernel, m, k, group, bits in COUNTS[level]:
        if kernel == "int8" and bits == 4:
            assert counted(level, kernel, m, k, group, bits)[name] == m * k * 32 // products


# ---- inner loops ----------------------------------------------------------------------------------------------------

DOT = re.compile(r"vpdpbusd|vpmaddubsw|vdpbf16ps|tdpb")


def inner_loops(code):
    """[instructions] of each loop with dot products and without another such loop inside."""
    index = {address: i for i, (address, _, _) in enumerate(code)}
    dots = [i for i, (_, name, _) in enumerate(code) if DOT.match(name)]
    spans = set()
    for i, (_, name, operands) in enumerate(code):
        target = re.match(r"[0-9a-f]+", operands) if name.startswith("j") else None
        begin = index.get(int(target[0], 16)) if target else None
        if begin is not None and begin <= i and any(begin <= dot <= i for dot in dots):
            spans.add((begin, i))
    return [
        code[b : e + 1] for b, e in spans if not any((b, e) != (b2, e2) and b <= b2 and e2 <= e for b2, e2 in spans)
    ]


def spills(loop):
    """Loads and stores of vectors on the stack."""
    return [
        f"{name} {operands}" for _, name, operands in loop if re.search(r"\(%r[sb]p", operands) and "mm" in operands
    ]


# What one dot product may cost in an inner loop at most, all instructions counted; loops of one row read and split a
# vector of codes for each pair.
LONGEST = {"avx2": 10.5, "avx_vnni": 7.0, "avx512": 8.0, "amx": 16.0}


@pytest.mark.parametrize("level", ["avx2", "avx_vnni", "avx512", "amx"])
def test_inner_loops_have_no_spills(level):
    """Sums stay in registers. Except in what intrinsics do with 16 of them: there the counts above are the guard.

    Attention of few rows transposes keys between its products, so its loops have no length per product; of four rows
    GCC 12 stores and loads one word of eight keys.
    """
    few_rows = ("attention_with<", "all_blocks<", "few_rows<", "direct_scores<", "direct_values<")
    few_registers = ("row_i8", "(cpullm::Codes)2") if level in ("avx2", "avx_vnni") else ()
    loops, bad = 0, []
    for name, code in objdump(OBJECTS / f"{level}.o").items():
        for loop in inner_loops(code):
            loops += 1
            dots = sum(bool(DOT.match(mnemonic)) for _, mnemonic, _ in loop)
            spilled = [] if any(word in name for word in few_registers) else spills(loop)
            attends = level == "avx512" and any(word in name for word in few_rows)
            if len(spilled) > (2 if attends else 0):
                bad.append(f"{name[:90]}: {len(spilled)} of {len(loop)}: {spilled[0]}")
            if len(loop) > LONGEST[level] * dots and "unpack" not in name and not attends:
                bad.append(f"{name[:90]}: {len(loop)} instructions for {dots} dot products")
    assert loops > 5
    assert not bad, "\n".join(bad)


def test_sums_of_a_full_tile_are_all_in_registers():
    """avx512: 5 rows x 32 columns, eight steps: 80 dot products, beside them 5 broadcasts and 8 others a step."""
    found = [
        len(loop)
        for code in objdump(OBJECTS / "avx512.o").values()
        for loop in inner_loops(code)
        if sum(mnemonic == "vpdpbusd" for _, mnemonic, _ in loop) == 80
    ]
    assert found
    assert max(found) <= 80 + 8 * 13 + 4
