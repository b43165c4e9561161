"""Evaluation: windows by hand, perplexity and KL against plain formulas; calibration tokens; bad inputs."""

import json
import math
import subprocess
import sys

import pytest
import torch
from small_models import llama
from torch.nn import functional as F

from torch_cpullm import calibration
from torch_cpullm.calibration import calibration_ids, self_generated, text_ids
from torch_cpullm.quality import evaluate, harness, logits_of, score_lines, window_logits, windows


class Letters:
    """A tokenizer: a letter's token is its code, 0..95."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


IDS = torch.randint(96, (50,), generator=torch.Generator().manual_seed(3))


def test_windows():
    assert windows(50, 20) == [(0, 20, 1), (20, 40, 1)]
    assert windows(50, 20, "llama") == [(0, 20, 11), (20, 40, 11)]
    assert windows(50, 20, "sliding", 8) == [(0, 20, 1), (8, 28, 12), (16, 36, 12), (24, 44, 12), (32, 50, 12)]
    assert windows(10, 20, "sliding", 8) == [(0, 10, 1)]
    scored = sum(end - begin - first for begin, end, first in windows(50, 20, "sliding", 8))
    assert scored == 49, "every token but the first, once"
    assert windows(41, 20, "sliding") == [(0, 20, 1), (20, 40, 1)], "a token alone cannot be scored"


@pytest.mark.parametrize(("convention", "stride"), [("plain", None), ("llama", None), ("sliding", 7)])
def test_perplexity_kl_and_agreement_are_the_plain_formulas(convention, stride):
    model, other = llama(), llama(tied=False).eval()
    losses, kl, same, difference = [], [], [], []
    for begin, end, first in windows(50, 16, convention, stride):
        part = IDS[begin:end]
        a, b = (logits_of(m, part).log_softmax(-1)[first - 1 : -1] for m in (model, other))
        losses.append(F.nll_loss(a, part[first:], reduction="none"))
        difference.append(losses[-1] - F.nll_loss(b, part[first:], reduction="none"))
        kl.append((b.exp() * (b - a)).sum(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
    found = evaluate(model, IDS, window=16, convention=convention, stride=stride, reference=other)
    assert found.tokens == len(torch.cat(losses))
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float(torch.cat(same).float().mean()))
    assert found.loss_difference == pytest.approx(float(torch.cat(difference).mean()), rel=1e-3, abs=1e-6)
    half = 1.96 * float(torch.cat(losses).std()) / math.sqrt(found.tokens)
    assert found.loss_interval == pytest.approx(half, rel=1e-4)
    assert f"windows of 16, {convention}" in str(found)
    if stride is None:
        kept = window_logits(other, IDS, window=16, convention=convention)
        assert evaluate(model, IDS, window=16, convention=convention, reference=kept).kl == pytest.approx(found.kl)


def test_a_model_agrees_with_itself_and_bos_takes_the_first_place():
    model = llama()
    found = evaluate(model, IDS, window=20, reference=model)
    assert (found.kl, found.top1, found.loss_difference) == (0, 1, 0)
    changed = IDS.clone()
    changed[[0, 20]] = 1
    assert evaluate(model, IDS, window=20, bos=1).loss == evaluate(model, changed, window=20).loss
    assert "kl" not in evaluate(model, IDS, window=20).as_dict()


def test_bad_input():
    model = llama()
    for options, text in (
        ({"convention": "best"}, "convention must be one of plain, llama, sliding, got 'best'"),
        ({"window": 3}, "window must be an integer of at least 4"),
        ({"window": 64}, "the text has 50 tokens, fewer than one window of 64"),
        ({"window": 16, "stride": 4}, "stride is for the sliding convention"),
        ({"window": 16, "stride": 17, "convention": "sliding"}, "stride must be an integer from 1 to the window, 16"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate(model, IDS, **options)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.95, got 0\.\.96"):
        evaluate(model, torch.tensor([0, 96]), window=4)
    with pytest.raises(ValueError, match="token ids are empty"):
        evaluate(model, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="the ids of one text"):
        evaluate(model, IDS[None])
    with pytest.raises(ValueError, match=r"the reference has logits \[15, 90\], the model \[15, 96\]"):
        evaluate(model, IDS, window=16, reference=[torch.zeros(15, 90)] * 3)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or inf in the window of tokens 0\.\.15"):
        evaluate(model, IDS, window=16)


# ---- calibration tokens ---------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_tokens(tmp_path):
    model, text = llama(), "".join(chr(97 + i % 23) for i in range(100))
    file = tmp_path / "text.txt"
    file.write_text(text)
    ids = text_ids(text, Letters())
    sources = [
        text,
        file,
        str(file),
        [text],
        ids,
        [{"text": text}],
        [{"input_ids": ids.tolist()}],
        [ids[:60], ids[60:]],
    ]
    for source in sources:
        found = calibration_ids(source, Letters(), model, sequences=3, length=10)
        assert torch.equal(found, torch.stack([ids[i : i + 10] for i in (0, 30, 60)])), source
    assert calibration_ids(ids, None, model, sequences=50, length=30).shape == (3, 30)
    assert torch.equal(calibration_ids(ids.view(4, 25), None, model, sequences=2, length=20), ids.view(4, 25)[:2, :20])


def test_self_generated_tokens_are_seeded_and_leave_the_generator_alone():
    model = llama().eval()
    state = torch.random.get_rng_state()
    first = self_generated(model, 3, 12, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (3, 12)
    assert torch.equal(first, calibration_ids(None, None, model, sequences=3, length=12, seed=5))
    assert not torch.equal(first, self_generated(model, 3, 12, seed=6))
    assert int(first.min()) >= 0
    assert int(first.max()) < 96


def test_generated_at_once_is_bounded_by_bytes():
    """Elsewhere than on the CPU: keys, values and what a token is drawn from; nothing is computed here."""
    gpu, model = torch.device("cuda"), llama()
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4
    sampled = 16 * config.vocab_size
    assert calibration._together(model, torch.device("cpu"), 512) == 16
    assert calibration._together(model, gpu, 16) == calibration._MOST
    length = 2_000_000
    assert calibration._together(model, gpu, length) == calibration._BYTES // (length * per_token + sampled)
    assert calibration._together(model, gpu, 10**9) == 1
    config_of = type("Config", (), {"get_text_config": lambda self: self})
    bare = config_of()  # of a model without attention
    bare.hidden_size, bare.num_hidden_layers, bare.vocab_size = config.hidden_size, 2, config.vocab_size
    other = type("Model", (), {"config": bare, "generate": None, "dtype": torch.float32})()
    assert calibration._together(other, gpu, length) == calibration._BYTES // (
        length * 2 * 2 * config.hidden_size * 4 + sampled
    )
    half = calibration._together(model.to(torch.bfloat16), gpu, length)
    assert half == calibration._BYTES // (length * per_token // 2 + sampled)


def test_unusable_calibration_data():
    model = llama()
    for source, text in (
        ("", "the text is empty"),
        ("  \n", "the text is empty"),
        ("short", "has 5 tokens, fewer than one sequence of 10"),
        ([], "calibration data is empty"),
        (torch.tensor([1, 2, 99]), r"must lie in 0\.\.95"),
        (torch.rand(30), "must be an int64 or int32 tensor"),
        ([{"words": "x"}], "must have 'input_ids' or 'text', got words"),
    ):
        with pytest.raises(ValueError, match=text):
            calibration_ids(source, Letters(), model, length=10)
    for source in (5, [5]):
        with pytest.raises(TypeError, match="must be a file, texts, token ids or a data set"):
            calibration_ids(source, Letters(), model)
    with pytest.raises(ValueError, match="sequences must be a positive integer, got 0"):
        calibration_ids("text", Letters(), model, sequences=0)


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------


def test_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'torch_cpullm\[eval\]'"):
        harness(llama(), Letters(), ["hellaswag"])


def test_scores_as_lines():
    results = {"quiz": {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.25}}
    assert list(score_lines(results)) == ["quiz: acc 0.5000 +- 0.1960", "quiz: f1 0.2500"]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_eval_on_the_command_line(tmp_path):
    from smollm2 import gguf_path

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4)
    command = [sys.executable, "-m", "torch_cpullm", "eval", str(gguf_path())]
    options = ["--window", "16", "--convention", "llama", "--json"]
    done = subprocess.run([*command, str(text), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["window"] == 16
    assert 1 < found["perplexity"] < 1000
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give a text file, or tasks with --task" in done.stderr
