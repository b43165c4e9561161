"""What became of every module of an optimised model."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field

from torch import nn

from . import ops
from .layer import layer_levels
from .linear import Packed, PackedLinear, PackedModule, entry, has_adapter
from .packing import PackedStack


@dataclass(frozen=True)
class Row:
    """One weight. kind: linear, embedding, experts or parameter; state: int4, int8 or float; bytes without biases."""

    name: str
    kind: str
    state: str
    reason: str
    bits: int | None
    group_size: int | None
    compute: str | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer. level: "one op" or "per-linear ops"; reason: why it is not one op."""

    name: str
    level: str
    reason: str


@dataclass
class Report:
    """Rows in module order, and the kernels' instruction set. ``str(report)`` is a table; layers alike share a line.

    layers: how each decoder layer runs, empty where nobody has looked.
    """

    rows: list[Row] = field(default_factory=list)
    isa: str = ""
    layers: list[LayerRow] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed weights in the model's dtype."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all listed weights as they are now; a shared weight counts once."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def left_in_float(self) -> list[Row]:
        """Weight matrices that stay in float: not those that the settings exclude, adapters' own and lookup tables.

        Nor do the routers of experts count that are packed or excluded.
        """
        left = [row for row in self.rows if row.state == "float" and row.kind != "embedding"]
        return [row for row in left if row.reason not in (EXCLUDED, ROUTER, ADAPTER)]

    def __str__(self) -> str:
        merged: dict[tuple, list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
            merged.setdefault((pattern, row.state, row.reason, row.bits, row.group_size, row.compute), []).append(row)
        lines = [
            f"{'module':<44} {'count':>5} {'state':<6} {'group':>5} {'compute':<7} {'MB before':>9} {'MB after':>9}"
        ]
        for (pattern, state, reason, _, group, compute), rows in merged.items():
            before, after = (sum(getattr(row, name) for row in rows) / 1e6 for name in ("bytes_before", "bytes_after"))
            name = pattern if len(pattern) <= 44 else "…" + pattern[-43:]
            lines.append(
                f"{name:<44} {len(rows):>5} {state:<6} {group or '':>5} {compute or '':<7} {before:>9.2f} {after:>9.2f}"
            )
            if reason:
                lines.append(f"    {reason}")
        quantised = sum(row.state != "float" for row in self.rows)
        lines.append(
            f"{quantised} of {len(self.rows)} modules quantised, {self.bytes_before / 1e6:.1f} MB -> "
            f"{self.bytes_after / 1e6:.1f} MB, kernels: {self.isa}"
        )
        return "\n".join([*lines, *self._layer_lines()])

    def _layer_lines(self) -> list[str]:
        """How the decoder layers run, those alike in one line."""
        merged: dict[tuple[str, str, str], int] = {}
        for row in self.layers:
            key = re.sub(r"\.\d+(?=\.|$)", ".*", row.name), row.level, row.reason
            merged[key] = merged.get(key, 0) + 1
        lines = []
        for (pattern, level, reason), count in merged.items():
            text = f"decoder layers {pattern}: {count} of {len(self.layers)} as {level}" + (reason and f": {reason}")
            lines += textwrap.wrap(text, 100, subsequent_indent="    ")
        return lines


EXCLUDED = "excluded by modules_to_not_convert or head_bits"
ROUTER = "router of a mixture of experts: small, and a rounding could choose another expert"
ADAPTER = "an adapter's own"


def optimised(model: nn.Module) -> nn.Module:
    """The module inside ``model`` that optimize() has seen, or ``model``: adapters and wrappers stand around it."""
    return next((module for module in model.modules() if "_cpullm_settings" in module.__dict__), model)


def of_adapters(model: nn.Module) -> set[str]:
    """Names of the modules by which adapters add to their base layers."""
    around = [name + "." for name, module in model.named_modules() if has_adapter(module)]
    return {
        name
        for name, _ in model.named_modules()
        for start in around
        if name.startswith(start) and not f"{name}.".startswith(start + "base_layer.")
    }


def report(model: nn.Module) -> Report:
    """One row per weight of ``model``, read off the model as it is now: swapped or not, and why not.

    Of a model inside a wrapper (a PeftModel), the names are those inside.
    """
    model = optimised(model)
    return report_with(model, getattr(model, "_cpullm_skipped", {}))


def report_with(model: nn.Module, reasons: dict[str, str]) -> Report:
    """:func:`report` with these reasons, by module name, for what stays in float."""
    rows = []
    seen: set[int] = set()
    adapters = of_adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for key, packed in module.weights().items():
                first = id(packed) not in seen
                seen.add(id(packed))
                rows.append(_packed_row(entry(name, key), module, packed, first))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            first = id(parameter) not in seen
            seen.add(id(parameter))
            size = parameter.nbytes if first else 0
            full = entry(name, key)
            kind = "embedding" if isinstance(module, nn.Embedding) else "linear" if key == "weight" else "parameter"
            reason = (
                ADAPTER if name in adapters else _recorded(name, reasons) or _why_float(module, kind, parameter.dim())
            )
            rows.append(Row(full, kind, "float", reason, None, None, None, size, size))
    return Report(rows, ops.isa(), [LayerRow(*level) for level in layer_levels(model)])


def _packed_row(name: str, module: PackedModule, packed: Packed, first: bool) -> Row:
    """first: whether no module before has this weight."""
    if isinstance(packed, PackedStack):
        kind, form, count = "experts", packed.whole, packed.count
    else:
        kind, form, count = "linear" if isinstance(module, PackedLinear) else "embedding", packed, 1
    return Row(
        name,
        kind,
        f"int{form.bits}",
        "" if first else "shares its packed weight with an earlier module",
        form.bits,
        form.group_size,
        module.compute,
        count * packed.n * packed.k * module.dtype.itemsize if first else 0,
        packed.nbytes if first else 0,
    )


def _recorded(name: str, reasons: dict[str, str]) -> str:
    """The reason of the module of this name or of the nearest module around it."""
    while name not in reasons and name:
        name = name.rpartition(".")[0]
    return reasons.get(name, "")


def _why_float(module: nn.Module, kind: str, dims: int) -> str:
    if isinstance(module, nn.Linear):
        return "not optimised"
    if kind == "embedding":
        return "lookup table, not the model's input embedding"
    if dims > 2:
        return f"{dims}-D parameter (experts, convolutions): no packed kernel for it"
    return "not a linear layer"
