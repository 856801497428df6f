"""RULER against samples and scores of the official scripts, and what a length does not hold."""

import json
import re

import numpy as np
import pytest

from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.generate import Corpora, Request, RulerLengthError, generate
from infinicontext.evaluation.ruler.score import category_means, cleaned, length_score, sample_score, summary, task_score
from infinicontext.evaluation.ruler.tasks import CATEGORIES, TASKS
from infinicontext.evaluation.ruler.words import Pairs, pairs

COUNTS = {
    "whitespace": lambda text: len(text.split()),
    "wordpunct": lambda text: len(re.findall(r"\w+|[^\w\s]", text)),
    "bytes": lambda text: len(text.encode()),
}


def corpora(golden):
    """The texts that the reference samples were made from. A cut essay's sentences are those of the whole one up to the cut."""
    folder = golden / "ruler"
    whole = json.loads((folder / "essay_sentences.json").read_text())["sentences"]

    def sentences(text):
        found, rest = [], text
        while rest:
            sentence = whole[len(found) % len(whole)]
            if not rest.startswith(sentence):
                assert sentence.startswith(rest)
                sentence = rest
            found.append(sentence)
            rest = rest[len(sentence) :].lstrip()
        return found

    read = lambda name: json.loads((folder / name).read_text())
    return Corpora(
        essay=(folder / "essay.txt").read_text(), sentences=sentences, squad=read("mini_squad.json"), hotpotqa=read("mini_hotpotqa.json")
    )


@pytest.mark.golden
def test_official_samples(golden):
    """Every run of the official generators, to the character."""
    given, seen = corpora(golden), set()
    for path in sorted((golden / "ruler").glob("samples_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for task in dict.fromkeys(row["task"] for row in rows):
            expected = [row for row in rows if row["task"] == task]
            first = expected[0]
            request = Request(first["max_seq_length"], COUNTS[first["tokenizer"]], first["random_seed"], first["chat_template"])
            found = generate(task, request, given, first["num_samples"])
            assert len(found) == len(expected)
            for sample, row in zip(found, expected):
                where = f"{path.name} {task} {row['sample']}"
                assert sample.input == row["input"], where
                assert (sample.answer_prefix, sample.outputs, sample.length) == (row["answer_prefix"], row["outputs"], row["length"]), where
                assert sample.offsets == row["mark_chars"], where
                assert sample.index == row["sample"]
            seen.add(task)
    assert seen == set(TASKS)


@pytest.mark.golden
def test_official_scores(golden):
    folder = golden / "ruler"
    for line in (folder / "scored_samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert cleaned(row["pred"]) == row["clean"]
        assert round(100 * sample_score(row["task"], row["clean"], row["outputs"]), 2) == row["score"], row
    for file in json.loads((folder / "scored_files.json").read_text()):
        answers, references = ([row[name] for row in file["rows"]] for name in ("pred", "outputs"))
        assert task_score(file["task"], answers, references) == file["score"]
        assert f"{sum(cleaned(answer) == '' for answer in answers)}/{len(answers)}" == file["nulls"]
    found = json.loads((folder / "aggregates.json").read_text())
    for model in found["aggregates"]:
        computed = summary({int(length): score for length, score in model["scores"].items()}, model.get("threshold", 85.6))
        for name, value in model["computed"].items():
            assert computed[name] == pytest.approx(value, abs=1e-9), (model["model"], name)


def test_means_of_tasks():
    scores = {task: float(number) for number, task in enumerate(TASKS)}
    assert length_score(scores) == 6
    assert category_means(scores) == {"retrieval": 3.5, "multi-hop": 8, "aggregation": 9.5, "questions": 11.5}
    assert sum(map(len, CATEGORIES.values())) == 13
    assert "questions" not in category_means({task: 1.0 for task in TASKS if task != "qa_1"})
    with pytest.raises(UserError, match="missing: qa_1"):
        length_score({task: 1.0 for task in TASKS if task != "qa_1"})
    with pytest.raises(UserError, match="has 0 answers to 0 samples"):
        task_score("vt", [], [])


def test_pairs_are_sorted():
    """As if all had been made, also where one adjective begins another."""
    adjectives, nouns = ["old", "blue-eyed", "blue", "old-fashioned", "a"], ["zebra", "egg", "eye", "ant"]
    found = Pairs(adjectives, nouns)
    assert list(found) == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert len(pairs()) == 6_171_620
    numbers = np.linspace(0, len(pairs()) - 1, 2000).astype(int)
    drawn = [pairs()[int(number)] for number in numbers]
    assert drawn == sorted(drawn)


@pytest.mark.parametrize("task", TASKS)
def test_texts_that_do_not_fit(task, golden):
    """Where the official scripts go on for ever."""
    with pytest.raises(RulerLengthError, match=f"RULER's {task} does not fit"):
        generate(task, Request(150, COUNTS["wordpunct"]), corpora(golden), 1)


def test_what_is_missing():
    request = Request(4096, COUNTS["wordpunct"])
    for task, message in (
        ("niah_single_2", "niah_single_2 needs essays and a splitter"),
        ("qa_1", "qa_1 needs the data set squad"),
        ("qa_2", "qa_2 needs the data set hotpotqa"),
        ("niah", "RULER has no task niah; its tasks are niah_single_1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(task, request, Corpora(), 1)
    with pytest.raises(UserError, match="chat is none; it must be one of base"):
        generate("vt", Request(4096, COUNTS["wordpunct"], chat="none"), Corpora(), 1)
    with pytest.raises(UserError, match="needs the list english_words"):
        generate("cwe", Request(262144, COUNTS["wordpunct"]), Corpora(), 1)
