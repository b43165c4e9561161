"""cpullm::experts given arguments that are wrong, and as torch sees it: each is an error that names the argument, or
the result is right; no index or size is followed unchecked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_stacks import Shape, call, stacks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops_fuzz import DTYPES, INTS, MUTATIONS, is_packed

from torch_cpullm import ops, reference
from torch_cpullm.packing import round_up

experts = torch.ops.cpullm.experts.default
HIDDEN, INTERMEDIATE, COUNT, TOP_K, GROUP = 80, 44, 5, 3, 64
NUMBERS = ("experts", "hidden", "intermediate", "gate_up_group", "down_group", "compute")
TENSORS = ("x", "index", "weights", "gate_up_codes", "gate_up_scales", "gate_up_zeros")
TENSORS += ("down_codes", "down_scales", "down_zeros")
FORMS = [("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]


def base(form: str = "zero", bits: int = 4, tokens: int = 3) -> dict[str, Any]:
    """Arguments of a valid call, by name, in the order of the schema."""
    shape = Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE, GROUP, form, bits)
    gate_up, down = stacks(shape)
    x, index, weights = call(shape, tokens)
    tensors = (x, index, weights, *gate_up.whole.tensors, *down.whole.tensors)
    numbers = (COUNT, HIDDEN, INTERMEDIATE, gate_up.whole.group, down.whole.group, "silu", 0)
    names = (*TENSORS, *NUMBERS[:-1], "act", "compute")
    return dict(zip(names, (*tensors, *numbers), strict=True))


def refused(change: dict[str, Any], text: str) -> None:
    arguments = {**base(), **change}
    with pytest.raises(RuntimeError, match=text):
        experts(*arguments.values())


@pytest.mark.parametrize("bad", [-1, COUNT, COUNT + 1, 2**31 - 1, -(2**31), 2**40, -(2**63)])
@pytest.mark.parametrize("at", [(0, 0), (1, 2), (2, 1)])
def test_an_index_that_is_no_expert(bad: int, at: tuple[int, int]) -> None:
    for dtype in (torch.int64, torch.int32) if abs(bad) < 2**31 else (torch.int64,):
        index = base()["index"].to(dtype)
        index[at] = bad
        refused({"index": index}, rf"cpullm::experts: index\[{at[0]}, {at[1]}\] = {bad} is outside \[0, {COUNT}\)")


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("x", lambda x: x[0], r"x must be a CPU tensor \[tokens, hidden = 80\], got \[80\]"),
        ("x", lambda x: x[:, :0], r"x must be a CPU tensor \[tokens, hidden = 80\], got \[3, 0\]"),
        ("x", lambda x: x[:, :79], r"x must be a CPU tensor \[tokens, hidden = 80\], got \[3, 79\]"),
        ("x", lambda x: x.double(), "x must be float32, bfloat16 or float16"),
        ("index", lambda t: t[:2], r"index must be an int64 or int32 CPU tensor \[3, top_k\], got \[2, 3\]"),
        ("index", lambda t: t[:, :0], "index must be an int64 or int32"),
        ("index", lambda t: t.float(), "index must be an int64 or int32"),
        ("index", lambda t: t.to(torch.int16), "index must be an int64 or int32"),
        ("weights", lambda t: t[:, :2], r"weights must be a CPU tensor of index's shape \[3, 3\], got \[3, 2\]"),
        ("weights", lambda t: t.long(), "weights must be float32, bfloat16 or float16"),
        ("gate_up_codes", lambda t: t[:1].contiguous(), r"experts: gate_up: codes must have shape \[15, 24, 64\]"),
        ("gate_up_scales", lambda t: t.float(), "experts: gate_up: scales must be float16 or bfloat16"),
        ("gate_up_zeros", lambda t: t[:, :1], "experts: gate_up: zeros must have shape"),
        ("down_codes", lambda t: t.transpose(0, 1), "experts: down: codes must have shape"),
        ("down_codes", lambda t: t.to(torch.int8), "experts: down: codes must be uint8"),
        ("down_zeros", lambda t: t.bfloat16(), "experts: down: zeros must be uint8"),
        ("experts", lambda _: 0, r"experts must lie in \[1, "),
        ("experts", lambda _: 4, "gate_up: codes must have shape"),
        ("hidden", lambda _: 79, r"x must be a CPU tensor \[tokens, hidden = 79\], got \[3, 80\]"),
        ("intermediate", lambda _: 0, r"intermediate must lie in \[1, "),
        ("intermediate", lambda _: 2**62, r"intermediate must lie in \[1, "),
        ("gate_up_group", lambda _: 48, "gate_up: group_size must be a positive multiple of 32"),
        ("down_group", lambda _: 0, "down: group_size must be a positive multiple of 32"),
        ("act", lambda _: "tanh", "act must be 'silu', 'gelu', 'gelu_tanh' or 'relu', got 'tanh'"),
        ("compute", lambda _: 3, r"compute must be 0 \(int8\), 1 \(fp32\) or 2 \(bf16\), got 3"),
    ],
)
def test_what_is_refused(name: str, change: Callable[[Any], Any], text: str) -> None:
    refused({name: change(base()[name])}, "cpullm::experts: (" + text.removeprefix("experts: ") + ")")


def is_experts(a: dict[str, Any]) -> bool:
    """The contract, written down a second time, from the schema's description alone."""
    x, index, weights = a["x"], a["index"], a["weights"]
    count, width = a["experts"], a["intermediate"]
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.shape[1]:
        return False
    if x.shape[1] != a["hidden"]:
        return False
    if index.dim() != 2 or index.shape[0] != x.shape[0] or not index.shape[1]:
        return False
    if index.dtype not in (torch.int64, torch.int32) or bool(((index < 0) | (index >= count)).any()):
        return False
    if weights.shape != index.shape or weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if not 0 < count <= 2**20 or not 0 < width <= 2**24 or a["compute"] not in (0, 1, 2):
        return False
    matrices = (
        ("gate_up", count * round_up(2 * width, 32), x.shape[1]),
        ("down", count * round_up(x.shape[1], 32), width),
    )
    return all(
        is_packed(a[f"{m}_codes"], a[f"{m}_scales"], a[f"{m}_zeros"], n, k, a[f"{m}_group"]) for m, n, k in matrices
    )


@st.composite
def mutated(draw: Any) -> tuple[str, Callable[[Any], Any]]:
    """(argument, function of its value) that may or may not make the call wrong."""
    name = draw(st.sampled_from((*TENSORS, *NUMBERS)))
    if name in NUMBERS:
        value = draw(
            st.sampled_from((*INTS, COUNT - 1, COUNT + 1, INTERMEDIATE + 1)) | st.integers(-(2**63), 2**63 - 1)
        )
        return name, lambda _: value
    how = draw(st.sampled_from((*MUTATIONS, "dtype", "none", "fill")))
    at, dtype = draw(st.integers(0, 2)), draw(st.sampled_from(DTYPES))
    fill = draw(st.sampled_from((-1, COUNT - 1, COUNT, 2**31, -(2**63))))

    def change(tensor: Any) -> Any:
        if tensor is None:
            return torch.zeros(2, 3, 32, dtype=dtype)
        if how == "none":
            return None if name.endswith("zeros") else tensor
        if tensor.dim() == 0 or tensor.numel() > 2**20:
            return tensor
        if how == "dtype":
            return tensor.to(dtype)
        if how == "fill":
            if name != "index" or tensor.dtype != torch.int64 or not tensor.numel():
                return tensor
            copy = tensor.clone()
            copy.flatten()[at % tensor.numel()] = fill
            return copy
        return MUTATIONS[how](tensor, at % tensor.dim())

    return name, change


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FORMS), st.lists(mutated(), min_size=1, max_size=2))
def test_any_arguments(form: tuple[str, int], mutations: list[tuple[str, Callable[[Any], Any]]]) -> None:
    arguments = base(*form)
    for name, change in mutations:
        arguments[name] = change(arguments[name])
    if any(arguments[name] is not None and arguments[name].numel() > 2**20 for name in TENSORS):
        return  # rows repeated without memory: a valid call would be one of gigabytes
    if not is_experts(arguments):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            experts(*arguments.values())
        assert "cpullm::experts" in str(caught.value)
        assert "Traceback" not in str(caught.value)
        return
    y = experts(*arguments.values())
    assert (y.shape, y.dtype) == (arguments["x"].shape, arguments["x"].dtype)
    changed = {name for name, _ in mutations}
    if changed <= {"x", "index", "weights"} and y.numel():
        gate_up, down = stacks(Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE, GROUP, *form))
        x, index, weights = (arguments[name] for name in TENSORS[:3])
        want = reference.experts(x, index, weights, gate_up, down)
        error = (y.double() - want).norm(dim=1) / want.norm(dim=1)
        assert float(error.max()) <= (2e-2 if x.dtype == torch.bfloat16 else 4e-3)


def test_opcheck() -> None:
    for form in FORMS:
        torch.library.opcheck(experts, tuple(base(*form).values()))


def test_a_tensor_on_meta_invents_no_result() -> None:
    arguments = base()
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    y = experts(*meta.values())
    assert (y.shape, y.dtype, y.device.type) == ((3, HIDDEN), torch.float32, "meta")
    with pytest.raises(RuntimeError, match="cpullm::experts: all tensors must be CPU tensors, got x on meta"):
        experts(*{**arguments, "x": meta["x"]}.values())
    with pytest.raises(RuntimeError, match="cpullm::experts: x must be"):
        experts(*{**meta, "x": meta["x"][0]}.values())


def test_in_a_compiled_graph() -> None:
    gate_up, down = stacks(Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE))
    x, index, weights = call(Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE), 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        return 2 * ops.experts(x, index, weights, gate_up, down)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


def test_compute_by_name() -> None:
    gate_up, down = stacks(Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE))
    with pytest.raises(ValueError, match="compute must be one of"):
        ops.experts(*call(Shape("", COUNT, TOP_K, HIDDEN, INTERMEDIATE), 1), gate_up, down, compute="int4")
