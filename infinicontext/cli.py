"""The command line: train, eval, sweep, compare, generate, read, ask, convert, search-rope, score-tokens, lm-eval, download,
training-questions, ruler-tasks, bench, info.

A mistake of the user is one sentence on stderr and exit status 2; a run that a signal stopped after saving exits with 0.
"""

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import get_args

import jax

from infinicontext.commands import (
    run_bench,
    run_compare,
    run_convert,
    run_download,
    run_eval,
    run_generate,
    run_info,
    run_lm_eval,
    run_read,
    run_ruler_tasks,
    run_score_tokens,
    run_search_rope,
    run_sweep,
    run_train,
    run_training_questions,
)
from infinicontext.data.pipeline import CorpusData
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.corpora import Splitter
from infinicontext.evaluation.ruler.generate import Singular
from infinicontext.evaluation.ruler.tasks import CHATS, TASKS
from infinicontext.evaluation.suite import Task as AnyTask
from infinicontext.evaluation.suites import SUITES
from infinicontext.evaluation.training_questions import ALLOWED
from infinicontext.inference.generate import Generation, RopePolicy
from infinicontext.pretrained.megalodon import Rope
from infinicontext.training import weights

ROPE_HELP = "official MEGALODON checkpoints: the rotary frequencies stored there (default), or those of the formula"


def main(arguments: Sequence[str] | None = None) -> None:
    """The `infinicontext` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser = make_parser()
        options, overrides = parser.parse_known_args(arguments)
        if overrides and not options.takes_overrides:
            parser.error(f"unknown argument {overrides[0]}")
        options.overrides, options.line = overrides, shlex.join(["infinicontext", *arguments])
        subject = getattr(options, "experiment", getattr(options, "folder", "")) if options.takes_overrides else ""
        if subject is None or subject.startswith("-"):
            if "--help" in arguments or "-h" in arguments:
                options.parser.print_help()
                sys.exit(0)
            if options.run is not run_info:
                what = {run_eval: "run folder", run_search_rope: "model"}.get(options.run, "experiment")
                options.parser.error(f"the {what} is missing")
        options.run(options)
    except UserError as error:
        print(f"infinicontext: {error}", file=sys.stderr)
        sys.exit(2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"infinicontext: there is not enough memory; make a batch or a length smaller ({str(error).splitlines()[0]})", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninfinicontext: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has enough; nothing is left that could be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Parser(argparse.ArgumentParser):
    """Reports a mistake as this program does: one sentence, no usage lines."""

    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help explains")


def add_model(command: argparse.ArgumentParser) -> None:
    """What says which model reads, and how."""
    command.add_argument("--model", type=pathlib.Path, required=True, help="a run folder or a Hugging Face folder")
    command.add_argument("--segment", type=int, default=Generation().segment, help="prompt tokens per call")
    command.add_argument("--rope", choices=get_args(Rope), help=ROPE_HELP)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of parameters and computation; default: the model's")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")


def add_generation(command: argparse.ArgumentParser) -> None:
    """The fields of Generation."""
    defaults = Generation()
    command.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    command.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy")
    command.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    command.add_argument("--top-p", type=float, default=defaults.top_p, help="draw from the likeliest tokens that reach this probability")
    command.add_argument("--seed", type=int, default=defaults.seed)
    command.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a completion; not part of it")


def make_parser() -> Parser:
    """Commands and their own options; what they do not know are overrides of an experiment's fields."""
    parser = Parser(prog="infinicontext", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str, takes_overrides: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not takes_overrides)
        command.set_defaults(run=run, takes_overrides=takes_overrides, parser=command)
        return command

    fields = "Any field of the experiment can follow, as in --optimizer.learning-rate 1e-3; --help after an experiment lists them."
    command = add("train", run_train, f"Train an experiment, or resume it. {fields}", takes_overrides=True)
    command.add_argument("experiment", nargs="?", help="FILE.py:FUNCTION, as in experiments/passkey.py:full")
    command.add_argument("--workdir", type=pathlib.Path, help="the run folder, new or to be resumed")
    command.add_argument("--allow-config-change", action="store_true", help="resume although the experiment has changed")
    command.add_argument("--profile", action="store_true", help="write a profile of three steps to WORKDIR/profile")
    command.add_argument("--distributed", action="store_true", help="one of several processes: call jax.distributed.initialize() first")

    command = add("eval", run_eval, f"Evaluate a run's newest checkpoint. {fields}", takes_overrides=True)
    command.add_argument("folder", nargs="?", help="a run folder")
    command.add_argument("--tasks", nargs="+", help=f"of {', '.join(get_args(AnyTask))}; default: the experiment's")
    command.add_argument("--lengths", nargs="+", help="tokens to read, as in 4k 64k 1m; default: the experiment's")
    command.add_argument("--suite", help=f"tasks and lengths by name: {', '.join(SUITES)}")
    command.add_argument("--output", type=pathlib.Path, help="default: FOLDER/eval.json")
    command.add_argument("--step", type=int, help="the checkpoint; default: the newest")

    command = add("sweep", run_sweep, f"Train and evaluate a list of experiments. {fields}", takes_overrides=True)
    command.add_argument(
        "experiment", nargs="?", metavar="experiments", help="FILE.py:FUNCTION, a function that returns a list of experiments"
    )
    command.add_argument("--workdir", type=pathlib.Path, help="gets one run folder for each experiment")
    command.add_argument("--allow-config-change", action="store_true", help="resume although an experiment has changed")

    command = add("compare", run_compare, "A table, plots and a report of several runs.")
    command.add_argument("folders", type=pathlib.Path, nargs="+", help="run folders")
    command.add_argument("--output", type=pathlib.Path, default=pathlib.Path("report"))

    text = "Continue prompts with a model: a run folder or a Hugging Face folder. One prompt is streamed; several give a line of JSON each."
    command = add("generate", run_generate, text)
    add_model(command)
    add_generation(command)
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the standard input, as one prompt")
    command.add_argument(
        "--prompts-file", type=pathlib.Path, help="a .jsonl file with a field prompt, or a text file with a prompt per line"
    )
    command.add_argument("--output", type=pathlib.Path, help="a .jsonl file: prompt, completion, finish (stop or length)")
    command.add_argument("--rope-policy", choices=get_args(RopePolicy), default="planned", help="LongRoPE: which factors a prompt turns by")
    command.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    command.add_argument(
        "--norm-refresh",
        type=int,
        nargs=3,
        metavar="CHUNKS",
        help="MEGALODON: read prompts with norm statistics that forget, as the official code does with 8 6 2: the chunk they are first "
        "replaced at, the last chunks they are then taken from, chunks per call",
    )
    command.set_defaults(memory=None)

    text = "Read a text with a model, and keep what it remembers in a file that `ask` goes on from."
    command = add("read", run_read, text)
    command.add_argument("text", nargs="?", type=pathlib.Path, metavar="FILE", help="a text file; default: the standard input")
    add_model(command)
    command.add_argument("--memory", type=pathlib.Path, required=True, metavar="FILE", help="is written; one that is there is replaced")
    command.add_argument("--after", type=pathlib.Path, metavar="FILE", help="a memory to go on from; it may be the same file")
    text = "tokens that will fit behind the text, where the model's state grows; default: 4096"
    command.add_argument("--room", type=int, help=text)

    text = "Answer questions about what `read` has kept; each question goes on from there alone, and the file stays as it is."
    command = add("ask", run_generate, f"{text} One answer is streamed; several give a line of JSON each.")
    command.add_argument("prompts", nargs="*", metavar="QUESTION", help="default: the standard input, as one question")
    add_model(command)
    command.add_argument("--memory", type=pathlib.Path, required=True, metavar="FILE", help="what `read` has written")
    add_generation(command)
    command.set_defaults(prompts_file=None, output=None, rope_policy="planned", batch_size=8, norm_refresh=None)

    text = "Convert a Hugging Face folder or an official MEGALODON to a run folder, or a run's model to one of these or a run of its own."
    command = add("convert", run_convert, text)
    command.add_argument("source", type=pathlib.Path, metavar="SRC", help="a run folder or a Hugging Face folder")
    command.add_argument("target", type=pathlib.Path, metavar="DST", help="a new folder")
    command.add_argument(
        "--to", choices=("run", "huggingface", "megalodon", "infini", "fam", "beacon"), help="default: run, and for a run huggingface"
    )
    command.add_argument("--segment", type=int, help="--to infini gives a Transformer a memory: tokens per segment; default: 2048")
    command.add_argument("--block", type=int, help="--to fam gives a Transformer feedback memory: tokens per block; default: 1024")
    command.add_argument("--memory-blocks", type=int, help="--to fam: earlier blocks that each token sees; default: 1")
    command.add_argument("--fam-length", type=int, help="--to fam: rows of feedback memory, 0 for none; default: 64")
    text = "--to fam: what the memory begins as, the embeddings of tokens drawn at random (default) or random numbers of their size"
    command.add_argument("--prompt", choices=get_args(weights.Prompt), help=text)
    command.add_argument("--chunk", type=int, help="--to beacon gives a Transformer beacons: tokens per chunk; default: 1024")
    command.add_argument("--ratios", type=int, nargs="+", help="--to beacon: tokens per beacon in a text's chunks, in turn; default: 8")
    command.add_argument("--sinks", type=int, help="--to beacon: first tokens of a text that are kept, too; default: 0 (Llama 3 needs 1)")
    command.add_argument("--beacon-token", type=int, help="--to beacon: the token whose embedding beacons begin with; default: end of text")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the numbers written for Hugging Face")
    command.add_argument("--rope", choices=get_args(Rope), help=ROPE_HELP)
    command.add_argument("--factors", type=pathlib.Path, help="to a run: rotary factors that search-rope has written")
    command.add_argument("--shards", type=int, metavar="N", help="--to megalodon: the model-parallel size; default: 1")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")

    text = "Search rotary factors (LongRoPE) for texts longer than a Transformer was trained on. Any field of the search can follow, as in"
    command = add("search-rope", run_search_rope, f"{text} --iterations 20; --help after a model lists them.", takes_overrides=True)
    command.add_argument("folder", nargs="?", metavar="MODEL", help="a run folder or a Hugging Face folder")
    command.add_argument("--target-length", help="tokens, as in 32k")
    command.add_argument("--output", type=pathlib.Path, help="a .json file; a picture and the search so far are put beside it")
    command.add_argument("--data", help="documents to search on, as --data.source; default: those that a run learnt from")
    command.add_argument("--original-length", help="tokens the model was trained on; default: what the folder says")
    command.add_argument("--documents", type=int, help="that candidates read, each of the target length; default: 5, for longrope2 10")
    command.add_argument("--short", action="store_true", help="the factors for texts up to the original length, of a model with longrope")
    command.add_argument("--batch", type=int, default=32, help="candidates of a call")
    command.add_argument("--lanes", type=int, default=1, help="candidates that a device reads side by side")
    command.add_argument(
        "--together", type=int, help="documents that a candidate reads side by side; default: all, 1 takes the least memory"
    )
    command.add_argument("--segment", type=int, default=4096, help="tokens per call of the model")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of parameters and computation; default: the model's")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")

    text = "Score a corpus's tokens by a reference model, once, for selective training (objective Selective, data.reference OUT)."
    command = add("score-tokens", run_score_tokens, text)
    command.add_argument("reference", type=pathlib.Path, metavar="REFERENCE", help="a run folder or a Hugging Face folder")
    command.add_argument("data", metavar="DATA", help="documents, as --data.source")
    command.add_argument("output", type=pathlib.Path, metavar="OUT", help="a folder, new or to be gone on with")
    command.add_argument("--validation-fraction", type=float, default=CorpusData.validation_fraction, help="of the training")
    command.add_argument("--window", type=int, help="tokens the reference reads at a time; default: as in its training")
    command.add_argument("--batch", type=int, default=16, help="rows at a time")
    command.add_argument("--entropy", action="store_true", help="the entropies of its predictions, too")
    command.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the scores")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")

    text = "Run lm-evaluation-harness with our models as --model infinicontext; all that follows is lm_eval's own."
    add("lm-eval", run_lm_eval, text, takes_overrides=True)

    text = f"Write questions with their answers as training data, by an experiment's tokenizer and evaluation. {fields}"
    command = add("training-questions", run_training_questions, text, takes_overrides=True)
    command.add_argument("experiment", nargs="?", help="FILE.py:FUNCTION")
    command.add_argument("output", nargs="?", type=pathlib.Path, help="a .jsonl for InstructionData with template raw")
    command.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(ALLOWED)}")
    command.add_argument("--lengths", nargs="+", help="tokens, as in 512 1k; default: the evaluation's")
    command.add_argument("--samples", type=int, default=100, help="of each task, length and place")
    command.add_argument("--seed", type=int, default=1, help="none that evaluates")

    command = add("download", run_download, "Fetch the texts that RULER's tasks read from, and check them.")
    command.add_argument("what", choices=("ruler",))
    command.add_argument("--folder", default="", help="default: $INFINICONTEXT_DATA/ruler")

    command = add("ruler-tasks", run_ruler_tasks, "Write RULER's samples as task files of lm-evaluation-harness.")
    command.add_argument("output", type=pathlib.Path, metavar="FOLDER", help="for lm-eval --include_path")
    command.add_argument("--tokenizer", required=True, help="that of the model: bytes, or a tokenizer.json or its folder")
    command.add_argument("--lengths", nargs="+", default=["4k"], help="tokens, as in 4k 64k")
    command.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}; default: all")
    command.add_argument("--samples", type=int, default=500, help="of each task; the benchmark has 500")
    command.add_argument("--folder", default="", help="of essays, SQuAD and HotpotQA; default: $INFINICONTEXT_DATA/ruler")
    command.add_argument("--splitter", choices=get_args(Splitter), default="punkt", help="of essays into sentences")
    command.add_argument("--chat", default="base", help=f"of {', '.join(CHATS)}, or a text with {{task_template}}")
    command.add_argument("--singular", choices=get_args(Singular), default="official", help="official: also of the chat template's words")
    command.add_argument("--example-budget", type=int, default=500, help="tokens of vt's example; tokenizers close to bytes need 2000")

    command = add("bench", run_bench, "Measure building blocks and models beside their other forms and installed peers, interleaved.")
    command.add_argument("what", choices=("cema", "timestep_norm", "megalodon", "infini", "fam", "beacon", "longrope", "selective"))
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--length", type=int, default=4096)
    command.add_argument("--dim", type=int, default=256)
    command.add_argument("--rounds", type=int, default=9, help="medians are of so many")

    command = add("info", run_info, f"Devices and versions, and what an experiment needs. {fields}", takes_overrides=True)
    command.add_argument("experiment", nargs="?", help="FILE.py:FUNCTION or a run folder")
    return parser


if __name__ == "__main__":
    main()
