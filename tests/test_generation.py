"""HuggingFace's generate() and pipelines, untouched, on optimised models: a tiny random Llama and the real SmolLM2."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CHUNKED, FAMILIES, LOOKUP_END, VOCAB
from smollm2 import smollm2
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

import torch_cpullm
from torch_cpullm.config import Settings
from torch_cpullm.linear import PackedLinear

NEW = 12
LLAMA = next(family for family in FAMILIES if family.name == "llama")
both_computes = pytest.mark.parametrize("compute", ["fp32", "int8"])


@pytest.fixture(autouse=True)
def one_thread():
    """Small models: on a busy machine two threads would mostly wait for each other."""
    torch.set_num_threads(1)


@cache
def tiny(compute: str = "fp32") -> Any:
    return torch_cpullm.optimize(LLAMA.build(), Settings(compute=compute))


@cache
def tiny_reference() -> Any:
    """The float model with the weights of both tiny ones."""
    return torch_cpullm.restore(copy.deepcopy(tiny("fp32")))


@cache
def words() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny Llama: the words w1, w2 .."""
    vocabulary = {"<pad>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def prompt(length: int = 9, seed: int = 5) -> Tensor:
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """New tokens [rows, new], greedy unless the options say otherwise."""
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)[:, ids.shape[1] :]


def with_logits(model: Any, ids: Tensor, mask: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """(new tokens [rows, new], logits [rows, new, vocabulary])"""
    options = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


SURE = {"fp32": (NEW, 1e-3), "int8": (5, 0.05)}


@cache
def sure_prompt(compute: str, length: int, repeat: int = 1) -> tuple[Tensor, int]:
    """(ids [1, length * repeat], new) for the tiny Llama: no rounding can change the `new` tokens that follow.

    torch's attention rounds differently in another shape of batch or cache. In int8 compute that may carry an
    activation to the next of its 254 levels, which was seen to move a logit by 1.2 % of the largest.
    """
    new, margin = SURE[compute]
    for seed in range(300):
        ids = prompt(length, seed).repeat(1, repeat)
        logits = with_logits(tiny(compute), ids, torch.ones_like(ids), new)[1][0]
        top = logits.topk(2, -1).values
        if bool((top[:, 0] - top[:, 1] > margin * logits.abs().amax(-1)).all()):
            return ids, new
    raise AssertionError("no prompt leads to clear decisions")


# ---- pipelines ------------------------------------------------------------------------------------------------------


@both_computes
@pytest.mark.parametrize("device", [{}, {"device": "cpu"}, {"device": -1}], ids=str)
def test_pipeline(compute, device):
    model, tokenizer = tiny(compute), words()
    if device and torch.accelerator.is_available():  # what keeps a model from the GPU makes transformers refuse device=
        with pytest.raises(ValueError, match="discard the `device` argument"):
            pipeline("text-generation", model=model, tokenizer=tokenizer, **device)
        return
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **device)
    assert pipe.device == torch.device("cpu")
    assert pipe.model is model
    text = "w5 w17 w200 w3"
    got = pipe(text, max_new_tokens=NEW, do_sample=False, return_full_text=False)[0]["generated_text"]
    want = generate(model, tokenizer(text, return_tensors="pt").input_ids)
    assert got.split() == tokenizer.decode(want[0]).split()
    assert len(got.split()) == NEW


def test_pipeline_of_a_batch():
    """Prompts of different lengths, padded by the pipeline, give the texts that each gives alone."""
    pipe = pipeline("text-generation", model=tiny(), tokenizer=words())
    texts = ["w5 w17 w200 w3", "w9", "w250 w4 w77 w12 w13 w14 w15"]
    together = pipe(texts, batch_size=3, max_new_tokens=NEW, do_sample=False)
    assert together == [pipe(text, max_new_tokens=NEW, do_sample=False) for text in texts]


def test_pipeline_of_a_chat_on_the_real_model():
    model, tokenizer = smollm2()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is the capital city of France? Answer in one sentence."}]
    answer = pipe(chat, max_new_tokens=14, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert "Paris" in answer["content"]


class Moved(Exception):
    """Something tried to move the model."""


def test_a_visible_accelerator_leaves_the_pipeline_on_the_cpu(monkeypatch):
    """transformers moves a model to the first GPU unless it has an hf_device_map."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)

    def to(self, *args, **kwargs):
        raise Moved(*args)

    plain = LLAMA.build()
    monkeypatch.setattr(type(plain), "to", to)
    with pytest.raises(Moved, match="cuda:0"):  # else the rest of this test would show nothing
        pipeline("text-generation", model=plain, tokenizer=words())
    model = torch_cpullm.optimize(plain)
    assert model.hf_device_map == {"": torch.device("cpu")}
    pipe = pipeline("text-generation", model=model, tokenizer=words())
    assert pipe.device == torch.device("cpu")
    assert len(pipe("w5 w17", max_new_tokens=3, return_full_text=False)[0]["generated_text"].split()) == 3
    assert not hasattr(torch_cpullm.restore(model), "hf_device_map")


def test_no_device_map_without_an_accelerator(monkeypatch):
    """With one, transformers refuses device= to pipelines, so it is set only where it is needed."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not hasattr(torch_cpullm.optimize(LLAMA.build()), "hf_device_map")


# ---- streaming ------------------------------------------------------------------------------------------------------


def test_streaming_from_another_thread():
    model, tokenizer = smollm2()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer, "max_new_tokens": 6})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 2
    assert "".join(pieces) == tokenizer.decode(generate(model, ids, max_new_tokens=6)[0])
    assert "Paris" in "".join(pieces)


def test_streaming_to_standard_output(capsys):
    ids = prompt()
    want = generate(tiny(), ids)
    capsys.readouterr()
    generate(tiny(), ids, streamer=TextStreamer(words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == words().decode(want[0]).split()


# ---- ways to choose tokens ------------------------------------------------------------------------------------------


@both_computes
def test_sampling_repeats_with_the_seed(compute):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(
            tiny(compute), prompt(), do_sample=True, temperature=1.3, top_p=0.95, top_k=50, num_return_sequences=3
        )

    with torch.random.fork_rng(devices=[]):
        first, again, other = sample(1), sample(1), sample(2)
    assert first.shape == (3, NEW)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_beam_search():
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    ids = prompt()
    got, want = (
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
        for model in (tiny(), tiny_reference())
    )
    assert torch.equal(got.sequences, want.sequences)
    assert torch.allclose(got.sequences_scores, want.sequences_scores, rtol=1e-4)
    assert len({tuple(row) for row in got.sequences.tolist()}) == 3
    quantised = generate(tiny("int8"), ids, num_beams=3)
    assert quantised.shape == (1, NEW)


MODES = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3, **LOOKUP_END},
    "chunked prefill": {"prefill_chunk_size": 4 if CHUNKED else None},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@both_computes
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_must_not_change_the_tokens(mode, compute):
    ids, new = sure_prompt(compute, 11, repeat=2)  # text that repeats itself gives prompt lookup something to find
    options = {"max_new_tokens": new, **MODES[mode]}
    assert torch.equal(generate(tiny(compute), ids, **options), generate(tiny(compute), ids, max_new_tokens=new))


@both_computes
def test_assistant_model(compute):
    """One that knows nothing, whose guesses are thrown away, and one that is always right."""
    ids, new = sure_prompt(compute, 9)
    stranger = torch_cpullm.optimize(LLAMA.build(seed=3))
    want = generate(tiny(compute), ids, max_new_tokens=new)
    for assistant in (stranger, copy.deepcopy(tiny(compute))):
        assert torch.equal(generate(tiny(compute), ids, max_new_tokens=new, assistant_model=assistant), want)


def test_modes_on_the_real_model():
    model, tokenizer = smollm2()
    ids = tokenizer("1, 2, 3, 4, 5, 6, 7, 8, 9. 1, 2, 3, 4, 5,", return_tensors="pt").input_ids
    want = generate(model, ids, max_new_tokens=6)
    assert tokenizer.decode(want[0]) == " 6, 7,"
    for mode in MODES.values():
        assert torch.equal(generate(model, ids, max_new_tokens=6, **mode), want), mode


# ---- batches --------------------------------------------------------------------------------------------------------


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def check_batch(model: Any, rows: list[list[int]], pad: int, new: int) -> tuple[Tensor, Tensor]:
    """Tokens as alone; the logits of both, [rows, new, vocabulary], for the caller to compare."""
    ids, mask = left_padded(rows, pad)
    tokens, logits = with_logits(model, ids, mask, new)
    alone = [with_logits(model, torch.tensor([row]), torch.ones(1, len(row)), new) for row in rows]
    assert torch.equal(tokens, torch.cat([item[0] for item in alone]))
    return logits, torch.cat([item[1] for item in alone])


@both_computes
def test_left_padded_batch_equals_singles(compute):
    prompts = [sure_prompt(compute, length) for length in (9, 1, 14, 5)]
    got, want = check_batch(tiny(compute), [ids[0].tolist() for ids, _ in prompts], pad=0, new=prompts[0][1])
    errors = (got - want).abs().amax(-1) / want.abs().amax(-1)
    assert float(errors.max()) <= (1e-4 if compute == "fp32" else 0.02)


@both_computes
def test_left_padded_batch_on_the_real_model(compute):
    """int8: torch's attention over padding rounds differently, after which some activation rounds to the next of its
    254 levels and 30 layers carry that on: less than what int8 compute costs anyway.
    """
    model, tokenizer = smollm2(compute)
    texts = ("The capital of France is", "a b c d e f", "1, 2, 3, 4, 5,", "The days of the week are Monday, Tuesday,")
    rows = [tokenizer(text).input_ids for text in texts]
    got, want = check_batch(model, rows, tokenizer.pad_token_id, new=2)
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= (1e-5 if compute == "fp32" else 5e-3)


# ---- what else generate() and forward can give ----------------------------------------------------------------------


def test_hidden_states_and_attentions():
    """Eager attention, which alone gives its weights; the hooks that record them find the same modules as before."""
    ids = prompt()
    results = []
    for model in (copy.deepcopy(tiny()), copy.deepcopy(tiny_reference())):
        model.set_attn_implementation("eager")
        results.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_hidden_states=True,
                output_attentions=True,
            )
        )
    got, want = results
    for name, count in (("hidden_states", 3), ("attentions", 2)):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert len(ours) == len(theirs) == 3  # steps
        for step, reference in zip(ours, theirs, strict=True):
            assert len(step) == len(reference) == count
            for a, b in zip(step, reference, strict=True):
                assert a.shape == b.shape
                assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


def test_inference_mode_and_embeddings_as_input():
    ids = prompt()
    with torch.inference_mode():
        rows = tiny().get_input_embeddings()(ids)
        assert torch.equal(tiny()(inputs_embeds=rows).logits, tiny()(ids).logits)
        assert torch.equal(generate(tiny(), ids), generate(tiny(), ids, return_dict_in_generate=False))


def test_the_loss_of_a_text():
    ids = prompt(20)
    with torch.no_grad():
        got, want = (model(ids, labels=ids).loss for model in (tiny(), tiny_reference()))
    assert torch.allclose(got, want, rtol=1e-5)


# ---- the real model -------------------------------------------------------------------------------------------------

TEXT = """The lighthouse stood at the end of a long spit of rock, and for most of the year nobody came there but the
keeper and the gulls. In spring the supply boat brought flour, oil for the lamp, newspapers that were three
weeks old and letters from his sister in town. He read the newspapers in order, one each evening, as if they
had been printed that morning, and so he lived three weeks behind the rest of the world and did not mind it at
all.

One night in October the wind turned to the north and the sea rose higher than he had ever seen it. Water ran
down the stairs, and the glass of the lantern shook in its frame. He stayed beside the lamp until dawn,
turning the lens by hand because the clockwork had stopped. In the grey light he saw a ship, a small freighter
with a broken mast, lying safely in the shelter of the bay. Scientists who study the history of navigation say
that before radio, a single light could save more than forty ships in one winter. The captain rowed over later
that day and brought him a sack of coffee, two books and a newspaper which was only four days old."""


def test_int8_compute_is_near_fp32_compute_on_the_real_model():
    """Mean KL at most 0.01 nats over a page of English."""
    tokenizer = smollm2()[1]
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert 200 <= ids.shape[1] <= 400
    with torch.inference_mode():
        exact, got = (smollm2(compute)[0](ids).logits[0].log_softmax(-1) for compute in ("fp32", "int8"))
    nats = -exact[:-1].gather(1, ids[0, 1:, None]).mean()
    assert float(nats) < 4, "the model does not understand the text: something else is wrong"
    assert float((exact.exp() * (exact - got)).sum(-1).mean()) <= 0.01
    assert float((got.exp() * (got - exact)).sum(-1).mean()) <= 0.01


def test_two_models_in_two_threads():
    """The real model twice, one for each compute: each says beside the other what it says alone."""
    jobs = {}
    for compute, text in (("int8", "The capital of France is"), ("fp32", "Once upon a time, there was a little")):
        model, tokenizer = smollm2(compute)
        jobs[compute] = SimpleNamespace(model=model, ids=tokenizer(text, return_tensors="pt").input_ids, got=[])
    want = {compute: generate(job.model, job.ids, max_new_tokens=8).tolist() for compute, job in jobs.items()}
    barrier = threading.Barrier(2)

    def work(job):
        barrier.wait()
        job.got = generate(job.model, job.ids, max_new_tokens=8).tolist()

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {compute: job.got for compute, job in jobs.items()} == want


# ---- memory, saving, training ---------------------------------------------------------------------------------------

MEMORY = """
import gc, json, re
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import torch_cpullm
torch.set_num_threads(1)

def anonymous():
    gc.collect()
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1]) * 1024

small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
large = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, vocab_size=12000)
torch_cpullm.optimize(LlamaForCausalLM(LlamaConfig(**small)))  # what the libraries themselves take
empty = anonymous()
model = LlamaForCausalLM(LlamaConfig(**large, tie_word_embeddings=True))
weights = sum(p.nbytes for p in model.parameters())
before = anonymous()
torch_cpullm.optimize(model)
after = anonymous()
report = torch_cpullm.report(model)
print(json.dumps(dict(empty=empty, weights=weights, before=before, after=after, packed=report.bytes_after)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/status is Linux's")
def test_optimize_gives_the_memory_back():
    """Anonymous resident bytes of a fresh process: the packed weights and little else remain."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    m = json.loads(result.stdout.splitlines()[-1])
    assert m["before"] - m["empty"] >= 0.95 * m["weights"], "the float weights are not where this test looks"
    assert m["packed"] < m["weights"] / 5
    assert m["after"] - m["empty"] <= m["packed"] + 16e6


def test_a_deleted_model_is_gone_at_once():
    """No reference from the model to itself, which would keep its memory until the garbage collector comes by."""
    for make in (LLAMA.build, lambda: torch_cpullm.optimize(LLAMA.build())):
        gc.collect()
        gc.disable()
        try:
            model = make()
            alive = weakref.ref(model)
            del model
            assert alive() is None
        finally:
            gc.enable()


def test_copies_and_pickles_generate_the_same():
    model, ids = torch_cpullm.optimize(LLAMA.build()), prompt()
    want = generate(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(other, ids), want)
        other.to(torch.bfloat16)
        assert (other.dtype, model.dtype) == (torch.bfloat16, torch.float32)


def test_forward_outside_of_no_grad():
    ids = prompt()
    got = torch_cpullm.optimize(LLAMA.build())(ids).logits
    with torch.no_grad():
        assert torch.equal(got, tiny("int8")(ids).logits)
    assert not got.requires_grad


def test_training_is_a_clear_error():
    """What every training loop does; torch alone would speak of an element that has no grad_fn."""
    model, ids = torch_cpullm.optimize(LLAMA.build()), prompt()
    model.train()
    with pytest.raises(RuntimeError, match=r"for inference and have no gradient.*restore\(model\) to train"):
        model(ids, labels=ids).loss.backward()


def test_a_cast_model_still_generates():
    """to(dtype) must not touch packed weights."""
    model = copy.deepcopy(tiny())
    codes = {name: m.packed.codes for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    half = generate(model.to(torch.bfloat16), prompt())
    assert half.shape == (1, NEW)
    assert model.dtype == torch.bfloat16
    assert all(model.get_submodule(name).packed.codes is value for name, value in codes.items())
