"""autotune: a target that is reached, one that is not, mixed precision, reports, and what users get wrong."""

import json
import logging

import pytest
import torch
from small_models import llama
from test_layerwise import logits, loss_of, same, snapshot, tokens

import torch_cpullm
from torch_cpullm import tuning
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.layerwise import Method
from torch_cpullm.linear import PackedLinear
from torch_cpullm.sensitivity import Unit, allocate, gradient_squares, sensitivities, stored_bits
from torch_cpullm.trial import forms_of

FP32 = Settings(compute="fp32")
FEW = {"sequences": 4, "length": 16, "config": FP32, "progress": False}
SHORT = (Method("rtn"), Method("gptq"), Method("gptq", epochs=1))


def measure_against(model):
    """An eval function: 1 plus the mean squared change of some logits."""
    ids = tokens(model, 2, 24, seed=7)
    reference = logits(model, ids)
    return lambda tried: 1 + loss_of(tried, reference, ids)


def test_a_reachable_target_stops_at_the_first_method(tmp_path):
    model = llama()
    tuned = torch_cpullm.autotune(model, None, 0.5, measure_against(model), **FEW)
    assert tuned.met
    assert tuned.model is model
    assert [step.name for step in tuned.steps] == ["RTN"]
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert tuned.steps[0].bits == pytest.approx(torch_cpullm_bits(model), abs=1e-9)
    written = tuned.save(tmp_path)
    assert [path.name for path in written] == ["autotune.json", "autotune.md", "autotune.png"]
    assert json.loads(written[0].read_text())["met"] is True
    assert "within the target of 50 %" in written[1].read_text()
    assert written[2].read_bytes().startswith(b"\x89PNG")


def torch_cpullm_bits(model):
    head = model.get_output_embeddings()
    packed = [m.packed for m in model.modules() if isinstance(m, PackedLinear) and m is not head]
    return 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)


def test_an_unreachable_target_keeps_the_best_and_says_so(caplog):
    model = llama()
    with caplog.at_level(logging.WARNING, "torch_cpullm"):
        tuned = torch_cpullm.autotune(model, None, 0.0, measure_against(model), methods=SHORT, budget_bits=5.5, **FEW)
    assert not tuned.met
    names = ["RTN", "GPTQ", "GPTQ + distilled x1", "GPTQ + distilled x1, mixed to 5.5"]
    assert [step.name for step in tuned.steps] == names
    assert tuned.best.change == min(step.change for step in tuned.steps) > 0
    assert all(step.bits <= 5.5 for step in tuned.steps)
    assert "no method met the target" in caplog.text
    assert "MISSED" in str(tuned)
    assert "MISSED" in tuned.markdown()


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({5.5: 0.015, 9.0: 0.005}, [5.5, 6]),
        ({8.3: 1000.0, 9.0: 0.5}, [8.5]),  # hopeless in between
        ({9.0: 0.011}, [5.5, 6, 6.5, 7, 7.5, 8.5]),
    ],
)
def test_mixtures_grow_until_the_target_is_met(monkeypatch, tmp_path, changes, tried):
    """The measure is a function of the size alone. The model's own form is beyond 5 bits: its MLPs are padded."""
    calls = []
    monkeypatch.setattr(tuning, "sensitivities", lambda *a, **k: calls.append(1) or sensitivities(*a, **k))

    def measure(model):
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            return 1.0
        return 1 + next(change for size, change in changes.items() if torch_cpullm_bits(model) <= size)

    options = {**FEW, "methods": (Method("gptq"),), "budget_bits": 8.5, "folder": tmp_path}
    tuned = torch_cpullm.autotune(llama(), None, 0.01, measure, **options)
    assert [step.name for step in tuned.steps] == ["GPTQ", *(f"GPTQ, mixed to {bits:g}" for bits in tried)]
    assert len(calls) == 1
    sizes = [step.bits for step in tuned.steps[1:]]
    assert sizes == sorted(set(sizes))
    assert all(size <= bits for size, bits in zip(sizes, tried, strict=True))
    assert tuned.met is (tuned.steps[-1].change <= 0.01)
    assert tuned.best.change == min(step.change for step in tuned.steps)
    assert torch_cpullm_bits(tuned.model) == pytest.approx(tuned.best.bits)


def test_codes_learn_where_there_are_many_sequences(monkeypatch):
    monkeypatch.setattr(tuning, "LADDER", (Method("rtn"),))
    for many, names in ((5, ["RTN"]), (4, ["RTN", "AWQ + GPTQ + refined x2 + distilled x2, codes too"])):
        model = llama()
        monkeypatch.setattr(tuning, "MANY", many)
        tuned = torch_cpullm.autotune(model, None, 0.0, measure_against(model), budget_bits=4.75, **FEW)
        assert [step.name for step in tuned.steps if "mixed" not in step.name] == names


def test_the_same_seed_gives_the_same_model():
    results = [torch_cpullm.autotune(llama(), None, 0.0, methods=(Method("gptq"),), **FEW) for _ in range(2)]
    first, second = ([step.value for step in tuned.steps] for tuned in results)
    assert first == second
    a, b = (tuned.model.model.layers[1].mlp.down_proj.packed for tuned in results)
    assert torch.equal(a.codes, b.codes)
    assert "text the float model generated" in results[0].measure


def test_a_higher_measure_may_be_the_better():
    model = llama()
    measure = measure_against(model)
    tuned = torch_cpullm.autotune(
        model, None, 0.9, lambda tried: 2 - measure(tried), higher_is_better=True, methods=SHORT, **FEW
    )
    assert tuned.baseline == 1
    assert tuned.steps[0].change > 0


@pytest.mark.parametrize(
    ("answer", "text"),
    [(None, "got None"), ("good", "got 'good'"), (float("nan"), "got nan"), (True, "got True"), (0.0, "measure is 0")],
)
def test_nonsense_of_the_eval_function(answer, text):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        torch_cpullm.autotune(model, None, 0.1, lambda tried: answer, **FEW)
    assert same(model, before)


def test_what_goes_wrong_later_leaves_the_float_model_alone():
    model = llama()
    before, calls = snapshot(model), []

    def fails(tried):
        calls.append(tried)
        if len(calls) == 3:
            raise RuntimeError("the user's own")
        return float(len(calls))

    with pytest.raises(RuntimeError, match="the user's own"):
        torch_cpullm.autotune(model, None, 0.0, fails, methods=SHORT, **FEW)
    assert same(model, before)
    assert calls[0] is model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_arguments():
    model = llama()
    for options, text in (
        ({"target": -1}, "target must be a number of at least 0"),
        ({"budget_bits": 4.0}, r"budget_bits=4 is below what the smallest 4-bit form"),
        ({"methods": ()}, "methods must be one or more"),
        ({"config": Settings(bits=8)}, "with bits=8 call optimize"),
        ({"eval": "a text"}, "a text needs the tokenizer"),
        ({"eval": torch.tensor([1, 2])}, "has 2 tokens, too few"),
        ({"eval": torch.tensor([1, 96, 2, 3, 4])}, r"must lie in 0\.\.95"),
    ):
        with pytest.raises(ValueError, match=text):
            torch_cpullm.autotune(model, None, **{**FEW, **options})
    with pytest.raises(TypeError, match="eval must be a function, a text, a path or token ids, got int"):
        torch_cpullm.autotune(model, None, eval=5, **FEW)
    with pytest.raises(ValueError, match="needs the float model"):
        torch_cpullm.autotune(torch_cpullm.optimize(model, FP32), None, **FEW)


def test_the_command_saves_model_and_report(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    from torch_cpullm import cli, runner

    class Words:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(runner, "find_model", lambda spec, option: tmp_path)
    monkeypatch.setattr(runner, "load_float", lambda path: (llama(), Words()))
    monkeypatch.setattr(runner, "quiet_libraries", lambda debug: None)
    out = tmp_path / "out"
    command = ["autotune", "model", str(out), "--target", "5", "--length", "8", "--compute", "fp32"]
    assert cli.main(command) == 0
    assert "within the target of 500 %" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json", "autotune.json"} <= {p.name for p in out.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(again.model.layers[0].mlp.up_proj, PackedLinear)
    assert cli.main([*command, "--eval", str(tmp_path / "nothing.txt")]) == 2
    assert "no such file" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["autotune", "nowhere", str(out)]) == 2
    assert "MODEL nowhere: no such file or directory" in capsys.readouterr().err


# ---- mixed precision ------------------------------------------------------------------------------------------------

CHOICES = [Form(4, 64, "point", "float16"), Form(4, 32, "point", "float16"), Form(8, 32, "none", "float16")]


def test_sensitivities_foretell_kl():
    """Estimates against the KL measured when one unit alone is rounded, in order and in size."""
    from torch_cpullm.folding import matrix
    from torch_cpullm.layerwise import quantize
    from torch_cpullm.packing import dequantize
    from torch_cpullm.quality import evaluate
    from torch_cpullm.quant import Statistics

    model = llama().eval()
    ids = tokens(model, 8, 32)
    names = [name for name in forms_of(model, FP32) if "layers" in name]
    units = sensitivities(model, ids, names, CHOICES, progress=False)
    assert sorted(name for unit in units for name in unit.names) == sorted(names)
    assert {len(unit.names) for unit in units} == {1, 2, 3}, "o and down; gate and up; q, k and v"
    assert all(parameter.requires_grad for parameter in model.parameters())
    estimated, measured = [], []
    for unit in units:
        changed = llama().eval()
        for name in unit.names:
            weight = matrix(changed.get_submodule(name))
            inputs = Statistics.empty(weight.shape[1]).with_rows(torch.eye(weight.shape[1]))
            weight.copy_(dequantize(quantize(weight, inputs, CHOICES[0], Method("clip"))))
        measured.append(evaluate(changed, ids.flatten(), window=32, reference=model).kl)
        estimated.append(unit.kl[0])
        assert unit.kl[2] < unit.kl[0]
        assert unit.bits[0] < unit.bits[1] < unit.bits[2]
    ratio = sum(estimated) / sum(measured)
    assert 0.3 < ratio < 3
    assert torch.corrcoef(torch.tensor([estimated, measured]))[0, 1] > 0.5


def test_gradients_are_of_every_linear():
    model = llama().eval()
    names = ["model.layers.0.self_attn.q_proj", "lm_head"]
    found = gradient_squares(model, names, tokens(model))
    assert [found[name].shape for name in names] == [(64,), (96,)]
    assert all(bool((value > 0).all()) for value in found.values())


def test_bits_go_where_they_save_most():
    units = [
        Unit(("a.q", "a.k"), 100, (400, 450, 800), (1.0, 0.9, 0.1)),
        Unit(("a.o",), 100, (400, 450, 800), (5.0, 1.0, 0.5)),
    ]
    assert allocate(units, CHOICES, 4.0) == {"a.q": CHOICES[0], "a.k": CHOICES[0], "a.o": CHOICES[0]}
    assert allocate(units, CHOICES, 4.3)["a.o"] is CHOICES[1]
    assert allocate(units, CHOICES, 4.3)["a.q"] is CHOICES[0]
    assert set(allocate(units, CHOICES, 8.0).values()) == {CHOICES[2]}
    with pytest.raises(ValueError, match=r"budget_bits=3.9 cannot be met: the smallest forms need 4.000 bits"):
        allocate(units, CHOICES, 3.9)


def test_stored_bits_are_those_of_the_packed_weight():
    from torch_cpullm.packing import pack
    from torch_cpullm.quant import quantize_rtn

    for form in CHOICES:
        packed = pack(quantize_rtn(torch.randn(70, 100), form.bits, form.group_size, form.zeros == "none"))
        assert stored_bits(form, 70, 100) == 8 * packed.nbytes
