"""LongBench on local files: its scores, and prompts made of the data sets' own configuration.

A folder holds a data set as JSON lines NAME.jsonl (input, context, answers, all_classes) and LongBench's config/dataset2prompt.json and
config/dataset2maxlen.json, or these two beside the data sets. Chinese data sets need a word splitter and are left out.
"""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from infinicontext.data.corpora import json_lines
from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.answers import Question
from infinicontext.evaluation.lost_in_the_middle import normalised
from infinicontext.evaluation.needle import rouge_l
from infinicontext.evaluation.passkey_texts import similarity
from infinicontext.evaluation.questions import with_start


def token_f1(answer: str, reference: str) -> float:
    """F1 of the normalised words, each as often as it occurs."""
    found, wanted = normalised(answer).split(), normalised(reference).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def classification(answer: str, reference: str, classes: Sequence[str], official: bool = True) -> float:
    """1 over the number of classes that the answer names, if the right one is among them; those that are part of its name do not count.

    The official code removes these from the list it walks along, and so skips the one after each; `official` False leaves none out.
    """
    named = [name for name in classes if name in answer]
    if official:
        for name in named:
            if name in reference and name != reference:
                named.remove(name)
    else:
        named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def paragraph(answer: str, reference: str) -> float:
    """The share of numbers in the answer that are the reference's, "Paragraph 7"."""
    wanted, numbers = re.findall(r"\d+", reference)[0], re.findall(r"\d+", answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(answer: str, reference: str) -> float:
    """The share of numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(str(reference)) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """How alike the first line of code and the right one are."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    return similarity(line, reference)


class DataSet(NamedTuple):
    """How a data set is scored. `score` is given answer, reference and classes."""

    category: str
    score: Callable[[str, str, Any], float]
    first_line: bool = False  # answers are cut at their first line


_f1 = lambda answer, reference, classes: token_f1(answer, reference)
_rouge = lambda answer, reference, classes: rouge_l(answer, reference)["f"]
_code = lambda answer, reference, classes: code_similarity(answer, reference)
DATA_SETS = {
    **{name: DataSet("single-document", _f1) for name in ("narrativeqa", "qasper", "multifieldqa_en")},
    **{name: DataSet("multi-document", _f1) for name in ("hotpotqa", "2wikimqa", "musique")},
    **{name: DataSet("summarisation", _rouge) for name in ("gov_report", "qmsum", "multi_news")},
    "trec": DataSet("few-shot", classification, True),
    "triviaqa": DataSet("few-shot", _f1, True),
    "samsum": DataSet("few-shot", _rouge, True),
    "passage_count": DataSet("synthetic", lambda answer, reference, classes: count(answer, reference)),
    "passage_retrieval_en": DataSet("synthetic", lambda answer, reference, classes: paragraph(answer, reference)),
    **{name: DataSet("code", _code) for name in ("lcc", "repobench-p")},
}


def long_score(name: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score over the references."""
    data = DATA_SETS[name]
    text = answer.lstrip("\n").split("\n")[0] if data.first_line else answer
    return max(data.score(text, reference, classes or ()) for reference in references)


def middle_cut(ids: np.ndarray, room: int) -> np.ndarray:
    """The first and the last half of the room, where there are more ids."""
    return ids if len(ids) <= room else np.concatenate([ids[: room // 2], ids[len(ids) - (room - room // 2) :]])


def check_data_sets(task: str, chosen: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError unless there are some, all of them known."""
    if not chosen or (unknown := [name for name in chosen if name not in known]):
        has = f"has {unknown[0]}" if chosen else "is empty"
        raise UserError(f"evaluation.{task}.data_sets {has}; it must be of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class LongBench:
    """The data sets of a folder; of longer prompts the middle is left out, so that their tokens and those of an answer are the length."""

    folder: str = ""
    data_sets: tuple[str, ...] = tuple(DATA_SETS)

    size: ClassVar[str] = "tokens"
    place: ClassVar[str] = "data set"

    def __post_init__(self):
        check_data_sets("longbench", self.data_sets, DATA_SETS)

    def protocol(self) -> str:
        """See `Kind`."""
        return f"LongBench, those of {', '.join(self.data_sets)} that are there; its own scores, prompts without a chat template."

    def sizes(self, lengths: list[int]) -> list[int]:
        """Those of the prompts with their answers."""
        return lengths

    def questions(self, tokenizer: Tokenizer, size: int, samples: int, seed: int) -> list[Question]:
        """The first rows of each data set that is there and whose answers the size holds."""
        rouge_l("a", "a")  # says at once if it is not installed
        prompts, new_tokens = self._configuration("dataset2prompt.json", str), self._configuration("dataset2maxlen.json", int)
        found, lacking = [], []
        for name in self.data_sets:
            try:
                path = self._path(f"{name}.jsonl")
            except UserError as error:
                lacking.append(str(error))
                continue
            room = size - new_tokens[name] - len(with_start(tokenizer, []))
            if room < 2:
                lacking.append(f"{size} tokens do not hold {name}'s answers of {new_tokens[name]}")
                continue
            for index, (number, row) in enumerate(itertools.islice(json_lines(path), samples)):
                try:
                    text, answers = prompts[name].format(**row), tuple(str(answer) for answer in row["answers"])
                    classes = tuple(row.get("all_classes") or ())
                    long_score(name, "", answers, classes)
                    continuation = f" {answers[0]}"
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    raise UserError(f"{path}, line {number}, is no row of LongBench: {error!r}") from error
                prompt = with_start(tokenizer, middle_cut(tokenizer.encode(text), room))
                found.append(Question(size, name, index, prompt, answers, continuation, new_tokens[name], classes))
        if not found:
            raise UserError(lacking[0] if lacking else f"the data sets {', '.join(self.data_sets)} in {self.folder} are empty")
        return found

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """The data set's own."""
        return {"score": long_score(str(question.place), answer, question.answers, question.classes)}

    def averages(self, scores: dict[str, float]) -> dict:
        """score: the mean of data sets, which count alike however many questions they have; categories: the means of theirs."""
        by_category: dict[str, list[float]] = {}
        for name, score in scores.items():
            by_category.setdefault(DATA_SETS[name].category, []).append(score)
        means = {category: float(np.mean(values)) for category, values in by_category.items()}
        return {"score": float(np.mean(list(scores.values()))), "interval": None, "categories": means}

    def chance(self, size: int) -> float | None:
        """Not known."""
        return None

    def _path(self, name: str) -> Path:
        for path in (Path(self.folder, name), Path(self.folder, "config", name), Path(self.folder, "data", name)):
            if self.folder and path.is_file():
                return path
        where = self.folder or "evaluation.longbench.folder, which is empty"
        raise UserError(f"there is no {name} in {where}; LongBench's data sets and its config/ are at github.com/THUDM/LongBench")

    def _configuration(self, name: str, kind: type) -> dict:
        """By data set."""
        path = self._path(name)
        try:
            found = json.loads(path.read_text("utf-8"))
            return {data_set: kind(found[data_set]) for data_set in self.data_sets}
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is not LongBench's configuration of {', '.join(self.data_sets)}: {error!r}") from error
