"""LoRA repair: what the groups cost gets less, and nothing of the adapters is left."""

import pytest
import torch
from test_cqil import IDS, grouped, llama, logits

import torch_cpullm
from torch_cpullm import cqil
from torch_cpullm.cqil_repair import repair

PAIRS = [(1, 2), (3, 2)]


@pytest.mark.parametrize(("mode", "bypass"), [("cqil", 0), ("cqil", 1), ("lp", 0)])
def test_repair(mode, bypass):
    model = llama()
    with torch.no_grad():
        teacher = logits(model).log_softmax(-1)
    names = list(model.state_dict())
    kept = {name: value.clone() for name, value in model.state_dict().items() if "proj" not in name}
    model.model.norm.requires_grad_(False)
    grouped(model, PAIRS, mode, bypass)
    losses = []
    assert repair(model, IDS, steps=30, rank=8, learning_rate=5e-3, progress=lambda i, x: losses.append(x)) is model
    assert losses[-1] < 0.7 * losses[0]
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers"}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert cqil.saved_plan(model) == cqil.Plan.of(model, PAIRS, mode, bypass)
    with torch.no_grad():
        after = torch.nn.functional.kl_div(logits(model).log_softmax(-1), teacher, log_target=True, reduction="sum")
        assert float(after) / IDS.numel() < 0.7 * losses[0]
    torch_cpullm.optimize(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("mode", ["skip", "skip_attention"])
def test_repair_of_skipping(mode):
    """What is skipped learns nothing, and comes back as it was."""
    model = llama()
    plan = cqil.baseline(model, mode, 2)
    skipped = [layer for first, size in plan.groups for layer in model.model.layers[first : first + size]]
    parts = [layer if mode == "skip" else layer.self_attn for layer in skipped]
    kept = [[parameter.clone() for parameter in part.parameters()] for part in parts]
    losses = []
    cqil.apply(model, plan)
    repair(model, IDS, steps=20, rank=8, learning_rate=5e-3, progress=lambda i, x: losses.append(x))
    assert losses[-1] < 0.7 * losses[0]
    for part, own in zip(parts, kept, strict=True):
        assert all(map(torch.equal, part.parameters(), own))


def test_what_cannot_be_repaired():
    model = llama()
    with pytest.raises(ValueError, match="no groups to repair"):
        repair(model, IDS)
    grouped(model, PAIRS)
    for tokens in (IDS[0], IDS.float(), IDS[:0], [[1]]):
        with pytest.raises(ValueError, match="tokens must be int64"):
            repair(model, tokens)
    for options in ({"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            repair(model, IDS, **options)
    with pytest.raises(ValueError, match="packed weights cannot be trained"):
        repair(torch_cpullm.optimize(model), IDS)
