"""GGUF import: the file's own codes and scales, exactly, and every architecture in its own class."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import smollm2 as shared
import torch
import transformers
from families import VERSION
from gguf import GGMLQuantizationType as Kind
from gguf_files import (
    CASES,
    EPSILON,
    IDS,
    KEYS,
    VOCABULARY,
    Case,
    file_tensors,
    keyed,
    kind_by_name,
    random_model,
    rope_interleaved,
    sized,
    write_file,
    write_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import torch_cpullm
from torch_cpullm.experts import PackedExperts
from torch_cpullm.formats.gguf import load_gguf, quantized_weight
from torch_cpullm.formats.gguf_reader import GgufFile
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.packing import dequantize, pack, unpack


@pytest.fixture(autouse=True)
def readable(request: pytest.FixtureRequest) -> None:
    if VERSION < (5, 18) and request.function is not test_older_transformers:
        pytest.skip("GGUF files need transformers 5.18")


def test_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read GGUF files, but cut words in another way than llama.cpp and swap the tokens of beginning and end."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    with pytest.raises(ImportError, match=r"load_gguf needs transformers 5\.18 or later: .* that version"):
        load_gguf(shared.gguf_path(), progress=False)


# ---------------------------------------------------------------------------------------- the real file


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    return shared.gguf_path()


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """In fp32 compute; other test files use the same objects."""
    return shared.smollm2("fp32")


@pytest.fixture(scope="module")
def smollm2_by_transformers(smollm2_path: Path) -> Any:
    packed = getattr(transformers, "GgufConfig", None)  # before there was one, files were always dequantised
    options = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32, **options
    ).eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small steps: on a busy machine threads cost more than they save."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_smollm2_weights_are_bit_equal_to_the_dequantised_file(
    smollm2: Any, smollm2_by_transformers: Any, one_thread: None
) -> None:
    """All 211 matrices, the permuted q and k projections included: packed -> float32 gives the oracle's bits."""
    modules = {name: m for name, m in smollm2[0].named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    assert len(modules) == 212  # 7 per layer, the embedding and the head
    for name, module in modules.items():
        want = smollm2_by_transformers.get_submodule(name).weight
        assert torch.equal(dequantize(module.packed), want), name


@pytest.mark.parametrize(
    ("name", "kind", "header_bytes"), [("blk.3.ffn_down.weight", Kind.Q4_1, 4), ("token_embd.weight", Kind.Q8_0, 2)]
)
def test_smollm2_codes_and_scales_are_the_stored_bytes(
    smollm2_path: Path, name: str, kind: Kind, header_bytes: int
) -> None:
    file = GgufFile(smollm2_path)
    assert file.tensors[name].ggml_type == kind
    weight = unpack(pack(quantized_weight(file, name)))
    blocks = file.raw(name).reshape(weight.n, weight.k // 32, -1)
    stored = blocks[..., header_bytes:]
    codes = weight.codes.numpy().reshape(weight.n, -1, 32)
    if kind == Kind.Q8_0:
        assert np.array_equal(codes - np.uint8(128), stored)
    else:
        assert np.array_equal(codes[..., :16] | codes[..., 16:] << 4, stored)
    assert np.array_equal(weight.scales.numpy().view(np.uint8).reshape(*blocks.shape[:2], 2), blocks[..., :2])
    if header_bytes == 4:
        assert weight.zeros is not None
        assert np.array_equal(weight.zeros.numpy().view(np.uint8).reshape(*blocks.shape[:2], 2), blocks[..., 2:4])


def test_smollm2_embedding_and_head_share_one_copy(smollm2: Any) -> None:
    model = smollm2[0]
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert (model.lm_head.packed.bits, model.lm_head.packed.group_size) == (8, 32)


def test_smollm2_logits_match_transformers(smollm2: Any, smollm2_by_transformers: Any) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The sea was calm on the 14th of March, and the lighthouse keeper", return_tensors="pt").input_ids
    with torch.inference_mode():
        got, want = model(ids).logits, smollm2_by_transformers(ids).logits
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    assert got.argmax(-1).equal(want.argmax(-1))


def test_smollm2_is_a_plain_transformers_model(smollm2: Any, smollm2_by_transformers: Any) -> None:
    model = smollm2[0]
    assert type(model) is type(smollm2_by_transformers)
    assert not model.training
    ours, theirs = model.config.to_dict(), smollm2_by_transformers.config.to_dict()
    differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert differing <= {"_name_or_path", "quantization_config", "architectures"}
    assert model.generation_config.to_dict() == smollm2_by_transformers.generation_config.to_dict()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_smollm2_speaks_in_int8_compute(smollm2_path: Path) -> None:
    model, tokenizer = load_gguf(smollm2_path, dtype=torch.bfloat16, progress=False)
    assert model.lm_head.compute == "fp32"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many days are in a week?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    # The best two tokens are at least 0.39 apart at each step, in fp32 and int8 compute alike.
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]) == "A week is approximately 7 days.<|im_end|>"
    assert out[0, -1] == model.generation_config.eos_token_id


def test_smollm2_tokenizer(smollm2: Any, smollm2_path: Path) -> None:
    """Equal to transformers' own, except that digits stand alone as in the original tokenizer."""
    ours = smollm2[1]
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert isinstance(ours, PreTrainedTokenizerFast)
    text = "Hello, world!  It's naïve – 日本語\n\n\tdef f(x):\n    return x<|im_end|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours("a  12").input_ids == [81, 256, 33, 34]
    assert theirs("a  12").input_ids != [81, 256, 33, 34]  # else this rule of ours can go


# ---------------------------------------------------------------------------------------- small synthetic files


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Against the model the file was written from, with the weights the file holds: config, names, order, offsets."""
    oracle = write_model(tmp_path / "m.gguf", name)
    experts = "experts" in CASES[name].float_modules
    config = torch_cpullm.CpuLlmConfig(modules_to_not_convert=["experts"]) if experts else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here needs a second quantisation
        model, tokenizer = load_gguf(tmp_path / "m.gguf", config=config, compute="fp32", progress=False)
    assert type(model) is type(oracle)
    with torch.inference_mode():
        got, want = model(IDS).logits, oracle(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    for path, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            assert isinstance(model.get_submodule(path), PackedLinear), path
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    if not experts:
        assert torch_cpullm.report(model).left_in_float == []
    assert tokenizer("hello").input_ids
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_each_type_bit_for_bit(kind: Kind, tmp_path: Path) -> None:
    """Linears and the input embedding of each exact type; a 4-bit embedding stays 4-bit."""
    oracle = write_model(tmp_path / "m.gguf", "llama tied", lambda _, shape: kind if len(shape) == 2 else Kind.F32)
    model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            assert torch.equal(module.dequantize(), oracle.get_submodule(name).weight), name
            assert module.packed.bits == (8 if kind == Kind.Q8_0 else 4)
    assert model.lm_head.packed is model.model.embed_tokens.packed


def k_blocks(shape: tuple[int, int], kind: Kind, seed: int = 3) -> np.ndarray:
    """Random blocks with sane scales of a type that the gguf package cannot write: uint8 [rows, bytes]."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
    if kind == Kind.Q6_K:
        blocks[..., 192:208] = 20  # int8 scales
        blocks[..., 208:] = np.array([1e-4], dtype=np.float16).view(np.uint8)
    else:
        assert kind == Kind.Q4_K
        blocks[..., :4] = np.array([3e-4, 2e-3], dtype=np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


WIDE = Case("llama", sized(head_dim=16, intermediate_size=256), keyed(feed_forward_length=256), rope_interleaved)


def write_with(path: Path, kinds: dict[str, Kind]) -> Any:
    """A llama file whose tensors have the first of `kinds` that is part of their name; returns the model it came from.

    K types get random blocks.
    """
    model = random_model(WIDE)

    def kind_of(name: str, shape: tuple[int, ...]) -> Kind:
        found = next((kind for part, kind in kinds.items() if part in name), kind_by_name(name, shape))
        return Kind.F32 if found in (Kind.Q4_K, Kind.Q6_K) else found

    with torch.no_grad():
        tensors: dict[str, tuple[np.ndarray, Kind]] = dict(file_tensors(model, "llama", WIDE, kind_of))
    for name, (array, _) in tensors.items():
        kind = next((kind for part, kind in kinds.items() if part in name), Kind.F32)
        if kind in (Kind.Q4_K, Kind.Q6_K):
            tensors[name] = (k_blocks(array.shape, kind), kind)
    write_file(path, "llama", tensors, WIDE.keys)
    return model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def test_q4_k_keeps_its_codes(tmp_path: Path) -> None:
    """Scales and minima are products of two stored numbers and are rounded to fp16: 2^-11 of each of the two terms."""
    write_with(tmp_path / "m.gguf", {"ffn_down": Kind.Q4_K})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    packed = model.model.layers[1].mlp.down_proj.packed
    assert (packed.bits, packed.group_size, packed.zeros.dtype) == (4, 32, torch.float16)
    weight = unpack(packed)
    want = GgufFile(tmp_path / "m.gguf").dequantized("blk.1.ffn_down.weight")
    terms = 15 * weight.scales.float().abs() + weight.zeros.float().abs()
    bound = terms.repeat_interleave(32, 1).numpy() * 2.0**-11 * (1 + 2.0**-10)
    assert (np.abs(dequantize(weight).numpy() - want) <= bound).all()
    assert weight.codes.unique().numel() == 16
    assert weight.scales.unique().numel() > 20  # all 6-bit factors differ


def test_other_types_are_quantised_again_with_one_warning(tmp_path: Path) -> None:
    kinds = {"attn_v": Kind.F16, "ffn_up": Kind.BF16, "attn_output": Kind.F32, "ffn_gate": Kind.Q5_0}
    oracle = write_with(tmp_path / "m.gguf", {**kinds, "ffn_down": Kind.Q6_K})
    with pytest.warns(UserWarning, match=r"m\.gguf: Q4_0, Q4_1, Q8_0 and Q4_K matrices are taken over") as caught:
        model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    assert len(caught) == 1
    assert str(caught[0].message).split("other types are not: ")[1] == (
        "BF16 (2) quantised to 4 bits, F16 (2) quantised to 4 bits, F32 (2) quantised to 4 bits, "
        "Q5_0 (2) quantised to 8 bits, Q6_K (2) quantised to 8 bits"
    )
    layer = model.model.layers[1]
    down = torch.from_numpy(GgufFile(tmp_path / "m.gguf").dequantized("blk.1.ffn_down.weight"))
    source = oracle.model.layers[1]
    assert relative_error(layer.mlp.down_proj.dequantize(), down) < 0.01  # INT8
    assert relative_error(layer.mlp.gate_proj.dequantize(), source.mlp.gate_proj.weight) < 0.01
    assert layer.self_attn.v_proj.packed.bits == 4
    assert relative_error(layer.self_attn.v_proj.dequantize(), source.self_attn.v_proj.weight) < 0.12


def test_config_decides_what_is_not_taken_over(tmp_path: Path) -> None:
    write_with(tmp_path / "m.gguf", {"attn_q": Kind.F16, "ffn_down": Kind.Q6_K})
    config = torch_cpullm.CpuLlmConfig(
        bits=4, group_size=64, compute="fp32", modules_to_not_convert=["1.mlp.down_proj"]
    )
    with pytest.warns(UserWarning, match=r"Q6_K \(1\) dequantised to float, Q6_K \(1\) quantised to 4 bits"):
        model, _ = load_gguf(tmp_path / "m.gguf", config=config, progress=False)
    first, second = model.model.layers
    q_rows = GgufFile(tmp_path / "m.gguf").dequantized("blk.1.attn_q.weight").reshape(4, 8, 2, 64).swapaxes(1, 2)
    assert relative_error(second.self_attn.q_proj.dequantize(), torch.tensor(q_rows.reshape(64, 64))) < 0.13
    assert (first.mlp.down_proj.packed.bits, first.mlp.down_proj.packed.group_size) == (4, 64)
    assert first.mlp.down_proj.compute == first.mlp.up_proj.compute == "fp32"
    want = torch.from_numpy(GgufFile(tmp_path / "m.gguf").dequantized("blk.1.ffn_down.weight"))
    assert torch.equal(second.mlp.down_proj.weight, want)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.F32, 4), (Kind.Q8_0, 8), (Kind.Q4_0, 8)])
def test_experts_are_quantised_again(kind: Kind, bits: int, tmp_path: Path) -> None:
    """By the recipe where they are floats, else to 8 bits, and the warning says so."""
    oracle = write_model(
        tmp_path / "m.gguf", "qwen3moe", lambda name, shape: kind if "exps" in name else kind_by_name(name, shape)
    )
    with pytest.warns(UserWarning, match=rf"F32 experts \(\d\) quantised to {bits} bits"):
        model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    assert torch_cpullm.report(model).left_in_float == []
    experts, source = model.model.layers[1].mlp.experts, oracle.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    for name, packed in experts.weights().items():
        assert (packed.whole.bits, packed.whole.group_size) == (bits, 32)
        for i, want in enumerate(getattr(source, name)):
            assert relative_error(dequantize(packed[i]), want) < (0.12 if bits == 4 else 0.01), name


def test_rope_scaling_of_the_file_reaches_the_config(tmp_path: Path) -> None:
    """Llama 3.1 (stored as divisors), linear and YaRN: transformers 5.23 drops all three from GGUF files."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    case = Case("llama", sized(head_dim=16, rms_norm_eps=EPSILON, rope_scaling=scaling), KEYS, rope_interleaved)
    oracle = random_model(case)
    plain = AutoConfig.for_model("llama", **sized(head_dim=16))
    unscaled = AutoModelForCausalLM.from_config(plain).model.rotary_emb.inv_freq
    with torch.no_grad():
        tensors = file_tensors(oracle, "llama", case, kind_by_name)
    divisors = (unscaled / oracle.model.rotary_emb.inv_freq).numpy()
    assert divisors.min() == 1
    assert 1 < divisors.max() <= 8.001
    write_file(tmp_path / "a.gguf", "llama", {**tensors, "rope_freqs.weight": (divisors, Kind.F32)}, KEYS)
    model, _ = load_gguf(tmp_path / "a.gguf", compute="fp32", progress=False)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, oracle.model.rotary_emb.inv_freq)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    write_file(tmp_path / "b.gguf", "llama", {**tensors, "rope_freqs.weight": (divisors[::-1], Kind.F32)}, KEYS)
    with pytest.raises(ValueError, match=r"b\.gguf.*rope_freqs"):
        load_gguf(tmp_path / "b.gguf", progress=False)
    for kind, more in (("linear", {}), ("yarn", {"rope.scaling.original_context_length": 32})):
        keys = {**KEYS, "rope.scaling.type": kind, "rope.scaling.factor": 4.0, **more}
        write_file(tmp_path / "c.gguf", "llama", tensors, keys)
        config = load_gguf(tmp_path / "c.gguf", progress=False)[0].config.rope_parameters
        assert (config["rope_type"], config["factor"]) == (kind, 4.0)


def test_other_end_tokens_stop_generation_too(tmp_path: Path) -> None:
    case = CASES["llama"]
    with torch.no_grad():
        tensors = file_tensors(random_model(case), "llama", case, kind_by_name)
    write_file(tmp_path / "m.gguf", "llama", tensors, {**KEYS, "tokenizer.ggml.eot_token_id": 262})
    model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    assert model.generation_config.eos_token_id == [258, 262]


def test_restore_gives_the_dequantised_model(tmp_path: Path) -> None:
    oracle = write_model(tmp_path / "m.gguf", "gemma3")
    model = torch_cpullm.restore(load_gguf(tmp_path / "m.gguf", progress=False)[0])
    want = oracle.state_dict()
    assert model.state_dict().keys() == want.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-6, msg=name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.inference_mode():
        got, logits = model(IDS).logits, oracle(IDS).logits
    assert (got - logits).abs().max() <= 1e-4 * logits.abs().max()
