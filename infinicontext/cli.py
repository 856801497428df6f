"""The command line: train, eval, sweep, compare, generate, convert, search-rope,
score-tokens, bench, info.

A mistake of the user is one sentence on stderr and exit status 2; a run that a signal stopped after saving exits with 0.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import get_args

import jax

from infinicontext import models, sharding
from infinicontext.data.pipeline import CorpusData, PasskeyData
from infinicontext.errors import UserError
from infinicontext.evaluation.suite import Task as AnyTask
from infinicontext.evaluation.suite import state_grows
from infinicontext.experiment import Experiment, differences
from infinicontext.experiment_file import load, one_experiment, override
from infinicontext.inference.generate import Generation, RopePolicy, stream
from infinicontext.inference.norm_refresh import check_refresh, reader
from infinicontext.inference.text import TextStream, follow
from infinicontext.longrope.search import SearchConfig
from infinicontext.models.streaming import abstract_state_bytes
from infinicontext.nn.parameters import parameter_count
from infinicontext.pretrained.megalodon import Rope
from infinicontext.training import weights
from infinicontext.training.evaluate import evaluate_run, is_evaluated
from infinicontext.training.loop import check, check_devices, describe_step, enable_compilation_cache, train
from infinicontext.training.run_folder import load_config, versions
from infinicontext.training.step import make_steps


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


def make_parser() -> Parser:
    """Commands and their own options; what they do not know are overrides of an experiment's fields."""
    parser = Parser(prog="infinicontext", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str, takes_overrides: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not takes_overrides)
        command.set_defaults(run=run, takes_overrides=takes_overrides, parser=command)
        return command

    rope_help = "official MEGALODON checkpoints: the rotary frequencies stored there (default), or those of the formula"
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
    defaults = Generation()
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the standard input, as one prompt")
    command.add_argument("--model", type=pathlib.Path, required=True, help="a run folder or a Hugging Face folder")
    command.add_argument(
        "--prompts-file", type=pathlib.Path, help="a .jsonl file with a field prompt, or a text file with a prompt per line"
    )
    command.add_argument("--output", type=pathlib.Path, help="a .jsonl file: prompt, completion, finish (stop or length)")
    command.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    command.add_argument("--temperature", type=float, default=defaults.temperature, help="0: greedy")
    command.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    command.add_argument("--top-p", type=float, default=defaults.top_p, help="draw from the likeliest tokens that reach this probability")
    command.add_argument("--seed", type=int, default=defaults.seed)
    command.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end a completion; not part of it")
    command.add_argument("--rope-policy", choices=get_args(RopePolicy), default="planned", help="LongRoPE: which factors a prompt turns by")
    command.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    command.add_argument("--segment", type=int, default=defaults.segment, help="prompt tokens per call")
    command.add_argument(
        "--norm-refresh",
        type=int,
        nargs=3,
        metavar="CHUNKS",
        help="MEGALODON: read prompts with norm statistics that forget, as the official code does with 8 6 2: the chunk they are first "
        "replaced at, the last chunks they are then taken from, chunks per call",
    )
    command.add_argument("--rope", choices=get_args(Rope), help=rope_help)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of parameters and computation; default: the model's")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")

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
    command.add_argument("--beacon-token", type=int, help="--to beacon: the token whose embedding beacons begin with; default: end of text")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the numbers written for Hugging Face")
    command.add_argument("--rope", choices=get_args(Rope), help=rope_help)
    command.add_argument("--factors", type=pathlib.Path, help="to a run: rotary factors that search-rope has written")
    command.add_argument("--shards", type=int, metavar="N", help="--to megalodon: the model-parallel size; default: 1")
    command.add_argument("--step", type=int, help="a run's checkpoint; default: the newest")

    text = "Search rotary factors (LongRoPE) for texts longer than a Transformer was trained on. Any field of the search can follow, as in"
    command = add("search-rope", run_search_rope, f"{text} --iterations 20; --help after a model lists them.", takes_overrides=True)
    command.add_argument("folder", nargs="?", metavar="MODEL", help="a run folder or a Hugging Face folder")
    command.add_argument("--target-length", help="tokens, as in 32k")
    command.add_argument("--output", type=pathlib.Path, help="a .json file; a picture and the search so far are put beside it")
    command.add_argument("--data", help="documents to search on, as --data.source; default: those that a run keeps for validation")
    command.add_argument("--original-length", help="tokens the model was trained on; default: what the folder says")
    command.add_argument("--documents", type=int, default=5, help="that candidates read, each of the target length")
    command.add_argument("--short", action="store_true", help="the factors for texts up to the original length, of a model with longrope")
    command.add_argument("--batch", type=int, default=32, help="candidates of a call")
    command.add_argument("--lanes", type=int, default=1, help="candidates that a device reads side by side")
    command.add_argument("--segment", type=int, default=4096, help="tokens per call of the model")
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

    command = add("bench", run_bench, "Measure building blocks and models beside their other forms and installed peers, interleaved.")
    command.add_argument("what", choices=("cema", "timestep_norm", "megalodon", "infini", "fam", "beacon", "longrope"))
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--length", type=int, default=4096)
    command.add_argument("--dim", type=int, default=256)
    command.add_argument("--rounds", type=int, default=9, help="medians are of so many")

    command = add("info", run_info, f"Devices and versions, and what an experiment needs. {fields}", takes_overrides=True)
    command.add_argument("experiment", nargs="?", help="FILE.py:FUNCTION or a run folder")
    return parser


def run_train(options: argparse.Namespace) -> None:
    """infinicontext train FILE.py:FUNCTION --workdir RUN [--field value ...]"""
    experiment = override(one_experiment(options.experiment), options.overrides, options.parser)
    workdir = require_workdir(options)
    if options.distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--distributed: this process could not join the others: {str(error).splitlines()[0]}") from error
    train(experiment, workdir, allow_config_change=options.allow_config_change, profile=options.profile, command=options.line)


def run_eval(options: argparse.Namespace) -> None:
    """infinicontext eval RUN [--tasks ...] [--lengths ...] [--output FILE]"""
    tasks = [] if options.tasks is None else ["--evaluation.tasks", *options.tasks]
    lengths = [] if options.lengths is None else ["--evaluation.lengths", *(str(parse_length(text)) for text in options.lengths)]
    folder = pathlib.Path(options.folder)
    trained = load_config(folder)
    options.overrides = tasks + lengths + options.overrides
    experiment = override(trained, options.overrides, options.parser)
    changed = [line for line in differences(trained, experiment) if not line.startswith(("evaluation", "mesh"))]
    if other := [line for line in changed if not line.startswith("model.")]:
        raise UserError(f"eval can change fields of evaluation, mesh and model only, not {other[0]}")
    if changed and options.output is None:
        raise UserError(f"eval with another model ({changed[0]}) needs --output FILE, to keep it apart from the run's own results")
    longest, capacity = max(experiment.evaluation.lengths), experiment.evaluation.capacity
    if options.lengths and longest > capacity and state_grows(models.abstract(experiment.model)):
        raise UserError(
            f"--lengths has {longest}, but this model's state grows with length and evaluation.capacity is {capacity}; raise "
            "--evaluation.capacity if there is memory for it"
        )
    evaluate_run(experiment, folder, options.output or folder / "eval.json", options.step)


def run_sweep(options: argparse.Namespace) -> None:
    """infinicontext sweep FILE.py:FUNCTION --workdir FOLDER [--field value ...]"""
    experiments = load(options.experiment)
    if not isinstance(experiments, list) or not all(isinstance(item, Experiment) for item in experiments):
        raise UserError(f"{options.experiment} does not return a list of experiments; use infinicontext train for a single one")
    experiments = [override(experiment, options.overrides, options.parser) for experiment in experiments]
    if not experiments:
        raise UserError(f"{options.experiment} returns an empty list; there is nothing to train")
    workdir = require_workdir(options)
    for experiment in experiments:
        check(experiment)
    for number, experiment in enumerate(experiments, 1):
        folder = workdir / experiment.name
        print(f"[{number}/{len(experiments)}] {folder}", file=sys.stderr)
        finished = train(experiment, folder, allow_config_change=options.allow_config_change, command=options.line)
        if not finished:
            return
        if not is_evaluated(experiment, folder / "eval.json"):
            evaluate_run(experiment, folder, folder / "eval.json")


def run_compare(options: argparse.Namespace) -> None:
    """infinicontext compare RUN ... --output FOLDER"""
    # Here, because matplotlib takes a second to import and no other command needs it.
    from infinicontext.evaluation.report import compare

    compare(options.folders, options.output)


def run_generate(options: argparse.Namespace) -> None:
    """infinicontext generate PROMPT ... --model FOLDER [--max-new-tokens N] [--temperature T] ..."""
    prompts = read_prompts(options)
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be 1 or more")
    if "" in options.stop:
        raise UserError("--stop has an empty text; each must have one character or more")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "rope_policy", "segment")
    generation = Generation(**{name: getattr(options, name) for name in names})
    read = None
    if options.norm_refresh:
        check_refresh("--norm-refresh", tuple(options.norm_refresh))
        read = reader(tuple(options.norm_refresh))
    enable_compilation_cache()
    mesh = all_on_tensor()
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        loaded = weights.load_model(options.model, mesh, dtype=options.dtype, step=options.step, rope=options.rope)
        generation = dataclasses.replace(generation, stop=tuple((token,) for token in loaded.stop))
        ids = [weights.prompt_ids(loaded, prompt) for prompt in prompts]
        output, temporary = sys.stdout, None
        if options.output:
            temporary = options.output.with_name(options.output.name + ".partial")
            try:
                if options.output.is_dir():
                    raise IsADirectoryError(0, "it is a folder")
                output = closing.enter_context(temporary.open("w", encoding="utf-8"))
            except OSError as error:
                raise UserError(f"--output {options.output} cannot be written: {error.strerror}") from error
        for at in range(0, len(prompts), options.batch_size):
            part = ids[at : at + options.batch_size]
            rows = [TextStream(loaded.tokenizer, prompt, options.stop) for prompt in part]
            for new in follow(rows, stream(loaded.model, part, generation, first_row=at, read=read)):
                if len(prompts) == 1 and not temporary:
                    print(new[0], end="", flush=True)
            if len(prompts) == 1 and not temporary:
                print()
                return
            for prompt, row in zip(prompts[at:], rows):
                record = {"prompt": prompt, "completion": row.text, "finish": row.finish}
                print(json.dumps(record, ensure_ascii=False), file=output, flush=True)
        if temporary:
            temporary.replace(options.output)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """What the user asks to be continued."""
    prompts, file = list(options.prompts), options.prompts_file
    if file:
        try:
            lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts-file {file} cannot be read: {error}") from error
        if file.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                try:
                    lines[number - 1] = json.loads(line)["prompt"]
                except (ValueError, LookupError, TypeError):
                    raise UserError(f"--prompts-file {file}: prompt {number} is not a JSON object with a field prompt") from None
        prompts += lines
    elif not prompts and not sys.stdin.isatty():
        prompts = [sys.stdin.read()]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("there is no prompt; give one as an argument, with --prompts-file, or on the standard input")
    return prompts


def run_convert(options: argparse.Namespace) -> None:
    """infinicontext convert SRC DST [--to run|huggingface|megalodon|infini|fam|beacon]"""
    from_run = weights.is_run(options.source)
    to = options.to or ("huggingface" if from_run else "run")
    mesh = all_on_tensor()
    kinds = {"segment": "infini"} | dict.fromkeys(("block", "memory_blocks", "fam_length", "prompt"), "fam")
    kinds |= dict.fromkeys(("chunk", "ratios", "beacon_token"), "beacon")
    for field, kind in kinds.items():
        if getattr(options, field) is not None and to != kind:
            raise UserError(f"--{field.replace('_', '-')} is {getattr(options, field)}; it goes with --to {kind}")
    if not from_run and to not in ("run", "infini", "fam", "beacon"):
        raise UserError(f"{options.source} is no run folder; convert it to one first, --to run")
    if options.dtype and to != "huggingface":
        raise UserError("--dtype goes with --to huggingface; parameters are written as they are otherwise")
    if options.shards is not None and to != "megalodon":
        raise UserError(f"--shards is {options.shards}; it goes with --to megalodon")
    if options.factors is not None and to in ("huggingface", "megalodon"):
        raise UserError(f"--factors is {options.factors}; it goes with --to run or a memory")
    if options.step is not None and not from_run:
        raise UserError(f"--step is {options.step}, but {options.source} is no run folder and has no checkpoints")
    if options.rope is not None and not weights.is_official(options.source):
        raise UserError(f"--rope is {options.rope}, but {options.source} is no checkpoint of the official MEGALODON code")
    shards = 1 if options.shards is None else options.shards
    with jax.set_mesh(mesh):
        if to == "huggingface":
            weights.to_huggingface(options.source, options.target, mesh, dtype=options.dtype, step=options.step)
        elif to == "megalodon":
            weights.to_megalodon(options.source, options.target, mesh, step=options.step, shards=shards)
        else:
            grow = {"infini": with_memory, "fam": with_feedback_memory, "beacon": with_beacons}.get(to)
            grow = grow and functools.partial(grow, options)
            how = {"step": options.step, "rope": options.rope, "grow": grow, "prompt": options.prompt or "tokens"}
            how |= {"beacon_token": options.beacon_token, "factors": options.factors}
            weights.to_run(options.source, options.target, mesh, **how, command=options.line)
    print(options.target)


def run_search_rope(options: argparse.Namespace) -> None:
    """infinicontext search-rope MODEL --target-length L --output FACTORS.json [--data ...] [--field value ...]"""
    # Here, because nothing else needs it.
    from infinicontext.search_rope import Task, search_rope

    config = override(SearchConfig(), options.overrides, options.parser)
    for name in ("target_length", "output"):
        if getattr(options, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing")
    for name in ("documents", "batch", "lanes", "segment"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    task = Task(
        pathlib.Path(options.folder),
        parse_length(options.target_length),
        options.output,
        options.data,
        None if options.original_length is None else parse_length(options.original_length),
        *(options.documents, options.short, options.batch, options.lanes, options.segment, options.step),
    )
    enable_compilation_cache()
    search_rope(task, config, sharding.make_mesh(sharding.MeshConfig()))
    print(options.output)


def run_score_tokens(options: argparse.Namespace) -> None:
    """infinicontext score-tokens REFERENCE DATA OUT [--window W] [--entropy]"""
    # Here, because nothing else needs it.
    from infinicontext.score_tokens import Task, score_tokens

    for name in ("window", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if not 0 < options.validation_fraction < 1:
        raise UserError(f"--validation-fraction is {options.validation_fraction}; it must be above 0 and below 1")
    names = ("reference", "data", "output", "validation_fraction", "window", "batch", "entropy", "step", "dtype")
    enable_compilation_cache()
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with jax.set_mesh(mesh):
        score_tokens(Task(**{"source" if name == "data" else name: getattr(options, name) for name in names}), mesh)


def with_memory(options: argparse.Namespace, config: models.TransformerConfig) -> models.InfiniConfig:
    """What --to infini makes of a Transformer: gates begin nearly closed, and the linear rule is written by."""
    segment = 2048 if options.segment is None else options.segment
    return models.InfiniConfig.of(config, segment=segment, update="linear", empty_memory="bypass", gate_init=-3.0)


def with_beacons(options: argparse.Namespace, config: models.TransformerConfig) -> models.BeaconConfig:
    """What --to beacon makes of a Transformer."""
    chunk = 1024 if options.chunk is None else options.chunk
    return models.BeaconConfig.of(config, chunk=chunk, ratios=tuple(options.ratios or (8,)))


def with_feedback_memory(options: argparse.Namespace, config: models.TransformerConfig) -> models.FamConfig:
    """What --to fam makes of a Transformer; blocks that it has already are kept."""
    defaults = {"fam_length": 64} | ({} if config.attention == "block_window" else {"block": 1024, "memory_blocks": 1})
    given = {name: vars(options)[name] for name in ("block", "memory_blocks", "fam_length") if vars(options)[name] is not None}
    return models.FamConfig.of(config, **(defaults | given))


def all_on_tensor() -> jax.sharding.Mesh:
    """The mesh for a single stream: all devices share each layer."""
    return sharding.make_mesh(sharding.MeshConfig(data=1, tensor=jax.device_count()))


def run_bench(options: argparse.Namespace) -> None:
    """infinicontext bench cema|timestep_norm|megalodon|infini|fam|beacon|longrope [--batch B] [--length T] [--dim D] [--rounds N]"""
    # Here, because nothing else needs it.
    from infinicontext.bench import BENCHMARKS, Size
    from infinicontext.bench_beacon import bench_beacon
    from infinicontext.bench_fam import bench_fam
    from infinicontext.bench_infini import bench_infini
    from infinicontext.bench_longrope import bench_longrope

    own = {"infini": bench_infini, "fam": bench_fam, "beacon": bench_beacon, "longrope": bench_longrope}
    (BENCHMARKS | own)[options.what](Size(options.batch, options.length, options.dim, options.rounds))


def run_info(options: argparse.Namespace) -> None:
    """infinicontext info [FILE.py:FUNCTION or RUN] [--field value ...]"""
    print("\n".join(f"{name:17} {version}" for name, version in versions().items()))
    print(
        f"devices           {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}), "
        f"{jax.process_count()} process(es)"
    )
    if options.experiment is None:
        return
    folder = pathlib.Path(options.experiment)
    experiment = override(load_config(folder) if folder.is_dir() else one_experiment(options.experiment), options.overrides, options.parser)
    # A run fitted its data when it began; converted from a folder without a tokenizer, it has none to fit.
    (check_devices if folder.is_dir() else check)(experiment)
    enable_compilation_cache(experiment.compilation_cache)
    model = models.abstract(experiment.model)
    print(f"\nexperiment        {experiment.name}\nparameters        {parameter_count(model):,}")
    for length in experiment.evaluation.lengths:
        print(f"state, {length:>9,}  {abstract_state_bytes(model, length):,} bytes per sequence")
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        steps = make_steps(experiment, mesh)
        rows, length = experiment.batch_size, experiment.train_length
        if isinstance(experiment.data, PasskeyData):
            rows = experiment.data.rows_at(experiment.steps, rows, sharding.batch_divisor(mesh) * experiment.accumulation)
        shapes = {
            "tokens": (length + 1, "int32"),
            "segment_ids": (length + 1, "int32"),
            "loss_mask": (length, "float32"),
            "answer_mask": (length, "float32"),
        } | dict.fromkeys(getattr(experiment.objective, "needs", ()), (length, "float32"))
        batch = {name: jax.ShapeDtypeStruct((rows, size), dtype) for name, (size, dtype) in shapes.items()}
        print(describe_step(steps.train_step.lower(steps.like, batch).compile(), experiment, model, rows, length))


def require_workdir(options: argparse.Namespace) -> pathlib.Path:
    """--workdir, which argparse cannot require because --help lists the fields of the experiment."""
    if options.workdir is None:
        raise UserError("--workdir is missing; it names the folder for the run")
    return options.workdir


def parse_length(text: str) -> int:
    """512, 64k (65,536) or 1m (1,048,576).

    Raises:
      UserError: none of these forms.
    """
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if not match or int(match[1]) < 1:
        raise UserError(f"length {text} is not a number of tokens such as 512, 64k or 1m")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


if __name__ == "__main__":
    main()
