"""What autotune did: steps with their numbers, as JSON, Markdown and a picture of size against loss."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

log = logging.getLogger("torch_cpullm")


@dataclass(frozen=True)
class Step:
    """One recipe. value: what was measured; change: relative to the float model, positive is worse; bits: stored per
    weight of the decoder's linears; bytes: of all packed weights; seconds: to calibrate; forms: how many modules each.
    """

    name: str
    value: float
    change: float
    bits: float
    bytes: int
    seconds: float
    forms: dict[str, int]

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.4g}, {100 * self.change:+.2f} % at {self.bits:.3f} bits per weight"


@dataclass
class Tuned:
    """The result of :func:`torch_cpullm.autotune`. model: quantised; measure: what baseline, of the float model, is."""

    model: nn.Module
    target: float
    measure: str
    baseline: float
    seed: int
    steps: list[Step] = field(default_factory=list)

    @property
    def best(self) -> Step:
        """The step that ``model`` holds: the one with the least change."""
        return min(self.steps, key=lambda step: step.change)

    @property
    def met(self) -> bool:
        """Whether it is within the target."""
        return self.best.change <= self.target

    @property
    def verdict(self) -> str:
        """One sentence."""
        words = "within" if self.met else "MISSED: beyond"
        return f"{self.best}, {words} the target of {100 * self.target:g} %"

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        values = {name: getattr(self, name) for name in ("target", "met", "measure", "baseline", "seed")}
        return {**values, "best": self.best.name, "steps": [asdict(step) for step in self.steps]}

    def markdown(self) -> str:
        """A page: the verdict, and a table of the steps."""
        lines = [
            "# Quantisation found by autotune",
            "",
            f"{self.verdict[0].upper()}{self.verdict[1:]}.",
            "",
            f"Measured: {self.measure}; the float model: {self.baseline:.4g}. Seed {self.seed}.",
            "",
            "| recipe | measured | change | bits per weight | MB, all weights | seconds | forms |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]
        for step in self.steps:
            forms = ", ".join(f"{count} x {form}" for form, count in step.forms.items())
            name = f"**{step.name}**" if step is self.best else step.name
            lines.append(
                f"| {name} | {step.value:.4g} | {100 * step.change:+.2f} % | {step.bits:.3f} "
                f"| {step.bytes / 1e6:.1f} | {step.seconds:.0f} | {forms} |"
            )
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), self.verdict])

    def save(self, folder: str | Path) -> list[Path]:
        """Write autotune.json, autotune.md and, where matplotlib is installed, autotune.png; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "autotune.json", folder / "autotune.md"]
        written[0].write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        written[1].write_text(self.markdown(), encoding="utf-8")
        picture = folder / "autotune.png"
        if self._draw(picture):
            written.append(picture)
        return written

    def _draw(self, path: Path) -> bool:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.warning("no picture of the steps: pip install 'torch_cpullm[plot]' for matplotlib")
            return False
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for step in self.steps:
            axes.scatter(step.bytes / 1e6, 100 * step.change, color="tab:orange" if step is self.best else "tab:blue")
            axes.annotate(
                step.name, (step.bytes / 1e6, 100 * step.change), (5, 3), textcoords="offset points", fontsize=8
            )
        axes.axhline(100 * self.target, color="gray", linestyle="--", linewidth=1)
        axes.set_xlabel("MB of weights")
        axes.set_ylabel(f"change of {self.measure.partition(',')[0]}, %", fontsize=8)
        figure.savefig(path, dpi=120)
        return True
