"""What can be wrong with an experiment on this machine, found before anything is written."""

import pathlib

import jax

from infinicontext import models, sharding
from infinicontext.data import pipeline
from infinicontext.data.images import ImageData, class_names
from infinicontext.data.reference import HEADER
from infinicontext.errors import UserError
from infinicontext.experiment import Experiment
from infinicontext.files import read_json
from infinicontext.objectives.selective import Selective


def check(experiment: Experiment) -> None:
    """Raises UserError if the experiment does not fit its data or this machine's devices."""
    check_ids(experiment)
    check_devices(experiment)
    check_reference(experiment)


def check_reference(experiment: Experiment) -> None:
    """Raises UserError if what a selective objective ranks tokens by comes from nowhere, or from two places."""
    objective = experiment.objective
    if not isinstance(objective, Selective):
        return
    stored = getattr(experiment.data, "reference", "")
    if getattr(experiment.data, "copy_tokens", 0):
        raise UserError(f"data.copy_tokens is {experiment.data.copy_tokens}; a selective objective, which knows no weights, needs 0")
    if stored:
        has = read_json(pathlib.Path(stored) / HEADER).get("scores", [])
        if lacking := [name for name in objective.needs if name not in has]:
            raise UserError(f"data.reference {stored} has no {lacking[0]}; infinicontext score-tokens --entropy makes both scores")
    if objective.needs and not (objective.reference or stored):
        raise UserError(
            f"objective.score {objective.score} needs a reference: objective.reference, a run folder, or data.reference, a folder that "
            "infinicontext score-tokens has made"
        )
    if objective.reference and (stored or not objective.needs):
        other = f"data.reference is {stored}" if stored else f"objective.score is {objective.score}, which needs none"
        raise UserError(f"objective.reference is {objective.reference}, but {other}; leave one out")


def check_ids(experiment: Experiment) -> None:
    """Raises UserError if the model has no ids for what the data hold, or is trained on what it cannot choose."""
    if type(experiment.model) in models.CLASSIFIERS:
        check_classifier(experiment)
    size = pipeline.vocabulary_size(experiment.data)
    if experiment.model.vocab_size < size:
        source = getattr(experiment.data, "tokenizer", None)
        has = f"data.tokenizer {source} has {size} tokens" if source else f"the ids of data are {size}"
        raise UserError(f"model.vocab_size is {experiment.model.vocab_size}, but {has}")


def check_classifier(experiment: Experiment) -> None:
    """Raises UserError if some target of a classifier would be no class of its."""
    model, data, objective = experiment.model, experiment.data, experiment.objective
    if isinstance(objective, Selective):
        raise UserError(f"objective is Selective; a {type(model).__name__}, which predicts nothing but the class, needs NextToken")
    if not isinstance(data, ImageData):
        raise UserError(f"data is {type(data).__name__}, but model is {type(model).__name__}, a classifier, which needs ImageData")
    if objective.loss != "answers" or objective.context_weight:
        raise UserError(
            f'objective.loss is "{objective.loss}" and objective.context_weight {objective.context_weight:g}; a classifier, which predicts '
            'nothing but the class, needs "answers" and 0'
        )
    if model.vocab_size - model.classes != data.levels:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}; it must be data.levels + model.classes, {data.levels} + {model.classes}, so that the "
            "classes follow the gray levels"
        )
    if model.classes < (count := len(class_names(data))):
        raise UserError(f"model.classes is {model.classes}, but data has {count}; it must be {count} or more")


def check_devices(experiment: Experiment) -> None:
    """Raises UserError if the experiment does not fit this machine's devices."""
    mesh = sharding.make_mesh(experiment.mesh)
    model = getattr(experiment.model, "model", experiment.model)
    if mesh.shape["context"] > 1 and isinstance(model, models.FamConfig | models.BeaconConfig):
        raise UserError(
            f"mesh.context is {mesh.shape['context']}; with a {type(model).__name__}, whose blocks follow one another, it must be 1"
        )
    shards = sharding.batch_divisor(mesh)
    if experiment.batch_size % (shards * experiment.accumulation):
        raise UserError(
            f"batch_size is {experiment.batch_size}; on this mesh it must be a multiple of {shards * experiment.accumulation} "
            f"(mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} x accumulation {experiment.accumulation})"
        )
    if shards % jax.process_count():
        raise UserError(
            f"mesh.data x mesh.fsdp is {shards}; it must be a multiple of the number of processes, {jax.process_count()}, "
            "because each process reads its own rows"
        )
