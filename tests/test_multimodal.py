"""Models for text and pictures: the text model is packed and runs as programs, all else stays and is reported."""

import copy
import inspect

import pytest
import torch
import transformers
from families import VERSION, llama_like, randomise
from transformers import AutoModelForImageTextToText

import torch_cpullm
from torch_cpullm import CpuLlmConfig

IMAGE = 250  # the token whose place a picture's embeddings take
TEXT = {**llama_like(), "vocab_size": 257, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CONFIGS = {
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(projection_dim=16, **TOWER),
        image_token_index=IMAGE,
        image_seq_length=4,
    ),
    "qwen2-vl": lambda: transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 80, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 24, "sliding_window": 7, "query_pre_attn_scalar": 24},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=251,
        eoi_token_index=252,
    ),
}


def build(name):
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(CONFIGS[name](), dtype=torch.float32)
    randomise(model)
    return model.eval()


def inputs(name):
    """A picture of four tokens in the middle of a text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, 9, 252, IMAGE, IMAGE, IMAGE, IMAGE, 253, 77, 31]])
    if name == "qwen2-vl":  # patches of 3 channels, 2 frames, 4 x 4 pixels; merged two by two
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        extra = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        if "mm_token_type_ids" in inspect.signature(transformers.Qwen2VLModel.forward).parameters:  # not in 5.0
            extra["mm_token_type_ids"] = (ids == IMAGE).int()
        return {"input_ids": ids, "pixel_values": pixels, **extra}
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if name == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).int()
    return given


def logits(model, name):
    with torch.no_grad():
        return model(**inputs(name)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_model_is_packed(name, tmp_path):
    settings = CpuLlmConfig(compute="fp32")
    model = torch_cpullm.optimize(build(name), settings)
    report = torch_cpullm.report(model)
    for row in report.rows:
        inside = row.name.startswith("model.language_model.") or row.name == "lm_head"
        assert (row.state != "float") == inside, row.name
        if not inside and row.kind == "linear":
            assert (
                row.reason in ("outside of the text model, model.language_model", "not a linear layer")
                or "-D" in row.reason
            )
    assert "outside of the text model" in str(report)
    mixes = name == "qwen2-vl" and VERSION < (5, 17)  # there each layer mixes the axes of its positions itself
    assert {row.level for row in report.layers} == {"per-linear ops" if mixes else "one op"}
    assert ("its positions have several axes" in " ".join(str(report).split())) == mixes

    got, want = logits(model, name), torch_cpullm.restore(copy.deepcopy(model))
    assert torch.allclose(got, logits(want, name), atol=2e-4)
    other = {key: -value if key == "pixel_values" else value for key, value in inputs(name).items()}
    with torch.no_grad():
        assert not torch.allclose(model(**other).logits, got, atol=0.05)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs(name), **options), want.generate(**inputs(name), **options))

    build(name).save_pretrained(tmp_path / "float")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "float", quantization_config=settings)
    assert torch.equal(logits(loaded, name), got)
    assert str(torch_cpullm.report(loaded)) == str(report)
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, name), got)
    assert all(
        row.state == "float" for row in torch_cpullm.report(again).rows if "vision" in row.name or "visual" in row.name
    )


def test_strict_names_what_is_outside():
    with pytest.raises(ValueError, match=r"(?s)strict=True, but .*vision_tower.*: outside of the text model"):
        torch_cpullm.optimize(build("llava"), strict=True)
