"""RULER's samples as task files of lm-evaluation-harness, for any model that it runs, scored by RULER's own rule.

lm_eval's built-in tasks of the same name are not the official ones: other templates, shares instead of any reference for questions.
"""

import json
from pathlib import Path

from infinicontext.data.tokenizers import Tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.corpora import load_corpora
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation, depths
from infinicontext.evaluation.ruler.generate import VERSION, generate
from infinicontext.evaluation.ruler.score import cleaned, sample_score
from infinicontext.evaluation.ruler.tasks import TASKS, TEXTS

YAML = """\
task: {name}
tag: infinicontext_ruler
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs[0]}}}}"
gen_prefix: "{{{{answer_prefix}}}}"
generation_kwargs:
  until: []
  max_gen_toks: {tokens}
  do_sample: false
process_results: !function ruler_score.score
metric_list:
  - metric: recall
    aggregation: mean
    higher_is_better: true
metadata: {metadata}
"""
SCORE = '''\
"""What lm_eval calls to score an answer."""

from infinicontext.evaluation.ruler.harness_tasks import score  # noqa: F401
'''


def write_tasks(folder: Path, tokenizer: Tokenizer, config: RulerEvaluation, lengths: list[int], say=lambda line: None) -> list[str]:
    """Writes samples, task files and what scores them into a folder, for `lm_eval --include_path FOLDER`.

    Args:
      folder: new, or one that this has written before.
      tokenizer: that of the model; lengths are counted by it.
      config: which tasks and samples.
      lengths: tokens, those to be generated included.
      say: told of what is left out.

    Returns:
      The names of the tasks, infinicontext_TASK_LENGTH.

    Raises:
      UserError: the folder cannot be written, or nothing could be made.
    """
    loaded, names = load_corpora(config.folder, config.tasks, config.splitter), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ruler_score.py").write_text(SCORE, "utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    for length in lengths:
        for task in config.tasks:
            if task in loaded.missing:
                say(f"ruler {task} length {length} left out: {loaded.missing[task]}")
                continue
            try:
                samples = generate(task, config.request(length, tokenizer), loaded.corpora, config.samples)
            except UserError as error:
                say(f"ruler {task} length {length} left out: {error}")
                continue
            name = f"infinicontext_{task}_{length}"
            rows = [sample._asdict() | {"task": task, "depths": depths(sample), "version": VERSION} for sample in samples]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            file = json.dumps(str((folder / f"{name}.jsonl").resolve()))
            made = {"version": VERSION, "length": length, "corpora": loaded.ids, "not_comparable": config.deviations(loaded.ids)}
            made |= {field: getattr(config, field) for field in ("seed", "chat", "splitter", "singular", "example_budget")}
            tokens = TEXTS[type(TASKS[task])].tokens
            text = YAML.format(name=name, file=file, tokens=tokens, metadata=json.dumps(made))
            (folder / f"{name}.yaml").write_text(text, "utf-8")
            names.append(name)
    if not names:
        raise UserError(f"none of RULER's {', '.join(config.tasks)} could be made")
    return names


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """RULER's recall of one answer, from 0 to 100."""
    return {"recall": 100 * sample_score(doc["task"], cleaned(results[0]), doc["outputs"])}
