"""The benchmarks of tasks, of trained families and of int8 compute: their parts by hand, their rows, bad input."""

import gzip
import json

import pytest
import torch
from small_models import llama

from benchmarks import bench_compute, bench_tasks, bench_trained, language, report
from benchmarks.bench_tasks import Example, Score


class Letters:
    """A tokenizer: a letter's token is its code, 0..95."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


# ---- tasks ----------------------------------------------------------------------------------------------------------


def write_requests(path, examples):
    """A file of requests as the package has them; each example once more without its context."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, context, endings, label in examples:
            for offset, text in ((0, context), (1_000_000, "Answer:")):
                for index, ending in enumerate(endings):
                    request = {"context": text, "continuation": ending}
                    row = {"request_type": "loglikelihood", "doc_id": number + offset, "idx": index, "label": label}
                    file.write(json.dumps({**row, "request": request}) + "\n")


def test_requests(tmp_path):
    path = tmp_path / "requests.jsonl.gz"
    write_requests(path, [(7, "Two", [" b", " cc"], 1), (3, "One", [" word"], ["word"])])
    assert bench_tasks.read_requests(path) == [Example(3, "One", (" word",), 0), Example(7, "Two", (" b", " cc"), 1)]
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"request_type": "generate_until"}))
    with pytest.raises(ValueError, match=r"requests\.jsonl\.gz: expected requests of loglikelihood, got 'generate_un"):
        bench_tasks.read_requests(path)
    examples = [Example(i, "", (), 0) for i in range(10)]
    assert [e.number for e in bench_tasks.spread(examples, 4)] == [0, 2, 5, 7]
    assert bench_tasks.spread(examples, None) == bench_tasks.spread(examples, 99) == examples


def test_batches_hold_each_sequence_once_longest_first():
    lengths = [3, 9, 1, 9, 4, 2]
    found = list(bench_tasks.batches(lengths, 18))
    assert found == [[1, 3], [4, 0, 5, 2]]
    assert list(bench_tasks.batches([50], 18)) == [[0]], "one that is too long goes alone"
    assert list(bench_tasks.batches([])) == []


def test_scores_are_those_of_each_sequence_alone(monkeypatch):
    model = llama()
    sequences = [bench_tasks.encode(Letters(), "the cat sat"[:cut], " on the mat"[: 12 - cut]) for cut in (2, 11, 5)]
    monkeypatch.setattr(bench_tasks, "_TOKENS", 30)
    for (ids, n), found in zip(sequences, bench_tasks.score(model, sequences), strict=True):
        with torch.no_grad():
            chances = model(ids[None]).logits[0].log_softmax(-1)[len(ids) - n - 1 : -1]
        wanted = float(chances.gather(1, ids[-n:, None]).sum())
        assert found.likelihood == pytest.approx(wanted, rel=1e-4)
        assert found.greedy == bool((chances.argmax(-1) == ids[-n:]).all())


def test_outcomes():
    example = Example(0, "A", (" long ending", " short"), 0)
    assert bench_tasks.outcome("hellaswag", example, [Score(-10.0, False), Score(-6.0, False)])
    assert not bench_tasks.outcome("hellaswag", example, [Score(-13.0, True), Score(-5.0, False)])
    assert bench_tasks.outcome("lambada", example._replace(endings=(" x",)), [Score(-9.0, True)])


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    asked = []

    def score(_, sequences):
        asked.append(len(sequences))
        return [Score(-1.0, True)] * len(sequences)

    monkeypatch.setattr(bench_tasks, "score", score)
    monkeypatch.setattr(bench_tasks, "_TOGETHER", 2)
    path = tmp_path / "examples.jsonl"
    tasks = {"lambada": [Example(i, "A", (" b",), 0) for i in range(5)]}
    bench_tasks.run_engine("float", None, Letters(), {"lambada": tasks["lambada"][:3]}, path, set())
    with path.open("a") as file:
        file.write('{"task": "lamb')  # a kill
    done = bench_tasks.read_examples(path)["float"]
    assert list(done) == [("lambada", i) for i in range(3)]
    bench_tasks.run_engine("float", None, Letters(), tasks, path, set(done))
    assert asked == [2, 1, 2]
    assert len(bench_tasks.read_examples(path)["float"]) == 5


def test_differences_are_paired():
    base = {(task, i): i < 50 for task in bench_tasks.TASKS for i in range(100)}
    own = {key: value and key[1] != 7 for key, value in base.items() if key[1] < 80}
    row = bench_tasks.summary("INT4", own, base)
    half = 196 * (1 / 80 * 79 / 80 / 79) ** 0.5
    for task in ("LAMBADA", "HellaSwag"):
        assert row[f"{task} examples"] == 80
        assert row[f"{task} difference"] == f"-1.25 ± {half:.2f}"
    assert row["LAMBADA acc, %"] == "61.25"
    assert row["average, %"] == "61.25"
    assert row["average against float"] == f"-2.00 % ± {100 * half / 2**0.5 / 62.5:.2f}"
    assert "average, %" not in bench_tasks.summary("INT4", {("lambada", 1): True}, base)


# ---- trained families -----------------------------------------------------------------------------------------------


def test_the_language_agrees_copies_and_counts():
    ids = language.text(20_000, 5)
    assert torch.equal(ids, language.text(20_000, 5))
    assert not torch.equal(ids, language.text(20_000, 6))
    words = list(language.WORDS)
    sentences = " ".join(words[i] for i in ids.tolist()).split(" .")[:-1]
    kinds = set()
    for sentence in map(str.split, sentences):
        kinds.add(sentence[0])
        if sentence[0] == "say":
            middle = sentence.index("again")
            assert sentence[1:middle] == sentence[middle + 1 :]
        elif sentence[0] == "count":
            assert len(sentence) - 2 == int(sentence[1].removeprefix("number"))
        else:
            subject = next(word for word in sentence if word.startswith("noun"))
            assert {word[-1] for word in sentence if word.startswith("verb")} == {subject[-1]}
    assert kinds == {"the", "say", "count"}


@pytest.mark.parametrize("family", bench_trained.FAMILIES)
def test_families_learn_and_their_layers_run_as_one_operator(family):
    model, ids = bench_trained.build(family), language.text(5_000, 0)
    texts = ids[:512].view(-1, bench_trained.WINDOW).unbind()
    before = float(bench_trained.scores(model.eval(), texts)[1].mean())
    bench_trained.train(model, ids, steps=8, batch=4)
    case = bench_trained.case_of(model, texts, sequences=2, length=32)
    assert float(case.losses.mean()) < before - 0.3
    row = bench_trained.measure(model, case, "rtn,none,32")
    assert row["layers as one op"] == "3 of 3"
    assert row["bits per weight"] == 4.5
    assert row["loss, fp32 compute"] == pytest.approx(float(case.losses.mean()), rel=0.01)


def test_rows_of_a_directory(tmp_path, monkeypatch, capsys):
    llama().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("One small story.<|endoftext|>\nAnother one, longer than that.<|endoftext|>\n")
    letters = Letters()
    letters.bos_token_id = 1
    monkeypatch.setattr(bench_trained.AutoTokenizer, "from_pretrained", lambda _: letters)
    rows = tmp_path / "stories.jsonl"
    options = ["--recipe", "gptq,none,32", "--recipe", "rtn,none,mix5.5", "--length", "16"]
    command = ["directory", str(tmp_path / "model"), "--text", str(text), "--sequences", "4", "--json", str(rows)]
    bench_trained.main([*command, *options])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["recipe and weights"].partition(";")[0] for row in found] == ["float", "GPTQ", "RTN"]
    assert found[2]["bits per weight"] <= 5.5
    texts = bench_trained.texts_of(text, letters)
    assert [len(piece) for piece in texts] == [17, 31]
    assert int(texts[1][0]) == 1
    assert "GPTQ; INT4 g32, symmetric" in report.table("stories", tmp_path)
    capsys.readouterr()


def test_unigram_loss():
    assert bench_trained.unigram_loss(torch.tensor([0, 0, 3, 3])) == pytest.approx(0.6931, abs=1e-4)


# ---- int8 against fp32 compute --------------------------------------------------------------------------------------


def test_rows_of_compute(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_compute, "WINDOW", 32)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 8)
    command = ["--text", str(text), "--windows", "2", "--weights", "file", "--json", str(tmp_path / "compute.jsonl")]
    bench_compute.main(command)
    row = json.loads((tmp_path / "compute.jsonl").read_text())
    assert row["tokens scored"] == 62
    assert row["perplexity, int8 compute"] == pytest.approx(row["perplexity, fp32 compute"], rel=0.05)
    assert 0 < row["KL"] < 0.02
    assert "int8 against fp32" in report.table("compute", tmp_path)
    capsys.readouterr()
