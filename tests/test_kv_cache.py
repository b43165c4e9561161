"""The KV cache of optimised models against transformers' DynamicCache: the same tokens, the same logits."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from families import CHUNKED, FAMILIES, LOOKUP_END, VERSION, VOCAB, Family, llama_like
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache, StaticCache, T5Config

import torch_cpullm
from torch_cpullm import kv_cache
from torch_cpullm.config import KV_CACHES, Settings
from torch_cpullm.kv_cache import CHUNK, CpuLlmCache

NEW = 14
NAMES = ["llama", "gemma2", "gpt-neox"]  # grouped heads; sliding windows of 7 in every other layer; all heads
three_families = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_thread():
    """Small models: on a busy machine two threads would mostly wait for each other."""
    torch.set_num_threads(1)


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@cache
def ours(name: str, dtype: str = "auto") -> Any:
    return torch_cpullm.optimize(family(name).build(), Settings(compute="fp32", kv_cache=dtype))


@cache
def stock(name: str) -> Any:
    """The same optimised model with transformers' own cache."""
    model = copy.deepcopy(ours(name))
    kv_cache.restore_cache_class(model)
    return model


def prompt(length: int = 20, batch: int = 1, seed: int = 5) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> bool:
    return got.shape == want.shape and float((got - want).abs().max()) <= bound * float(want.abs().max())


def same(got: Any, want: Any) -> None:
    """Equal tokens, equal logits: SDPA may round differently over a strided cache, or over keys beyond a window."""
    assert torch.equal(got.sequences, want.sequences)
    assert close(torch.stack(got.logits), torch.stack(want.logits))


# ---- generate() -----------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 40, "num_return_sequences": 3},
    "beam 4": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 6 if CHUNKED else None},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **LOOKUP_END},
}


@three_families
@pytest.mark.parametrize("mode", MODES)
def test_generate(name, mode):
    ids = prompt(10).repeat(1, 2)  # repeats itself, so that prompt lookup finds something
    results = []
    for model in (ours(name), stock(name)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            # transformers 5.0 itself cannot crop a sliding window.
            plain = VERSION == (5, 0) and model is stock(name) and mode == "prompt lookup"
            results.append(run(model, ids, **({} if plain else MODES[mode])))
    same(*results)
    assert type(results[0].past_key_values) is CpuLlmCache
    assert type(results[1].past_key_values) is DynamicCache


@three_families
@pytest.mark.parametrize("own", [True, False])
def test_assisted_decoding(name, own):
    """An assistant that is always right, and one whose guesses are thrown away, both with our cache."""
    assistant = copy.deepcopy(ours(name)) if own else torch_cpullm.optimize(family(name).build(seed=3))
    want = run(stock(name), prompt())
    assert torch.equal(run(ours(name), prompt(), assistant_model=assistant).sequences, want.sequences)


@three_families
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padded_batch(name, options):
    ids, mask = prompt(20, 3), torch.ones(3, 20, dtype=torch.long)
    mask[0, :6] = mask[2, :15] = 0
    ids = ids * mask
    same(*(run(model, ids, attention_mask=mask, **options) for model in (ours(name), stock(name))))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_past_the_first_chunk_and_the_models_limit(name):
    """The cache grows in the middle of a run; positions beyond max_position_embeddings are the model's own affair."""
    ids = prompt(CHUNK - 6)
    got, want = (run(model, ids, max_new_tokens=12, num_beams=2) for model in (ours(name), stock(name)))
    same(got, want)
    assert got.past_key_values.layers[0].capacity == 2 * CHUNK
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()


def test_learned_positions_end_with_an_error():
    model = torch_cpullm.optimize(family("opt").build())
    with pytest.raises(IndexError, match="index out of range"):
        model(prompt(140))


@three_families
def test_chat_turns(name):
    """past_key_values goes from turn to turn, through generate() and through plain calls."""
    first, more = prompt(12), prompt(5, seed=8)
    results = []
    for model in (ours(name), stock(name)):
        turn = run(model, first)
        ids = torch.cat([turn.sequences, more], 1)
        again = run(model, ids, past_key_values=turn.past_key_values)
        assert again.past_key_values is turn.past_key_values
        new = ids.shape[1] + NEW - turn.past_key_values.get_seq_length()
        step = model(again.sequences[:, -new:], past_key_values=again.past_key_values, use_cache=True)
        results.append((again, step.logits))
    same(results[0][0], results[1][0])
    assert close(results[0][1], results[1][1])
    fresh = run(ours(name), results[0][0].sequences[:, :-NEW])
    assert torch.equal(fresh.sequences, results[0][0].sequences)


@three_families
def test_plain_calls(name):
    ids = prompt(17, 2)
    got, want = ours(name)(ids), stock(name)(ids)
    assert type(got.past_key_values) is CpuLlmCache
    assert close(got.logits, want.logits)
    for step in range(3):
        ids = prompt(1 + step, 2, seed=step)
        got, want = (
            model(ids, past_key_values=last.past_key_values) for model, last in ((ours(name), got), (stock(name), want))
        )
        assert close(got.logits, want.logits)
    decoder = ours(name).get_decoder()
    assert type(decoder(ids).past_key_values) is CpuLlmCache
    assert type(decoder(ids, None, None, None, use_cache=True).past_key_values) is CpuLlmCache
    assert decoder(ids, use_cache=False).past_key_values is None


def test_what_the_caller_chooses_stays():
    model, ids = ours("gemma2"), prompt()
    want = run(stock("gemma2"), ids)
    for mine in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        got = run(model, ids, past_key_values=mine)
        assert got.past_key_values is mine
        same(got, want)
    for implementation, kind in (("static", StaticCache), ("dynamic", DynamicCache)):
        got = run(model, ids, cache_implementation=implementation)
        assert type(got.past_key_values) is kind
        same(got, want)
    got = run(model, ids, use_cache=False)
    assert got.past_key_values is None
    assert torch.equal(got.sequences, want.sequences)
    mine = CpuLlmCache(model.config, "fp32")
    same(run(model, ids, past_key_values=mine), want)
    assert mine.get_seq_length() == ids.shape[1] + NEW - 1
    same(run(stock("gemma2"), ids, past_key_values=CpuLlmCache(model.config)), want)


def test_encoder_decoder_and_recurrent_models_keep_their_caches():
    t5 = T5Config(
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        d_model=32,
        d_ff=64,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = torch_cpullm.optimize(AutoModelForSeq2SeqLM.from_config(t5).eval())
    assert type(run(model, prompt()).past_key_values) is EncoderDecoderCache
    options = llama_like(layer_types=["conv", "full_attention"], num_attention_heads=4)
    plain = Family("lfm2", "Lfm2Config", options).build()
    theirs = type(plain(prompt()).past_key_values)  # DynamicCache, with transformers 5.0 a class of Lfm2's own
    assert theirs is not CpuLlmCache
    hybrid = torch_cpullm.optimize(plain)
    assert type(run(hybrid, prompt()).past_key_values) is theirs
    assert type(hybrid(prompt()).past_key_values) is theirs
    if theirs is DynamicCache:
        with pytest.raises(ValueError, match="Lfm2Config has layers whose cache is not plain keys and values"):
            CpuLlmCache(hybrid.config)


def test_a_compiled_model_keeps_transformers_cache():
    """Unless all its layers are programs, for which see test_backend_layers."""
    model = copy.deepcopy(ours("llama"))
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    model.compile(backend="eager")
    torch._dynamo.reset()
    try:
        got = run(model, prompt(), max_new_tokens=3)
        assert type(got.past_key_values) is DynamicCache
        assert torch.equal(got.sequences, run(stock("llama"), prompt(), max_new_tokens=3).sequences)
        assert type(model(prompt(), use_cache=True).past_key_values) is DynamicCache
    finally:
        torch._dynamo.reset()


# ---- smaller types --------------------------------------------------------------------------------------------------


@three_families
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.04), ("bf16", 0.03), ("fp16", 3e-3)])
def test_smaller_caches(name, dtype, bound):
    """Logits of a prompt and of steps near those of the full cache; modes that crop and reorder change nothing."""
    model, ids = ours(name, dtype), prompt(24, 2)
    want, got = stock(name)(ids).logits, model(ids[:, :20])
    assert got.past_key_values.layers[0].k.dtype == KV_CACHES[dtype]
    steps = [got.logits]
    for i in range(20, 24):
        got = model(ids[:, i : i + 1], past_key_values=got.past_key_values)
        steps.append(got.logits)
    assert close(torch.cat(steps, 1), want, bound)
    greedy = run(model, ids[:1])
    for options in ({"prompt_lookup_num_tokens": 3, **LOOKUP_END}, {"assistant_model": copy.deepcopy(model)}):
        assert torch.equal(run(model, ids[:1], **options).sequences, greedy.sequences)
    assert run(model, ids, num_beams=3).sequences.shape == (2, 24 + NEW)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_model():
    model, ids = ours("llama"), prompt()
    other = run(ours("llama-tied"), ids).past_key_values
    lengths = [layer.length for layer in other.layers]
    for call in (
        lambda made: run(model, prompt(40), past_key_values=made),
        lambda made: model(ids, past_key_values=made),
    ):
        with pytest.raises(ValueError, match=r"holds 33 tokens with .* 1 x 2 x 10, but the model brings 1 x 1 x 16"):
            call(other)
    assert [layer.length for layer in other.layers] == lengths
    for layers in (1, 3):
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = layers
        with pytest.raises(ValueError, match=f"past_key_values has {layers} layers and the model 2"):
            model(ids, past_key_values=CpuLlmCache(config))
    with pytest.raises(ValueError, match="this cache has 2 layers, no layer 2"):
        CpuLlmCache(model.config).update(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 16), 2)


def test_a_cache_of_another_batch():
    made = ours("llama")(prompt(batch=2)).past_key_values
    with pytest.raises(ValueError, match="2 x 1 x 16, but the model brings 3 x 1 x 16"):
        ours("llama")(prompt(1, 3), past_key_values=made)
    with pytest.raises(ValueError, match=r"keys are \[1, 1, 2, 8\], but values \[1, 1, 3, 8\]"):
        made.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 3, 8), 0)


def test_unknown_types():
    with pytest.raises(ValueError, match="dtype must be one of auto, fp32, bf16, fp16, int8, got 'int4'"):
        CpuLlmCache(ours("llama").config, "int4")


# ---- the model's life -----------------------------------------------------------------------------------------------


def test_copies_pickles_and_restore():
    model, ids = copy.deepcopy(ours("gemma2", "int8")), prompt()
    want = run(model, ids)
    torch_cpullm.optimize(model, Settings(compute="fp32", kv_cache="int8"))  # does nothing
    for other in (model, pickle.loads(pickle.dumps(model))):
        got = run(other, ids)
        same(got, want)
        assert got.past_key_values.layers[0].k.dtype == torch.int8
        assert len(other.get_decoder()._forward_pre_hooks) == 1
    torch_cpullm.restore(model)
    assert type(run(model, ids).past_key_values) is DynamicCache
    assert type(model(ids).past_key_values) is DynamicCache
    assert not model.get_decoder()._forward_pre_hooks


def test_other_models_and_other_hooks_are_left_alone():
    plain = family("llama").build()
    kept = plain.get_decoder().register_forward_pre_hook(lambda *_: None)
    untouched = family("llama").build()
    torch_cpullm.optimize(plain)
    assert type(untouched(prompt()).past_key_values) is DynamicCache
    assert type(run(untouched, prompt()).past_key_values) is DynamicCache
    torch_cpullm.restore(plain)
    assert list(plain.get_decoder()._forward_pre_hooks) == [kept.id]


def test_training_mode_has_no_cache_of_ours():
    model = copy.deepcopy(ours("llama"))
    model.train()
    with torch.no_grad():
        assert type(model(prompt(), use_cache=True).past_key_values) is DynamicCache


def test_memory_returns():
    """No cycle keeps a model or a cache alive."""
    gc.disable()
    try:
        model = torch_cpullm.optimize(family("gemma2").build())
        out = run(model, prompt())
        alive = [weakref.ref(model), weakref.ref(out.past_key_values), weakref.ref(out.past_key_values.layers[0].k)]
        out.past_key_values.reset()
        assert alive[2]() is None
        del out, model
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_two_threads_two_models():
    names = ["llama", "gemma2"]
    want = {name: run(ours(name), prompt()).sequences for name in names}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(5):
            if not torch.equal(run(ours(name), prompt()).sequences, want[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
