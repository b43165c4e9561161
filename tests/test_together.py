"""Features that meet: experts, formats, overrides, calibration and adapters in one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from small_models import llama
from test_layerwise import tokens

import torch_cpullm
from torch_cpullm import cli, cli_quantize, cqil, runner
from torch_cpullm.calibrated import Calibrated
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.convert import convert
from torch_cpullm.experts import PackedExperts
from torch_cpullm.layerwise import Method, calibrate
from torch_cpullm.linear import PackedLinear
from torch_cpullm.trial import apply, forms_of, settings_of

BY_NAME = {family.name: family for family in FAMILIES}
UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(model, 1, 9, seed=3)).logits


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_convert_frees_and_keeps_experts(name: str, tmp_path: Path) -> None:
    BY_NAME[name].build().save_pretrained(tmp_path / "float")
    report = convert(tmp_path / "float", tmp_path / "packed")
    assert any(row.kind == "experts" for row in report.rows)
    loaded = [torch_cpullm.load(tmp_path / kind)[0] for kind in ("float", "packed")]
    assert any(isinstance(module, PackedExperts) for module in loaded[1].modules())
    assert torch.equal(*map(logits, loaded))


def test_overrides_of_experts(tmp_path: Path) -> None:
    """One recipe for all experts of a layer, by the module's name; saved, loaded, and by both ways to quantise."""
    settings = Settings(overrides={r"model\.layers\.0\..*experts": {"bits": 8}})
    model = BY_NAME["mixtral"].build()
    model.save_pretrained(tmp_path / "float")
    torch_cpullm.optimize(model, settings)
    bits = [module.down.whole.bits for module in model.modules() if isinstance(module, PackedExperts)]
    assert bits == [8] + [4] * (len(bits) - 1)
    loaded = torch_cpullm.load(tmp_path / "float", config=settings)[0]
    model.save_pretrained(tmp_path / "packed")
    again = torch_cpullm.load(tmp_path / "packed")[0]
    assert again._cpullm_settings.same_as(settings)
    assert torch.equal(logits(model), logits(loaded))
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ValueError, match="matches no module"):
        torch_cpullm.optimize(BY_NAME["mixtral"].build(), Settings(overrides={"gate_up_proj": {"bits": 8}}))


def test_mixed_forms_are_overrides(tmp_path: Path) -> None:
    """What calibration mixes, the settings of the model say, beside the overrides that were asked for."""
    model = llama()
    asked = Settings(overrides={"o_proj": {"group_size": 64}})
    forms = forms_of(model, asked)
    assert {forms[name].group_size for name in forms if name.endswith("o_proj")} == {64}
    forms.update({name: Form(8, 32, "none", "float16") for name in (UP, GATE)})
    settings = settings_of(model, forms, asked)
    assert settings.overrides == {
        **{name: {"bits": 8, "group_size": 32, "sym": True} for name in (GATE, UP)},
        **(asked.overrides or {}),
    }
    plain = torch_cpullm.optimize(copy.deepcopy(model), settings)
    found = calibrate(model, tokens(model, 2, 8), forms, Method("rtn"), progress=False)
    apply(model, found, settings)
    assert model.get_submodule(UP).packed.bits == 8
    assert torch.equal(logits(plain), logits(model))
    model.save_pretrained(tmp_path)
    assert torch_cpullm.load(tmp_path)[0]._cpullm_settings.same_as(settings)
    assert settings_of(llama(), forms_of(llama(), asked), asked) is asked


def test_autotune_of_a_mixture() -> None:
    model = BY_NAME["mixtral"].build()
    few: dict[str, Any] = {"sequences": 2, "length": 8, "methods": (Method("gptq"),)}
    few |= {"budget_bits": 9.0, "progress": False}
    tuned = torch_cpullm.autotune(model, None, 1e9, lambda tried: float(logits(tried).square().mean()), **few)
    assert tuned.met
    kinds = {type(module) for module in model.modules()}
    assert {PackedExperts, PackedLinear} <= kinds
    assert torch.isfinite(logits(model)).all()
    packed = [m for m in model.modules() if isinstance(m, PackedExperts)]
    linears = [m.packed for m in model.modules() if isinstance(m, PackedLinear) and m is not model.lm_head]
    stored = sum(p.nbytes for p in linears) + sum(w.whole.nbytes for m in packed for w in m.weights().values())
    weights = sum(p.n * p.k for p in linears) + sum(w.count * w.n * w.k for m in packed for w in m.weights().values())
    assert tuned.steps[0].bits == pytest.approx(8 * stored / weights)
    assert tuned.steps[0].forms["INT4 g32 zero points (experts, rounded to nearest)"] == len(packed)
    assert tuned.steps[0].bytes > stored


def test_calibrated_names_of_another_model() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"another model: no\.such is not there"):
        apply(model, Calibrated(packed={"no.such": None}), Settings())  # type: ignore[dict-item]
    assert not hasattr(model, "_cpullm_settings")


def test_quantize_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cpullm quantize --auto` is `cpullm autotune` with the settings of quantize."""
    calls: list[Any] = []
    monkeypatch.setattr(
        cli_quantize, "tune", lambda *given, argument, **options: calls.append((*given, argument)) or "found"
    )
    monkeypatch.setattr(runner, "find_model", lambda spec, option="--model": tmp_path)
    out = str(tmp_path / "out")
    options = ["--auto", "--target", "0.02", "--group-size", "64", "--sym", "--exclude", "o_proj", "--eval", "held.txt"]
    assert cli.main(["quantize", "model", out, *options]) == 0
    assert "found" in capsys.readouterr().out
    settings = {"compute": "int8", "group_size": 64, "sym": True, "modules_to_not_convert": ["o_proj"]}
    assert calls == [("model", Path(out), settings, 0.02, Path("held.txt"), None, "SRC")]
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["quantize", "model", out, "--target", "0.02"]) == 2
    assert "are for --auto" in capsys.readouterr().err


def test_autotune_never_replaces_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    for command in (["autotune"], ["quantize", "--auto"]):
        assert cli.main([*command, str(tmp_path), str(tmp_path)]) == 2
        assert "is where the source is" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_convert_keeps_a_plan(tmp_path: Path) -> None:
    """A float model with groups: converted, loaded and optimised, it computes with them."""
    model = BY_NAME["llama"].build()
    cqil.apply(model, cqil.Plan.of(model, [(0, 2)]))
    model.save_pretrained(tmp_path / "float")
    convert(tmp_path / "float", tmp_path / "packed")
    loaded = torch_cpullm.load(tmp_path / "packed")[0]
    want = logits(torch_cpullm.optimize(model))
    assert cqil.saved_plan(loaded) == cqil.saved_plan(model)
    assert torch.equal(logits(loaded), want)
    assert not torch.equal(logits(cqil.restore(loaded)), want)


def test_autotune_refuses_groups() -> None:
    model = llama()
    cqil.apply(model, cqil.Plan.of(model, [(0, 2)]))
    with pytest.raises(ValueError, match="layers are in groups"):
        torch_cpullm.autotune(model, None, progress=False)
