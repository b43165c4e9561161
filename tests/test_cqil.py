"""CQIL plans and groups on float models: the formulas, the cache, plans that do not fit, and the way back."""

import copy
import json
import pickle

import pytest
import torch
from layer_models import ALL
from small_models import assert_unchanged, state_of
from torch import nn
from transformers import AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import cqil
from torch_cpullm.layer_group import LayerGroup
from torch_cpullm.layer_match import decoders

IDS = torch.tensor([[5, 17, 3, 40, 22, 9, 31, 8, 2, 60, 11], [7, 7, 20, 33, 1, 4, 90, 14, 6, 3, 2]])
# Layers that are more than x + attention + MLP: a residual that goes into the halves, cross-attention, norms behind.
NO_SPLIT = {
    "gpt2": "not one attention",
    "mpt": "norm_1 has no known role",
    "opt": "does not compute",
}
SPLIT = sorted(set(ALL) - set(NO_SPLIT))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def llama(layers=6, **options):
    family = ALL["llama"]
    return type(family)("llama", family.config, {**family.options, "num_hidden_layers": layers, **options}).build()


def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


def layers_of(model):
    return next(decoders(model)).layers


def grouped(model, groups, mode="cqil", bypass=0):
    return cqil.apply(model, cqil.Plan.of(model, groups, mode, bypass))


def is_plain(model):
    config = next(decoders(model)).owner.config
    return not any("forward" in layer.__dict__ for layer in layers_of(model)) and not hasattr(config, cqil.CONFIG)


# ---- what a group computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPLIT)
def test_a_group_of_one_is_the_layer_bit_for_bit(name, dtype):
    if dtype != torch.float32 and name not in ("llama", "gemma2", "gpt-neox", "granite", "cohere"):
        return
    model = ALL[name].build(dtype)
    want = logits(model)
    for mode in ("cqil", "lp"):
        if mode == "lp" and cqil._groups(next(decoders(model)), cqil.Plan.of(model, [(0, 1)]))[0].halves[0].parallel:
            continue
        grouped(model, [(i, 1) for i in range(model.config.num_hidden_layers)], mode)
        assert torch.equal(logits(model), want)
        cqil.restore(model)
        assert torch.equal(logits(model), want)
        assert is_plain(model)


def naive(model, groups, mode, bypass):
    """Final hidden states of a Llama whose layers are grouped, layer by layer from its parts."""
    owner = model.model
    x = owner.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    options = {"position_embeddings": owner.rotary_emb(x, positions), "attention_mask": None}
    starts = dict(groups)
    index = 0
    while index < len(owner.layers):
        size = starts.get(index, 1)
        members = owner.layers[index : index + size]
        a = [layer.self_attn(hidden_states=layer.input_layernorm(x), **options)[0] for layer in members]
        y = x + sum(a)
        for i, layer in enumerate(members):
            seen = sum(a) if mode == "lp" else sum(a[max(0, i - bypass) : i + 1])
            y = y + layer.mlp(layer.post_attention_layernorm(x + seen))
        x, index = y, index + size
    return model.lm_head(owner.norm(x))


@pytest.mark.parametrize(
    ("groups", "mode", "bypass"),
    [
        ([(1, 2), (3, 2)], "cqil", 0),
        ([(1, 2), (3, 2)], "cqil", 1),
        ([(1, 2), (3, 2)], "lp", 0),
        ([(1, 4)], "cqil", 0),
        ([(1, 4)], "cqil", 1),
        ([(1, 4)], "cqil", 3),
        ([(0, 6)], "lp", 0),
        ([(0, 1), (2, 3)], "cqil", 0),
    ],
)
def test_groups_equal_a_naive_loop(groups, mode, bypass):
    """And with a bypass the residual gets every attention once: it is no alias of what the MLP reads."""
    model = llama()
    want = naive(model, groups, mode, bypass)
    plain = logits(model)
    got = logits(grouped(model, groups, mode, bypass))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert not torch.allclose(got, plain, atol=0.1)


def test_the_bypass_leaves_the_residual_alone():
    """With MLPs that answer zero the bypass must not be seen at all."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.down_proj.bias.zero_()
    runs = [logits(grouped(model, [(1, 4)], "cqil", bypass)) for bypass in (0, 1, 3)]
    runs.append(logits(grouped(model, [(1, 4)], "lp")))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("name", SPLIT)
def test_cached_decode_equals_a_whole_forward(name):
    """Every member has a cache slot of its own, whose mask and positions are its kind's; left padding too."""
    model = grouped(ALL[name].build(), [(0, 2)])
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"position_ids": positions} if "position_ids" in model.forward.__code__.co_varnames else {}
    want = logits(model, attention_mask=mask, **options)
    cache, parts = None, []
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 11)):
        cut = {key: value[:, start:end] for key, value in options.items()}
        out = model(IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **cut)
        cache = out.past_key_values
        parts.append(out.logits)
    got = torch.cat(parts, 1)
    assert float((got - want)[mask.bool()].abs().max()) <= 1e-4 * float(want.abs().max())
    assert [layer.get_seq_length() for layer in cache.layers] == [11] * model.config.num_hidden_layers


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str
)
def test_generate(kwargs):
    """The tokens are those of a model that computes the whole sequence again for every token."""
    model = grouped(llama(), [(1, 2), (3, 2)], "cqil", 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    ids = IDS[:1]
    torch.manual_seed(0)
    got = model.generate(ids, **settings)
    torch.manual_seed(0)
    lookup = {"prompt_lookup_num_tokens": None, "use_cache": False}
    assert torch.equal(got, model.generate(ids, **{**settings, **lookup}))


def test_hidden_states_and_attentions_are_recorded():
    model = llama(attn_implementation="eager")
    out = grouped(model, [(1, 2), (3, 2)])(IDS, output_hidden_states=True, output_attentions=True)
    states = out.hidden_states
    assert len(states) == 7
    assert len(out.attentions) == 6
    assert torch.equal(states[1], states[2]), "a member that is not the last hands its input on"
    assert not torch.equal(states[2], states[3])
    with pytest.raises(ValueError, match="returns no attention weights"):
        grouped(ALL["gpt-j"].build(), [(0, 2)])(IDS, output_attentions=True)


# ---- baselines ------------------------------------------------------------------------------------------------------


def test_skipping():
    model = llama()
    plan = cqil.baseline(model, "skip", 2)
    assert plan.groups == ((2, 1), (4, 1))
    short = copy.deepcopy(model)
    short.model.layers = nn.ModuleList(layer for i, layer in enumerate(short.model.layers) if i not in (2, 4))
    short.config.num_hidden_layers = 4
    assert torch.equal(logits(cqil.apply(model, plan)), logits(short, use_cache=False))
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=2)
    assert torch.equal(
        tokens, model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=2, use_cache=False)
    )


def test_skipping_attention():
    model = llama()
    plan = cqil.baseline(model, "skip_attention", 3)
    assert plan.groups == ((3, 3),)
    without = copy.deepcopy(model)
    for layer in without.model.layers[3:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.o_proj.bias.zero_()
    assert torch.equal(logits(cqil.apply(model, plan)), logits(without))
    for mode, count in (("skip", 0), ("skip", 5), ("cqil", 2), ("skip", True)):
        with pytest.raises(ValueError, match=r"mode must|layers must"):
            cqil.baseline(model, mode, count)
    with pytest.raises(ValueError, match="layer 0 cannot be skipped: the first of its kind"):
        grouped(model, [(0, 2)], "skip")
    gemma = ALL["gemma3"].build()
    with pytest.raises(ValueError, match="layer 1 cannot be skipped"):
        grouped(gemma, [(1, 1)], "skip_attention")
    assert is_plain(gemma)


# ---- plans ----------------------------------------------------------------------------------------------------------

LLAMA = {"architecture": "llama", "layers": 6, "hidden": 80}


def test_json():
    plan = cqil.Plan([(1, 2), [3, 3]], **LLAMA, bypass=1)
    assert plan.groups == ((1, 2), (3, 3))
    assert cqil.Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["groups"] == [[1, 2], [3, 3]]
    assert plan.reduction == pytest.approx(3 / 6)
    assert hash(plan)
    for text in ("[]", '{"groups": []}', '{"groups": [[1, 2]], "architecture": "a", "layers": 9, "hidden": 1, "x": 1}'):
        with pytest.raises(ValueError, match="a CQIL plan has the fields"):
            cqil.Plan.from_json(text)
    with pytest.raises(ValueError, match="Expecting value"):
        cqil.Plan.from_json("")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"groups": [(1, 2), (2, 2)]}, "must not overlap: layer 2"),
        ({"groups": [(3, 2), (1, 2)]}, "ascending"),
        ({"groups": [(5, 2)]}, r"group \(5, 2\) does not lie in layers 0 to 5"),
        ({"groups": [(-1, 2)]}, "does not lie"),
        ({"groups": [(1, 0)]}, "does not lie"),
        ({"groups": []}, "must be pairs"),
        ({"groups": 3}, "must be pairs"),
        ({"groups": [(1, 2, 3)]}, "must be pairs"),
        ({"groups": [(1, 2.0)]}, "must be pairs"),
        ({"groups": [(True, 2)]}, "must be pairs"),
        ({"mode": "CQIL"}, "mode must be one of"),
        ({"bypass": 2}, "less than the members of a group, 2, got 2"),
        ({"bypass": -1}, "bypass must be"),
        ({"bypass": True}, "bypass must be"),
        ({"bypass": 1, "mode": "lp"}, "in mode 'cqil'"),
        ({"layers": 0}, "layers must be"),
        ({"hidden": "80"}, "hidden must be"),
        ({"architecture": None}, "architecture must be"),
    ],
    ids=str,
)
def test_plans_that_make_no_sense(changes, text):
    with pytest.raises(ValueError, match=text):
        cqil.Plan(**{"groups": [(1, 2), (3, 2)], **LLAMA, **changes})


def test_plans_for_another_model_change_nothing():
    model = llama()
    grouped(model, [(1, 2)])
    before, want, own = state_of(model), logits(model), getattr(model.config, cqil.CONFIG)
    for changes, text in (
        ({"architecture": "qwen2"}, "architecture is 'qwen2' there and 'llama' here"),
        ({"layers": 7}, "layers is 7 there and 6 here"),
        ({"hidden": 81}, "hidden is 81 there and 80 here"),
    ):
        with pytest.raises(ValueError, match=text):
            cqil.apply(model, cqil.Plan([(3, 2)], **{**LLAMA, **changes}))
    for plan in ("plan", {"groups": [(1, 2)]}):
        with pytest.raises(TypeError, match=r"must be a cqil\.Plan"):
            cqil.apply(model, plan)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), want)
    assert getattr(model.config, cqil.CONFIG) == own


@pytest.mark.parametrize("name", NO_SPLIT)
def test_layers_that_do_not_split(name):
    model = ALL[name].build()
    want = logits(model)
    with pytest.raises(ValueError, match=NO_SPLIT[name]):
        grouped(model, [(0, 2)])
    assert is_plain(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["gpt-neox", "falcon", "phi", "cohere"])
def test_no_bypass_where_the_mlp_reads_no_attention(name):
    model = ALL[name].build()
    for mode, bypass in (("cqil", 1), ("lp", 0)):
        with pytest.raises(ValueError, match="its MLP reads no attention"):
            grouped(model, [(0, 2)], mode, bypass)
        assert is_plain(model)


def test_models_that_are_none():
    with pytest.raises(TypeError, match="model must be a torch"):
        cqil.apply("model")
    with pytest.raises(ValueError, match="one stack of decoder layers, Linear has 0"):
        cqil.restore(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="holds no plan"):
        cqil.apply(llama())
    model = llama()
    model.model.layers[2].forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="layer 2 cannot be grouped: its forward was replaced"):
        grouped(model, [(1, 2)])


def test_a_member_that_gets_something_else_is_an_error():
    model = grouped(llama(), [(1, 2)])
    handle = model.model.layers[1].register_forward_hook(lambda module, args, y: y * 2)
    with pytest.raises(RuntimeError, match="must get what the layer before returned"):
        logits(model)
    handle.remove()
    logits(model)
    with pytest.raises(RuntimeError, match="layer 2 is a member"):
        model.model.layers[2](torch.zeros(1, 1, 80))
    alone = copy.deepcopy(model.model.layers[1])
    with pytest.raises(RuntimeError, match="taken out of its model"):
        alone.forward.group.members()


# ---- the way back, copies, files ------------------------------------------------------------------------------------


def test_restore_and_another_plan():
    model = llama()
    before, want = state_of(model), logits(model)
    first = logits(grouped(model, [(1, 2)]))
    second = logits(grouped(model, [(3, 2)]))
    assert not torch.equal(first, second)
    with cqil.ungrouped(model):
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), second)
    assert torch.equal(logits(cqil.restore(model)), want)
    assert is_plain(cqil.restore(model))
    assert_unchanged(model, before)


def test_copies_are_groups_of_their_own():
    model = grouped(llama(), [(1, 2), (3, 3)], "cqil", 1)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.model.layers[1].forward.group, LayerGroup)
        assert other.model.layers[1].forward.group is other.model.layers[2].forward.group
        assert torch.equal(logits(other), want)
        cqil.restore(other)
        assert not torch.equal(logits(other), want)
    assert torch.equal(logits(model), want)


def test_training_mode_and_gradients():
    model = llama().train()
    grouped(model, [(1, 2)])
    assert all(module.training for module in model.modules())
    with torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    assert all(float(layer.mlp.up_proj.weight.grad.abs().max()) > 0 for layer in model.model.layers)


def test_a_float_checkpoint_carries_its_plan(tmp_path):
    model = grouped(llama(), [(1, 2)], "lp")
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(loaded), want), "a float model is what its class says until the plan is applied"
    assert cqil.saved_plan(loaded) == cqil.Plan.of(loaded, [(1, 2)], "lp")
    assert torch.equal(logits(cqil.apply(loaded)), want)
    loaded.config.cpullm_cqil = {"groups": 3}
    with pytest.raises(ValueError, match="a CQIL plan has the fields"):
        cqil.apply(loaded)


def test_the_package_has_it():
    assert torch_cpullm.cqil is cqil


# ---- search ---------------------------------------------------------------------------------------------------------


def quiet(layers=8, loud=(0, 1, 2, 7)):
    """A Llama whose layers hardly change their input, but for ``loud``."""
    model = llama(layers)
    for i, layer in enumerate(model.model.layers):
        if i not in loud:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.03)
                linear.bias.mul_(0.03)
    return model


def test_search_finds_the_layers_that_hardly_matter():
    model, tokens = quiet(), IDS
    want = logits(model)
    plan = cqil.search(model, tokens, 2, 0.03)
    assert plan.groups == ((3, 2), (5, 2))
    assert is_plain(model)
    assert torch.equal(logits(model), want)
    assert cqil.search(model, tokens, 4, 0.03, mode="lp", bypass=0).groups == ((3, 4),)
    assert len(cqil.search(model, tokens[0], 2, 0.03, groups=1).groups) == 1
    cost = cqil.measure(model, [plan], tokens)[0]
    assert cost.loss <= 0.03
    assert cost.reference == pytest.approx(
        float(torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()), rel=1e-5
    )


def test_search_refuses():
    model = quiet(loud=range(8))
    with pytest.raises(ValueError, match=r"no window of groups of 2 stays within max_loss 0\.001: the best, layers \d"):
        cqil.search(model, IDS, 2, 0.001)
    assert is_plain(model)
    for options, text in (
        ({"group": 1}, "group must be"),
        ({"group": 8}, "hold no 1 groups of 8"),
        ({"groups": 4}, "hold no 4 groups of 2"),
        ({"groups": 0}, "groups must be"),
        ({"tries": 0}, "tries must be"),
        ({"max_loss": 0.0}, "max_loss must be positive"),
        ({"mode": "skip"}, "baseline"),
        ({"bypass": 2}, "bypass must be less"),
    ):
        with pytest.raises(ValueError, match=text):
            cqil.search(model, IDS, **options)
    for tokens in (IDS.float(), IDS[:, :1], IDS[:0], IDS[None], [1, 2]):
        with pytest.raises(ValueError, match="tokens must"):
            cqil.search(model, tokens)


# ---- folding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3", "cohere", "olmo2"])
@pytest.mark.parametrize("mode", ["cqil", "lp"])
def test_folded_norms_compute_the_same_within_rounding(name, mode):
    model = ALL[name].build()
    if mode == "lp" and name == "cohere":
        return
    want = logits(grouped(model, [(0, 2)], mode))
    count = cqil.fold_norms(model, cqil.saved_plan(model))
    assert count == {"olmo2": 0}.get(name, 2 if mode == "cqil" else 4)
    assert float((logits(model) - want).abs().max()) <= 1e-4 * float(want.abs().max())
    if count:
        halves = layers_of(model)[0].forward.group.halves[0]
        first, second = (getattr(layer, dict(halves.norms)["input"]).weight for layer in layers_of(model)[:2])
        assert torch.equal(first, second)


def test_folding_needs_float_weights():
    model = torch_cpullm.optimize(llama())
    with pytest.raises(ValueError, match="fold before optimize"):
        cqil.fold_norms(model, cqil.Plan.of(model, [(1, 2)]))
