"""Calibration on another device: the CPU's results where that is a device, what is not there is said."""

import pytest
import torch
from small_models import llama
from test_layerwise import same, snapshot, tokens

import torch_cpullm
from torch_cpullm import cli, runner
from torch_cpullm.calibration import self_generated
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.devices import model_on, usable
from torch_cpullm.distil import distil
from torch_cpullm.layerwise import Method, calibrate
from torch_cpullm.packing import unpack
from torch_cpullm.quality import evaluate
from torch_cpullm.sensitivity import sensitivities
from torch_cpullm.trial import apply, forms_of, twin

FP32 = Settings(compute="fp32")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MISSING = f"cuda:{torch.cuda.device_count()}"


def kl(model, found, ids):
    return evaluate(apply(twin(model), found, FP32), ids.flatten(), window=ids.shape[1], reference=model).kl


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "method",
    [Method("gptq", "awq", 2), Method("signround", "teq"), Method("clip"), Method("hqq"), Method("rtn")],
    ids=str,
)
def test_calibration(device, method):
    model = llama().eval()
    ids, before = tokens(model, 6, 24), snapshot(model)
    forms = forms_of(model, FP32)
    here = calibrate(model, ids, forms, method, progress=False)
    there = calibrate(model, ids, forms, method, device=device, progress=False)
    assert same(model, before)
    codes = [torch.cat([unpack(p).codes.flatten() for p in found.packed.values()]) for found in (here, there)]
    alike = float((codes[0] == codes[1]).float().mean())
    followed = method.rounding == "signround"  # signs of gradients: sums in another order soon go another way
    assert alike == 1 if device == "cpu" else followed or alike > 0.9
    assert all(t.device.type == "cpu" for p in there.packed.values() for t in p.tensors if t is not None)
    assert kl(model, there, ids) == pytest.approx(kl(model, here, ids), rel=0.2)


@pytest.mark.parametrize("device", DEVICES)
def test_what_needs_the_whole_model(device):
    model = llama().eval()
    ids, before = tokens(model, 6, 24), snapshot(model)
    there = model_on(model, device)
    assert (there is model) == (device == "cpu")
    assert evaluate(there, ids.flatten(), window=24).loss == pytest.approx(
        evaluate(model, ids.flatten(), window=24).loss
    )
    assert self_generated(there, 3, 8, seed=1).shape == (3, 8)
    found = calibrate(model, ids, forms_of(model, FP32), Method("gptq"), progress=False)
    for codes in (False, True):
        here, learnt = (
            distil(model, found, ids, epochs=2, codes=codes, device=d, progress=False) for d in (None, device)
        )
        assert kl(model, learnt, ids) == pytest.approx(kl(model, here, ids), rel=0.1)
        assert kl(model, learnt, ids) < kl(model, found, ids)
    choices = [Form(4, 64, "none", "float16"), Form(8, 32, "none", "float16")]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found = [sensitivities(model, ids, names, choices, device=d, progress=False) for d in (None, device)]
    for one, other in zip(*found, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=0.02)
    assert same(model, before)


@pytest.mark.parametrize("device", DEVICES)
def test_autotune(device):
    model = llama().eval()
    ids = tokens(model, 4, 16)
    options = {"calibration": ids, "eval": ids.flatten(), "target": 0.0, "sequences": 4, "progress": False}
    tuned = torch_cpullm.autotune(model, methods=[Method("gptq", epochs=1)], device=device, **options)
    assert tuned.steps[0].name == "GPTQ + distilled x1"
    assert torch_cpullm.report(model).bytes_after < torch_cpullm.report(model).bytes_before


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", "device must be a device of torch such as cpu, cuda or cuda:1, got 'gpu'"),
        (1.5, "device must be a device of torch such as cpu, cuda or cuda:1, got 1.5"),
        ("meta", "device must be one that computes, got meta"),
        (MISSING, f"device '{MISSING}' is not available: "),
    ],
)
def test_a_device_that_is_not_there(device, text):
    with pytest.raises(ValueError, match=text):
        usable(device)
    model = llama().eval()
    ids, before = tokens(model, 2, 8), snapshot(model)
    forms = forms_of(model, FP32)
    for call in (
        lambda: calibrate(model, ids, forms, Method("gptq"), device=device, progress=False),
        lambda: sensitivities(model, ids, list(forms), [Form(4, 32, "none", "float16")], device=device, progress=False),
        lambda: torch_cpullm.autotune(model, calibration=ids, eval=ids.flatten(), device=device, progress=False),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert same(model, before)


def test_the_option_of_the_commands(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(runner, "find_model", lambda spec, option="--model": tmp_path)
    monkeypatch.setattr(runner, "load_float", lambda path: (llama(), None))
    monkeypatch.setattr(runner, "quiet_libraries", lambda debug: None)
    out = str(tmp_path / "out")
    for arguments, text in (
        (["quantize", "model", out, "--auto", "--device", "gpu"], "device must be a device of torch"),
        (["autotune", "model", out, "--device", "meta"], "device must be one that computes"),
        (["quantize", "model", out, "--device", "cpu"], "--device are for --auto"),
    ):
        assert cli.main(arguments) == 2
        assert text in " ".join(capsys.readouterr().err.split())
