"""RULER against samples and scores of the official scripts, and what a length does not hold."""

import dataclasses
import hashlib
import http.client
import io
import json
import re
import shutil
import urllib.error
import urllib.request
from collections import Counter

import jax
import nltk
import numpy as np
import pytest

from infinicontext import cli
from infinicontext.data.pipeline import CorpusData
from infinicontext.data.tokenizers import ByteTokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation import questions
from infinicontext.evaluation.needle import Needle
from infinicontext.evaluation.ruler import corpora as corpora_file
from infinicontext.evaluation.ruler import published
from infinicontext.evaluation.ruler.corpora import load_corpora
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation, evaluate_ruler
from infinicontext.evaluation.ruler.generate import Corpora, Request, RulerLengthError, generate
from infinicontext.evaluation.ruler.score import category_means, cleaned, length_score, sample_score, summary, task_score
from infinicontext.evaluation.ruler.tasks import CATEGORIES, TASKS, continuation
from infinicontext.evaluation.ruler.words import Pairs, pairs
from infinicontext.evaluation.runs import Run
from infinicontext.evaluation.suite import Evaluation, corpora_of
from infinicontext.evaluation.training_questions import write_questions
from infinicontext.experiment import Experiment, to_plain
from infinicontext.inference.generate import Completion
from infinicontext.inference.score import Scored
from infinicontext.models.transformer import TransformerConfig
from infinicontext.training.evaluate import is_evaluated

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
    of_length = found["length_average"]
    assert length_score(of_length["task_scores"]) == pytest.approx(of_length["value"], abs=1e-9)


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


@pytest.mark.parametrize("length", [3185, 2915])
def test_sizes_too_small_to_draw(length):
    """A text that shrinks below the lines that its assignments need does not fit, and says so."""
    with pytest.raises(RulerLengthError, match=f"RULER's vt does not fit {length} tokens"):
        generate("vt", Request(length, len, example_budget=2000), Corpora(), 3)


def test_training_asks_other_questions(golden, tmp_path, monkeypatch):
    """qa reads its questions from a file, whatever the seed; those that the benchmark asks are left to it."""
    data = json.loads((golden / "ruler" / "mini_squad.json").read_text())
    request = Request(4000, lambda text: len(text.split()))
    first, later = (generate("qa_1", dataclasses.replace(request, first=n), Corpora(squad=data), 3) for n in (0, 3))
    assert not {sample.input for sample in first} & {sample.input for sample in later}
    everything = generate("qa_1", request, Corpora(squad=data), 6)
    assert [sample.outputs for sample in everything] == [sample.outputs for sample in first + later]
    (tmp_path / "squad.json").write_text(json.dumps(data))
    said = []
    evaluation = Evaluation(ruler=RulerEvaluation(folder=str(tmp_path)))
    with pytest.raises(UserError, match="none of qa_1 could be made"):
        write_questions(tmp_path / "out.jsonl", ByteTokenizer(), evaluation, ["qa_1"], [16384], 2, 1, said.append)
    assert "questions, not 2 after the first 500" in said[0]


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


class Pieces:
    """A tokenizer of words, signs and spaces that learns its vocabulary as it goes, for models that are none."""

    name, start_id, end_id, vocab_size, stop_ids = "pieces", None, None, 10**6, frozenset()

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return np.array([self.ids.setdefault(piece, len(self.ids)) for piece in re.findall(r"\s|\w+|[^\w\s]", text)], np.int32)

    def decode(self, ids):
        pieces = list(self.ids)
        return "".join(pieces[i] for i in ids)

    def fingerprint(self):
        return "pieces"


@pytest.fixture
def folder(golden, tmp_path):
    """Corpora as a user would have them."""
    source = golden / "ruler"
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": (source / "essay.txt").read_text()}))
    shutil.copy(source / "mini_squad.json", tmp_path / "squad.json")
    shutil.copy(source / "mini_hotpotqa.json", tmp_path / "hotpotqa.json")
    return tmp_path


@pytest.mark.parametrize("shuffle", [False, True])
def test_who_knows_the_answers_has_all_points(folder, monkeypatch, shuffle):
    """And who gives those of other samples has few."""
    tokenizer, config = Pieces(), RulerEvaluation(samples=6, folder=str(folder), splitter="regex", example_budget=1000)
    prompts = {}
    for task in TASKS:
        request = Request(2048, lambda text: len(tokenizer.encode(text)), example_budget=1000)
        samples = generate(task, request, load_corpora(str(folder), (task,), "regex").corpora, config.samples)
        for sample, other in zip(samples, samples[1:] + samples[:1]):
            prompts[sample.input + sample.answer_prefix] = (other if shuffle else sample).outputs
    said = lambda row: tokenizer.encode(" ".join(prompts[tokenizer.decode(row)]))
    answers = lambda model, rows, options: [Completion(said(row)[: options.max_new_tokens], "stop") for row in rows]
    monkeypatch.setattr("infinicontext.evaluation.questions.generate", answers)
    found = evaluate_ruler(None, tokenizer, config, [2048], segment=512)
    assert not found["skipped"]
    (entry,) = found["by_length"]
    scores = {task: result["score"] for task, result in entry["tasks"].items()}
    if shuffle:
        assert entry["score"] < 10
        assert found["summary"]["effective_label"] == "<2048"
        assert entry["categories_passed"] == []
    else:
        assert set(scores.values()) == {100.0}, scores
        assert entry["score"] == 100
        assert found["summary"]["effective_label"] == ">2048"
        assert entry["categories_passed"] == list(CATEGORIES)
    assert "Not comparable" in found["protocol"]


def test_what_bytes_can_reach_is_said(monkeypatch):
    """The ten common words, numbered, take more than RULER's 120 bytes; the five names of vt, spaces between them, take 29 of its 30."""
    config, said = RulerEvaluation(tasks=("vt", "cwe", "niah_single_1"), samples=2, example_budget=2000), []
    empty = lambda model, rows, options: [Completion(np.zeros(0, np.int32), "stop")] * len(rows)
    monkeypatch.setattr("infinicontext.evaluation.questions.generate", empty)
    found = evaluate_ruler(None, ByteTokenizer(), config, [4000], segment=512, say=said.append)
    tasks = found["by_length"][0]["tasks"]
    assert 50 < tasks["cwe"]["ceiling"] < 100
    assert "ceiling" not in tasks["vt"]
    assert "ceiling" not in tasks["niah_single_1"]
    # Nobody is right with another sample's number.
    assert tasks["niah_single_1"]["chance"] == 0
    assert f"of {tasks['cwe']['ceiling']:.2f}% that fit" in said[1]


def test_right_answers_are_listed_as_the_examples_are():
    """vt's prompt ends with a space and its example has names with spaces between; cwe's example is numbered."""
    request = Request(4096, COUNTS["wordpunct"], example_budget=1000)
    for task, pattern in (("vt", r"[A-Z]{5}( [A-Z]{5}){4}"), ("cwe", r" 1\. \S+( \d+\. \S+){9}"), ("niah_single_1", r" \d{7}")):
        (sample,) = generate(task, request, Corpora(), 1)
        assert re.fullmatch(pattern, continuation(task, sample.input + sample.answer_prefix, sample.outputs)), task
    assert continuation("niah_multivalue", "2 and 1 are", ["1", "2"]) == " 2, 1"
    assert continuation("niah_multiquery", "2 and 1 are", ["1", "2"]) == " 1, 2"
    assert continuation("qa_1", "Answer:", ["Paris", "the city of Paris"]) == " Paris"


def test_right_answers_can_be_known_from_their_prompts(folder):
    """With their order, which teacher forcing asks for: of cwe and multivalue, where they first stand."""
    tokenizer, config = Pieces(), RulerEvaluation(folder=str(folder), splitter="regex", example_budget=1000)

    def cases(task):
        loaded = load_corpora(str(folder), (task,), "regex")
        for sample in generate(task, config.request(4096, tokenizer), loaded.corpora, 4):
            prompt = sample.input + sample.answer_prefix
            yield prompt, continuation(task, prompt, sample.outputs)

    for prompt, right in cases("cwe"):
        words = re.findall(r"\d+\. (\S+)", prompt.split("Below is a numbered list")[-1].split("Question")[0])
        often = {word for word, _ in Counter(words).most_common(10)}
        listed = [word for word in dict.fromkeys(words) if word in often]
        assert right == "".join(f" {number}. {word}" for number, word in enumerate(listed, 1))
    for prompt, right in cases("niah_multivalue"):
        key = re.search(r"numbers for (\S+) mentioned", prompt)[1]
        assert right == " " + ", ".join(re.findall(rf"for {key} is: (\d+)\.", prompt))


def test_training_questions_have_no_place_where_answers_always_are(tmp_path):
    """What the generators draw once for all samples of a seed is drawn often enough that it cannot be learnt by heart."""
    write_questions(tmp_path / "questions.jsonl", Pieces(), Evaluation(ruler=RulerEvaluation(samples=1)), ["fwe"], [1024], 80, 1)
    rows = list(map(json.loads, (tmp_path / "questions.jsonl").read_text().splitlines()))
    assert len({row["prompt"] for row in rows}) == len(rows) == 80
    places = Counter(row["prompt"].split().index(row["response"].split()[0].strip(",")) for row in rows)
    assert max(places.values()) <= 40


def test_needles_by_depth(monkeypatch):
    """Who reads the second half of a prompt alone names the needles that stand there."""
    tokenizer = Pieces()

    def answers(model, rows, options):
        seen = [tokenizer.decode(row[len(row) // 2 :]) for row in rows]
        return [Completion(tokenizer.encode(" ".join(re.findall("[0-9]{7}", text))), "stop") for text in seen]

    monkeypatch.setattr("infinicontext.evaluation.questions.generate", answers)
    config = RulerEvaluation(tasks=("niah_single_1",), samples=20, predictions=True)
    found = evaluate_ruler(None, tokenizer, config, [1024], segment=512)
    scores = {cell["depth"]: cell["score"] for cell in found["by_depth"]}
    assert len(scores) > 5
    assert {score for depth, score in scores.items() if depth < 0.4} == {0}
    assert {score for depth, score in scores.items() if depth > 0.6} == {100}
    assert sum(cell["needles"] for cell in found["by_depth"]) == 20
    assert found["by_length"][0]["tasks"]["niah_single_1"]["mean_length"] <= 1024
    assert all(len(row["depths"]) == 1 and row["length_actual"] <= 1024 for row in found["predictions"])


def test_teacher_forced(folder, monkeypatch):
    """Each token of the right answer counts; of a question's right answers the first is read."""
    tokenizer, read = Pieces(), []

    def score(model, prompts, continuations, segment):
        read.extend(tokenizer.decode(row) for row in continuations)
        # Of the first of each batch the last token is wrong.
        wrong = lambda row: np.arange(len(row)) == len(row) - 1
        return [Scored(np.zeros(len(row)), row - wrong(row) * (number == 0)) for number, row in enumerate(continuations)]

    monkeypatch.setattr("infinicontext.evaluation.questions.score", score)
    config = RulerEvaluation(tasks=("niah_multivalue", "qa_1"), samples=4, folder=str(folder), splitter="regex", mode="teacher_forced")
    found = evaluate_ruler(None, tokenizer, config, [2048], segment=512)
    tasks = found["by_length"][0]["tasks"]
    assert found["mode"] == "teacher_forced"
    assert {name: tasks[name]["score"] for name in tasks} == {"niah_multivalue": 75, "qa_1": 75}
    assert 75 < tasks["niah_multivalue"]["tokens"] < 100
    assert "summary" not in found
    assert "Not comparable" in found["protocol"]
    assert [text.count(",") for text in read] == [3] * 4 + [0] * 4


def test_a_task_whose_logits_are_no_numbers_is_left_out(monkeypatch):
    def breaks(model, rows, options):
        if max(map(len, rows)) > 1500:
            raise UserError("the model's logits are not finite")
        return [Completion(np.zeros(0, np.int32), "stop")] * len(rows)

    monkeypatch.setattr("infinicontext.evaluation.questions.generate", breaks)
    found = evaluate_ruler(None, ByteTokenizer(), RulerEvaluation(tasks=("niah_single_1",), samples=2), [1024, 2048], segment=512)
    assert [list(entry["tasks"]) for entry in found["by_length"]] == [["niah_single_1"], []]
    assert found["skipped"] == [{"length": 2048, "task": "niah_single_1", "reason": "the model's logits are not finite"}]


@pytest.mark.parametrize(
    ("singular", "chat", "said"),
    [
        ("official", "vicuna-chat", "helpful, detailed, and polite answer to"),
        ("fixed", "vicuna-chat", "helpful, detailed, and polite answers to"),
        ("official", "lwm-chat", "You is a helpful assistant."),
        ("fixed", "lwm-chat", "You are a helpful assistant."),
    ],
)
def test_where_one_value_is_spoken_of(singular, chat, said):
    """The task's own words are the same by both rules, and several values are spoken of as several."""
    make = lambda task, singular: generate(task, Request(2048, len, chat=chat, singular=singular), Corpora(), 1)[0]
    sample = make("niah_single_1", singular)
    assert said in sample.input
    assert "A special magic number is hidden" in sample.input
    assert sample.answer_prefix.startswith(" The special magic number for")
    assert sample.answer_prefix.endswith(" is")
    assert make("fwe", "official") == make("fwe", "fixed")


def test_chats_and_files_of_a_user(folder):
    request = Request(1024, len, chat="{system} {task_template} {}")
    (sample,) = generate("niah_single_1", request, load_corpora("", ()).corpora, 1)
    assert sample.input.startswith("{system} ")
    assert "{}" in sample.input + sample.answer_prefix
    (folder / "PaulGrahamEssays.json").write_text('{"text": 5}')
    with pytest.raises(UserError, match=r"PaulGrahamEssays\.json is not .*no text"):
        load_corpora(str(folder), ("niah_single_2",), "regex")
    (folder / "squad.json").write_text("[]")
    with pytest.raises(UserError, match="qa_1: the file of squad has another form"):
        generate("qa_1", Request(1024, len), load_corpora(str(folder), ("qa_1",)).corpora, 1)


@pytest.mark.golden
def test_sentences_are_punkts(golden, tmp_path, monkeypatch):
    """Untrained it needs no files; trained on English it splits the reference text as the reference did, and says what is missing."""
    split = corpora_file.sentence_splitter("punkt", trained=False)
    assert split("One is here. Two is there! Is three?") == ["One is here.", "Two is there!", "Is three?"]
    monkeypatch.setattr("nltk.data.path", list(nltk.data.path))
    try:
        split = corpora_file.sentence_splitter("punkt", tmp_path)
    except UserError as error:
        assert re.search(r"punkt_tab is missing: infinicontext download ruler", str(error))  # noqa: PT017
    else:
        reference = json.loads((golden / "ruler" / "essay_sentences.json").read_text())["sentences"]
        whole = re.sub(r"\s+", " ", (golden / "ruler" / "essay.txt").read_text()).strip()
        assert split(whole) == reference


ESSAYS = {
    "b.txt": b"Second.\r\n",
    "a.txt": "First, caf\u00e9.".encode(),
    "late.html": b"<p>No.<font>1. Late &amp; <b>bold</b><img src=x></font>",
}


def test_download(tmp_path, monkeypatch):
    """What is fetched is checked; what is there is left alone."""
    monkeypatch.setattr(corpora_file, "sentence_splitter", lambda *args: None)
    addresses = "\n".join(f"https://essays/{name}" for name in ESSAYS)
    sources = {"squad": b'{"data": []}', "hotpotqa": b"[]", "english_words": b"{}", "essay": addresses.encode()}
    essay = {"text": "First, caf\u00e9.Second.\n1\\. Late & **bold**\n\n"}
    contents = sources | {"essay": json.dumps(essay).encode()}
    files = {name: file._replace(sha256=hashlib.sha256(contents[name]).hexdigest()) for name, file in corpora_file.FILES.items()}
    monkeypatch.setattr(corpora_file, "FILES", files)
    web = {files[name].source: content for name, content in sources.items()} | {f"https://essays/{name}": ESSAYS[name] for name in ESSAYS}
    fetched, said = [], []

    def open_address(address, timeout):
        fetched.append(address)
        if address not in web:
            raise urllib.error.URLError("no such address")
        return io.BytesIO(web[address])

    monkeypatch.setattr(urllib.request, "urlopen", open_address)
    again = lambda: corpora_file.download(str(tmp_path / "data"), said.append)
    again()
    assert len(fetched) == 4 + len(ESSAYS)
    for name, content in contents.items():
        assert (tmp_path / "data" / files[name].name).read_bytes() == content
    assert not any("official" in line for line in said)
    (tmp_path / "data" / "hotpotqa.json").write_bytes(b"[1]")
    again()
    assert len(fetched) == 4 + len(ESSAYS)
    assert any("hotpotqa.json: there already, but not the official one" in line for line in said)
    web[files["squad"].source] = b"something else"
    (tmp_path / "data" / "squad.json").unlink()
    with pytest.raises(UserError, match=r"has the SHA-256 .* nothing was written"):
        again()
    assert not list((tmp_path / "data").glob("squad*"))
    del web[files["squad"].source]
    with pytest.raises(UserError, match=r"could not be fetched .*no such address"):
        again()

    class Broken(io.BytesIO):
        def read(self, *size):
            raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Broken())
    with pytest.raises(UserError, match=r"could not be fetched .*IncompleteRead"):
        again()


def test_essays_that_have_changed(tmp_path, monkeypatch):
    """Pages change: their text is kept as what it is. One that is missing is named, and nothing is written."""
    monkeypatch.setattr(corpora_file, "sentence_splitter", lambda *args: None)
    monkeypatch.setattr(corpora_file, "FILES", {"essay": corpora_file.FILES["essay"]})
    web = {corpora_file.FILES["essay"].source: b"https://essays/a.txt https://essays/late.html", "https://essays/a.txt": b"Mine."}
    said = []

    def fetch(address):
        if address not in web:
            raise OSError(address)
        return web[address]

    monkeypatch.setattr(corpora_file, "_fetch", fetch)
    with pytest.raises(UserError, match=r"late\.html"):
        corpora_file.download(str(tmp_path), said.append)
    assert not list(tmp_path.iterdir())
    web["https://essays/late.html"] = ESSAYS["late.html"]
    corpora_file.download(str(tmp_path), said.append)
    assert said[-2].endswith("results will say so")
    loaded = load_corpora(str(tmp_path), ("niah_single_2",), "regex")
    assert loaded.corpora.essay.startswith("Mine.")
    assert corpora_file.unofficial(loaded.ids) == ["essay"]


def test_results_from_other_texts_are_not_taken_for_new_ones(folder, tmp_path):
    needle = Needle(haystack=str(tmp_path / "hay*.txt"))
    evaluation = Evaluation(tasks=("ruler", "needle"), ruler=RulerEvaluation(folder=str(folder)), needle=needle)
    experiment = Experiment("one", TransformerConfig(), CorpusData(), steps=5, evaluation=evaluation)
    (tmp_path / "hay1.txt").write_text("A text.")
    results = {task: {"evaluation": to_plain(evaluation), "corpora": corpora_of(evaluation, task)} for task in evaluation.tasks}
    assert (set(results["ruler"]["corpora"]), set(results["needle"]["corpora"])) == ({"essay", "squad", "hotpotqa"}, {"haystack"})
    (tmp_path / "eval.json").write_text(json.dumps({"step": 5, "tasks": results}))
    assert is_evaluated(experiment, tmp_path / "eval.json")
    for path, text in ((tmp_path / "hay2.txt", "Another."), (folder / "PaulGrahamEssays.json", '{"text": "Mine."}')):
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        assert not is_evaluated(experiment, tmp_path / "eval.json")
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
        assert is_evaluated(experiment, tmp_path / "eval.json")


EXPERIMENTS = """
from infinicontext.data.pipeline import CorpusData
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation
from infinicontext.evaluation.suite import Evaluation, corpora_of
from infinicontext.experiment import Experiment
from infinicontext.models.transformer import TransformerConfig

def tiny():
    model = TransformerConfig(vocab_size=257, dim=16, layers=1, heads=2, attention="window", window=16, remat=False)
    tasks = ("niah_single_1", "niah_single_2", "fwe", "vt")
    evaluation = Evaluation(tasks=("ruler",), lengths=(1024,), segment=256, ruler=RulerEvaluation(tasks, samples=2, batch_size=2))
    data = CorpusData("texts.jsonl", length=16, validation_fraction=0.5)
    return Experiment("tiny", model, data, steps=1, batch_size=8, evaluation=evaluation)
"""


def test_command(tmp_path, monkeypatch):
    """What was answered before an interruption is not asked again; what is missing is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFINICONTEXT_DATA", str(tmp_path))
    (tmp_path / "experiments.py").write_text(EXPERIMENTS)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n + 1}"}) + "\n" for n in range(30)))

    def run(*command):
        # optax itself multiplies dtypes that strict promotion refuses to mix.
        with jax.numpy_dtype_promotion("standard"):
            cli.main(list(command))

    run("train", "experiments.py:tiny", "--workdir", "run")
    run("eval", "run")
    record = json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["ruler"]
    (entry,) = record["by_length"]
    assert set(entry["tasks"]) == {"niah_single_1", "fwe"}
    reasons = {skip["task"]: skip["reason"] for skip in record["skipped"]}
    assert str(tmp_path / "ruler" / "PaulGrahamEssays.json") in reasons["niah_single_2"]
    assert "vt does not fit 500 tokens" in reasons["vt"]
    answers = tmp_path / "run" / "eval.ruler.jsonl"
    lines = answers.read_text().splitlines()
    assert len(lines) == 5
    # As a process leaves it that is killed while it writes the third answer.
    answers.write_text("\n".join([*lines[:3], lines[3][:10]]))
    (tmp_path / "run" / "eval.json").unlink()
    asked = []
    monkeypatch.setattr(
        questions, "generate", lambda model, rows, options: asked.append(rows) or [Completion(np.zeros(1, np.int32), "stop")] * len(rows)
    )
    run("eval", "run", "--evaluation.ruler.samples", "2")
    assert len(asked) == 1
    run("eval", "run", "--evaluation.ruler.samples", "2")
    assert len(asked) == 1
    assert answers.read_text().splitlines()[:3] == lines[:3]
    record = lambda: json.loads((tmp_path / "run" / "eval.json").read_text())
    assert record()["tokenizer"] == "bytes"
    assert {"versions", "commit"} <= set(record())
    assert record()["tasks"]["ruler"]["cost"]["peak_bytes"]["host"] > 0
    run("compare", "run", "--output", "report")
    assert "niah_single_2" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("vt", "mt")}, r"evaluation\.ruler\.tasks has mt; RULER's tasks are niah_single_1"),
        ({"tasks": ()}, r"evaluation\.ruler\.tasks is empty"),
        ({"samples": 0}, r"evaluation\.ruler\.samples is 0"),
        ({"mode": "guess"}, r"evaluation\.ruler\.mode is guess; it must be one of generate, teacher_forced"),
        ({"seed": -1}, r"evaluation\.ruler\.seed is -1; it must be from 0"),
        ({"singular": "none"}, r"evaluation\.ruler\.singular is none; it must be one of official, fixed"),
        ({"splitter": "dots"}, r"evaluation\.ruler\.splitter is dots"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RulerEvaluation(**changes)


@pytest.mark.golden
def test_published_scores(golden):
    """Those of the reference file."""
    models = [(row["model"], row["scores"], row["avg"]) for row in published.published()["models"]]
    assert len(models) > 40
    for row in json.loads((golden / "ruler" / "aggregates.json").read_text())["aggregates"]:
        if "published" in row:
            assert (row["model"].strip("* "), row["scores"], row["published"]["avg"]) in models


def test_what_a_model_cannot_read_counts_as_nothing():
    """And beyond a length without a score none is effective."""
    passed = dict.fromkeys((4096, 8192, 16384), 90.0)
    assert summary(passed, 79.4)["effective_label"] == ">16384"
    assert summary(passed, 79.4, [32768])["effective_label"] == "16384"
    assert summary(passed, 79.4, [2048])["effective_label"] == "unknown"
    assert summary({4096: 90.0, 16384: 90.0}, 79.4, [8192])["effective"] == 4096
    found = summary(passed | {32768: 0.0}, 79.4)
    assert (found["avg"], found["effective_label"]) == (67.5, "16384")


def test_lengths_without_room(folder, monkeypatch):
    """They are named, not asked, and count."""
    tokenizer = Pieces()
    monkeypatch.setattr(questions, "generate", lambda model, rows, options: [Completion(np.zeros(0, np.int32), "stop")] * len(rows))
    config = RulerEvaluation(samples=1, folder=str(folder), splitter="regex", example_budget=1000)
    found = evaluate_ruler(None, tokenizer, config, [2048, 4096], limit=2048, segment=512)
    assert [entry["length"] for entry in found["by_length"]] == [2048]
    (skip,) = found["skipped"]
    assert skip == {"length": 4096, "reason": "the state grows with length and evaluation.capacity is 2048"}
    assert found["summary"]["unread"] == [4096]


def test_own_scores_stand_above_published_ones(tmp_path):
    tasks = {task: {"score": 50.0} for task in TASKS}
    by_length = [{"length": length, "tasks": tasks, "categories": {}, "score": 50.0} for length in (2048, 4096)]
    said = {"protocol": "RULER. Not comparable with published numbers."}
    ruler = said | {"by_length": by_length, "summary": summary({2048: 50.0, 4096: 50.0}, 79.4) | {"threshold": 79.4}}
    run = Run("mine <1>", 0, tmp_path, {"experiment": {}}, [], [], [], {"tasks": {"ruler": ruler}})
    table = published.html_table([run])
    mine = "mine &lt;1&gt;</th><td>-</td><td>&lt;2048 (not comparable; 79.4%)</td><td>50.0</td><td>-</td>"
    assert table.index(mine) < table.index("Jamba-1.5-large")
    # Means over two of the six lengths would not stand beside means over all.
    assert table.split("mine")[1].split("</tr>")[0].count("<td>-</td>") == 1 + 5 + 3
    assert published.html_table([dataclasses.replace(run, eval={})]) == ""
