"""Books and summaries: what of a book is read, that no summary is cut, scores by hand, and what a user sees from training to the report."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinicontext.cli import main
from infinicontext.data.books import PIECE, BookData, books, encoded_books, load_books, shortened
from infinicontext.data.pipeline import PasskeyData, fingerprint, train_batches, validation_batches
from infinicontext.data.tokenizers import ByteTokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation import summarisation
from infinicontext.evaluation.suite import Evaluation, evaluate
from infinicontext.evaluation.summarisation import SummarisationEvaluation, Words, evaluate_summaries, mean_scores
from infinicontext.inference.generate import Completion

BYTES = ByteTokenizer()
NEARLY_ALL = 1 - 1e-9  # of the books are for validation


def write(path, *pairs) -> str:
    path.write_text("".join(json.dumps({"book": book, "summary": summary}) + "\n" for book, summary in pairs))
    return str(path)


def encoded(folder, book: str, summary: str, **options):
    data = BookData(write(folder / "one.jsonl", (book, summary)), validation_fraction=NEARLY_ALL, **options)
    ((_, parts),) = encoded_books(data, BYTES, "validation")
    return parts


# What is read.


@given(size=st.integers(1, 3000), room=st.integers(1, 3000), part=st.sampled_from(["start", "spread"]))
def test_a_part_of_a_book(size, room, part):
    """As much as there is room for, in order; spread: from the first token to the last, in pieces that are whole but for the last."""
    book_K = np.arange(size)
    read = shortened(book_K, room, part)
    assert len(read) == min(size, room)
    assert (np.diff(read) > 0).all()
    assert read[0] == 0
    if part == "start" or size <= room or room <= PIECE:
        assert read[-1] == len(read) - 1
    else:
        assert read[-1] == size - 1
        gaps = np.diff(read) - 1
        assert set(np.flatnonzero(gaps) + 1) <= set(range(PIECE, room, PIECE))
        between = gaps[PIECE - 1 :: PIECE]
        assert between.max() - between.min() <= 1


def test_a_prompt_by_hand(tmp_path):
    parts = encoded(tmp_path, "A long tale.", "It ends.", question="What?")
    assert parts.answer.tolist() == [*b" It ends.", 256]
    around = len("User: \n\nWhat?\nAssistant:") + 1
    prompt, share = parts.prompt(around + 6, "start")
    assert prompt.tolist() == [256, *b"User: A long\n\nWhat?\nAssistant:"]
    assert share == 0.5
    prompt, share = parts.prompt(1000, "start")
    assert prompt.tolist() == [256, *b"User: A long tale.\n\nWhat?\nAssistant:"]
    assert share == 1
    assert prompt.dtype == np.int32
    with pytest.raises(UserError, match=f"the question alone takes {around} tokens, so no book fits in {around}"):
        parts.prompt(around, "start")


def test_rows_hold_whole_summaries(tmp_path, capsys):
    """The book gives way; where even that is not enough, the pair is left out and counted."""
    pairs = [(letter * 300, f"{letter} summary") for letter in "abcd"] + [("e" * 300, "long " * 100)]
    data = BookData(write(tmp_path / "books.jsonl", *pairs), length=120, question="?", validation_fraction=NEARLY_ALL)
    found = load_books(data, BYTES, "validation")
    assert "of the 5 books of its validation split, 1 are left out" in capsys.readouterr().err
    assert np.diff(found.starts).tolist() == [121] * 4
    room = 121 - len("<User: \n\n?\nAssistant: a summary>")
    for start, (book, summary) in zip(found.starts, pairs[:4]):
        tokens, answers = found.tokens[start : start + 121], found.answers[start : start + 121]
        assert BYTES.decode(tokens[answers]) == f" {summary}"
        assert tokens[-1] == 256
        assert BYTES.decode(tokens[~answers]) == f"User: {book[:room]}\n\n?\nAssistant:"
    (batch,) = validation_batches(data, 4, 1, 0)
    assert batch["answer_mask"].sum() == sum(len(f" {summary}") + 1 for _, summary in pairs[:4])
    with pytest.raises(UserError, match=r"data.length 20 there is room for no summary"):
        load_books(BookData(data.source, length=20, validation_fraction=NEARLY_ALL), BYTES, "validation")
    with pytest.raises(UserError, match="has no book in its train split"):
        next(train_batches(data, 4, seed=0, step=0))


def test_templates_of_pretrained_families(tmp_path):
    parts = encoded(tmp_path, "B {x}", "S", question="Q")
    assert BYTES.decode(np.concatenate([parts.before, parts.book_K, parts.after, parts.answer])) == "User: B {x}\n\nQ\nAssistant: S"
    with pytest.raises(UserError, match=r"no token <\|im_end\|>"):
        encoded(tmp_path, "B", "S", template="chatml")


def test_the_examples_are_whole_and_in_both_splits():
    found = list(books("examples"))
    assert len({book.text for book in found}) == 10
    assert all(len(book.summary) < len(book.text) / 2 for book in found)
    sizes = [len(load_books(BookData(), BYTES, split).starts) - 1 for split in ("train", "validation")]
    assert sum(sizes) == 10
    assert min(sizes) >= 2


def test_summaries_of_one_book_are_in_one_split(tmp_path):
    lines = [(f"book {i} " * 9, f"summary {i} {j}") for i in range(20) for j in range(3)]
    data = BookData(write(tmp_path / "b.jsonl", *lines), validation_fraction=0.3)
    texts = [{book.text for book, _ in encoded_books(data, BYTES, split)} for split in ("train", "validation")]
    assert all(texts)
    assert not texts[0] & texts[1]


def test_words_of_any_script():
    assert Words().tokenize("Schön! Über_uns: हिन्दी, 日本 2x") == ["schön", "über", "uns", "हिन्दी", "日本", "2x"]


def test_fingerprint_is_of_the_contents(tmp_path):
    one, same, other = (fingerprint(BookData(write(tmp_path / "b.jsonl", ("book", summary)))) for summary in ("s", "s", "t"))
    assert one == same != other


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[]", "line 1 is not a JSON object"),
        ('{"book": "b"}', "line 1: summary is missing"),
        ('{"book": " ", "summary": "s"}', "line 1: book is empty"),
        ('{"book": 1, "summary": "s"}', "line 1: book is not a text"),
        ("", "which holds no book"),
    ],
)
def test_malformed_files(line, complaint, tmp_path):
    (tmp_path / "books.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=complaint):
        list(books(str(tmp_path / "books.jsonl")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "end"}, 'data.part is "end"; it must be one of start, spread'),
        ({"template": "x"}, 'data.template is "x"'),
        ({"length": 0}, "data.length is 0"),
        ({"validation_fraction": 1.0}, "data.validation_fraction is 1.0"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BookData(**options)


# Scores.


def test_scores_by_hand(tmp_path, monkeypatch):
    """Two books: one summarised word by word, one with two words of four in another order."""
    data = BookData(write(tmp_path / "b.jsonl", ("x" * 90, "One two three four!"), ("y" * 9, "a b c d")), validation_fraction=NEARLY_ALL)
    said = {"x": " one two, three four", "y": "d a"}
    read = []

    def answer(model, prompts, options, first_row):
        assert len(prompts) == 3, "batches are filled up"
        read.extend(len(prompt) for prompt in prompts[:2])
        return [Completion(BYTES.encode(said[chr(prompt[len("User: ") + 1])]), "stop") for prompt in prompts]

    monkeypatch.setattr(summarisation, "generate", answer)
    config = SummarisationEvaluation(batch_size=3, predictions=True)
    evaluate = lambda about: evaluate_summaries(None, BYTES, data, config, [20, 80, 1000], segment=8, seed=0, file=file, about=about)
    file, counted = tmp_path / "eval.jsonl", lambda result: result["by_length"][0] | {"seconds": 0}
    result = evaluate({"model": 1})
    # What was written before an interruption is not written again; what another model has written is not used.
    assert counted(evaluate({"model": 1})) == counted(result)
    assert len(read) == 4
    evaluate({"model": 2})
    assert read[:4] == read[4:]
    del read[4:]
    assert [entry["length"] for entry in result["skipped"]] == [20]
    short, long = result["by_length"]
    around = len("User: \n\nWhat happens in this book?\nAssistant:") + 1
    assert read == [80, around + 9, around + 90, around + 9]
    assert short["share_read"] == pytest.approx(((80 - around) / 90 + 1) / 2)
    assert long["share_read"] == 1
    # The second: precision 2/2 and recall 2/4 of single words; no pair; the longest common subsequence is one word.
    assert (long["rouge1"], long["rouge2"], long["rougeL"]) == pytest.approx(((1 + 2 / 3) / 2, 1 / 2, (1 + 1 / 3) / 2))
    assert long["overall"] == pytest.approx(math.cbrt(long["rouge1"] * long["rouge2"] * long["rougeL"]))
    low, high = long["interval"]
    assert 0 <= low < long["overall"] < high <= 1
    assert [(entry["length"], entry["prediction"], entry["rouge2"]) for entry in result["predictions"]] == [
        (80, "one two, three four", 1), (80, "d a", 0), (1000, "one two, three four", 1), (1000, "d a", 0)
    ]  # fmt: skip
    assert "rouge-score" in result["protocol"]


def test_the_overall_score_is_the_papers():
    """Table 4: the cube root of the product of the three means."""
    for *scores, overall in ((40.0, 8.8, 17.9, 18.5), (37.9, 8.7, 17.6, 18.0), (36.4, 7.6, 15.3, 16.2)):
        found = mean_scores(np.array([scores]), 0)
        assert found["overall"] == pytest.approx(overall, abs=0.05)
        assert found["interval"] is None


@pytest.mark.parametrize("options", [{"books": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_evaluations_that_are_refused(options):
    with pytest.raises(UserError, match=rf"evaluation\.summarisation\.{next(iter(options))} is"):
        SummarisationEvaluation(**options)


# End to end.

EXPERIMENT = """
import dataclasses
import importlib.util

from infinicontext.models.transformer import TransformerConfig

spec = importlib.util.spec_from_file_location("book_summarization", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def small():
    experiment = module.tiny()
    model = TransformerConfig(dim=16, layers=1, heads=2, feed_forward=16, attention="window", window=32, remat=False)
    data = dataclasses.replace(experiment.data, length=300)
    return dataclasses.replace(experiment, model=model, data=data, steps=1, validation_batches=1)
"""


def test_from_training_to_the_report(tmp_path, monkeypatch, capsys, request):
    """The bundled books, offline; `generate` stops where summaries end."""
    monkeypatch.chdir(tmp_path)
    path = request.config.rootpath / "experiments" / "book_summarization.py"
    (tmp_path / "small.py").write_text(EXPERIMENT.format(path=str(path)))
    with jax.numpy_dtype_promotion("standard"):
        main(["train", "small.py:small", "--workdir", "run"])
        options = ["--evaluation.summarisation.max-new-tokens", "8", "--evaluation.summarisation.predictions", "True"]
        main(["eval", "run", "--lengths", "10", "128", "--tasks", "summarisation", "perplexity", *options])
        main(["compare", "run", "--output", "report"])
    tasks = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]
    (entry,) = tasks["summarisation"]["by_length"]
    assert entry["length"] == 128
    assert 0 < entry["share_read"] < 0.2
    assert len(tasks["summarisation"]["predictions"]) == entry["books"] == 2
    assert tasks["perplexity"]["tokens"] > 100
    printed = capsys.readouterr().out
    assert f"{100 * entry['overall']:.3g}% @128" in printed
    assert (tmp_path / "report" / "summaries-by-length.png").exists()
    assert "summarisation at 10 tokens: the question alone takes" in (tmp_path / "report" / "report.html").read_text()


def test_summaries_need_books():
    with pytest.raises(UserError, match="summarisation, which needs BookData, but data is PasskeyData"):
        next(evaluate(None, Evaluation(tasks=("summarisation",)), PasskeyData(), validation=[], validation_nll=0.0, say=print))
