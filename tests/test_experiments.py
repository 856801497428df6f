"""Every function in experiments/ gives experiments that a run folder can hold."""

import importlib.util
import inspect
import pathlib

import pytest

from infinicontext.experiment import from_plain, to_plain

FILES = sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_experiments(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what they read is written by commands
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == path.stem and not name.startswith("_")
    }
    assert functions
    for name, function in functions.items():
        assert function.__doc__, name
        found = function()
        found = found if isinstance(found, list) else [found]
        assert len({experiment.name for experiment in found}) == len(found), name
        for experiment in found:
            assert from_plain(to_plain(experiment)) == experiment
