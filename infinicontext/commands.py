"""What each command of the command line does; cli.py reads their options."""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import sys

import jax

from infinicontext import models, sharding
from infinicontext.data.pipeline import PasskeyData, tokenizer_of
from infinicontext.data.tokenizers import load_tokenizer
from infinicontext.errors import UserError
from infinicontext.evaluation.ruler.corpora import download
from infinicontext.evaluation.ruler.evaluate import RulerEvaluation
from infinicontext.evaluation.ruler.harness_tasks import write_tasks
from infinicontext.evaluation.suite import state_grows
from infinicontext.evaluation.suites import suite
from infinicontext.evaluation.training_questions import write_questions
from infinicontext.experiment import Experiment, differences
from infinicontext.experiment_file import load, one_experiment, override
from infinicontext.inference import memory
from infinicontext.inference.generate import Generation, stream
from infinicontext.inference.norm_refresh import check_refresh, reader
from infinicontext.inference.text import TextStream, follow
from infinicontext.longrope.search import SearchConfig
from infinicontext.models.streaming import abstract_state_bytes, state_bytes
from infinicontext.nn.parameters import parameter_count
from infinicontext.training import weights
from infinicontext.training.checks import check, check_devices
from infinicontext.training.evaluate import evaluate_run, is_evaluated
from infinicontext.training.loop import describe_step, enable_compilation_cache, train
from infinicontext.training.run_folder import load_config, versions
from infinicontext.training.step import make_steps


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
    """infinicontext eval RUN [--tasks ...] [--lengths ...] [--suite NAME] [--output FILE]"""
    if options.suite and (options.tasks or options.lengths):
        raise UserError(f"--suite is {options.suite}, which has tasks and lengths of its own; leave out --tasks and --lengths")
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
    for evaluation in suite(options.suite, experiment) if options.suite else ():
        part = dataclasses.replace(experiment, evaluation=evaluation)
        evaluate_run(part, folder, options.output or folder / "eval.json", options.step)
    if options.suite:
        return
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
    """infinicontext generate PROMPT ... --model FOLDER [...], and infinicontext ask QUESTION ... --model FOLDER --memory FILE [...]"""
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
        if options.memory:
            state = memory.load(options.memory, loaded.model, weights.parameters_fingerprint(loaded.model))
            read = memory.after(state)
        ids = [weights.prompt_ids(loaded, prompt, begins=not options.memory) for prompt in prompts]
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


def run_read(options: argparse.Namespace) -> None:
    """infinicontext read FILE --model FOLDER --memory FILE [--after FILE] [--room N]"""
    if options.after and options.room is not None:
        raise UserError(f"--room is {options.room}, but the room of a memory to go on from, --after {options.after}, stands already")
    if options.text is None and sys.stdin.isatty():
        raise UserError("there is no text; name a file or give it on the standard input")
    try:
        text = sys.stdin.read() if options.text is None else options.text.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{options.text or 'the standard input'} cannot be read: {error}") from error
    enable_compilation_cache()
    mesh = all_on_tensor()
    with jax.set_mesh(mesh):
        loaded = weights.load_model(options.model, mesh, dtype=options.dtype, step=options.step, rope=options.rope)
        model, parameters = loaded.model, weights.parameters_fingerprint(loaded.model)
        ids = weights.prompt_ids(loaded, text, begins=not options.after)
        if options.after:
            state = memory.goes_on(model, memory.load(options.after, model, parameters), ids, segment=options.segment)
        else:
            state = memory.remember(model, ids, room=4096 if options.room is None else options.room, segment=options.segment)
        memory.save(options.memory, state, parameters)
    room = model.room(state)
    behind = "any number of" if room is None else f"{int(room[0]):,}"
    print(f"{options.memory}: {int(state.cursor.count_B[0]):,} tokens read, {state_bytes(state):,} bytes, room for {behind} more tokens")


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
    kinds |= dict.fromkeys(("chunk", "ratios", "sinks", "beacon_token"), "beacon")
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
    if options.documents is None:
        # As many as the papers'.
        options.documents = 10 if config.algorithm == "longrope2" else 5
    for name in ("documents", "batch", "lanes", "segment", "together"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    if options.together and options.documents % options.together:
        raise UserError(f"--together is {options.together}; it must divide --documents, {options.documents}")
    task = Task(
        pathlib.Path(options.folder),
        parse_length(options.target_length),
        options.output,
        options.data,
        None if options.original_length is None else parse_length(options.original_length),
        *(options.documents, options.short, options.batch, options.lanes, options.together, options.segment, options.step, options.dtype),
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


def run_lm_eval(options: argparse.Namespace) -> None:
    """infinicontext lm-eval [what lm_eval takes]"""
    try:
        # Importing it tells lm_eval of our models.
        from lm_eval.__main__ import cli_evaluate

        import infinicontext.evaluation.harness  # noqa: F401
    except ImportError as error:
        raise UserError(f'lm-evaluation-harness is missing: pip install "infinicontext[harness]" ({error})') from error
    sys.argv = ["infinicontext lm-eval", *options.overrides]
    cli_evaluate()


def run_download(options: argparse.Namespace) -> None:
    """infinicontext download ruler [--folder FOLDER]"""
    download(options.folder, print)


def run_training_questions(options: argparse.Namespace) -> None:
    """infinicontext training-questions FILE.py:FUNCTION OUT.jsonl --tasks ... [--lengths ...] [--samples N] [--seed S]"""
    if options.output is None:
        raise UserError("the output is missing: infinicontext training-questions FILE.py:FUNCTION OUT.jsonl --tasks ...")
    experiment = override(one_experiment(options.experiment), options.overrides, options.parser)
    tokenizer = tokenizer_of(experiment.data)
    if tokenizer is None:
        raise UserError(f"data is {type(experiment.data).__name__}, which has no tokenizer to write questions with")
    lengths = [parse_length(text) for text in options.lengths] if options.lengths else list(experiment.evaluation.lengths)
    say = lambda line: print(line, file=sys.stderr)
    written = write_questions(options.output, tokenizer, experiment.evaluation, options.tasks, lengths, options.samples, options.seed, say)
    print(f"{options.output}: {written:,} questions")


def run_ruler_tasks(options: argparse.Namespace) -> None:
    """infinicontext ruler-tasks FOLDER --tokenizer NAME [--lengths ...] [--tasks ...] [--samples N]"""
    named = {name: getattr(options, name) for name in ("chat", "folder", "splitter", "singular", "example_budget")}
    config = RulerEvaluation(tuple(options.tasks), options.samples, **named)
    lengths = [parse_length(text) for text in options.lengths]
    say = lambda line: print(line, file=sys.stderr)
    for name in write_tasks(options.output, load_tokenizer(options.tokenizer), config, lengths, say):
        print(name)


def with_memory(options: argparse.Namespace, config: models.TransformerConfig) -> models.InfiniConfig:
    """What --to infini makes of a Transformer: gates begin nearly closed, and the linear rule is written by."""
    segment = 2048 if options.segment is None else options.segment
    return models.InfiniConfig.of(config, segment=segment, update="linear", empty_memory="bypass", gate_init=-3.0)


def with_beacons(options: argparse.Namespace, config: models.TransformerConfig) -> models.BeaconConfig:
    """What --to beacon makes of a Transformer."""
    chunk = 1024 if options.chunk is None else options.chunk
    return models.BeaconConfig.of(config, chunk=chunk, ratios=tuple(options.ratios or (8,)), sinks=options.sinks or 0)


def with_feedback_memory(options: argparse.Namespace, config: models.TransformerConfig) -> models.FamConfig:
    """What --to fam makes of a Transformer; blocks that it has already are kept."""
    defaults = {"fam_length": 64} | ({} if config.attention == "block_window" else {"block": 1024, "memory_blocks": 1})
    given = {name: vars(options)[name] for name in ("block", "memory_blocks", "fam_length") if vars(options)[name] is not None}
    return models.FamConfig.of(config, **(defaults | given))


def all_on_tensor() -> jax.sharding.Mesh:
    """The mesh for a single stream: all devices share each layer."""
    return sharding.make_mesh(sharding.MeshConfig(data=1, tensor=jax.device_count()))


def run_bench(options: argparse.Namespace) -> None:
    """infinicontext bench WHAT [--batch B] [--length T] [--dim D] [--rounds N]"""
    # Here, because nothing else needs it.
    from infinicontext.bench import BENCHMARKS, Size
    from infinicontext.bench_beacon import bench_beacon
    from infinicontext.bench_fam import bench_fam
    from infinicontext.bench_infini import bench_infini
    from infinicontext.bench_longrope import bench_longrope
    from infinicontext.bench_selective import bench_selective

    own = {"infini": bench_infini, "fam": bench_fam, "beacon": bench_beacon, "longrope": bench_longrope, "selective": bench_selective}
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
