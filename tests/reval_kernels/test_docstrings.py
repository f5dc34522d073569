"""The docstrings of the public names: sections, examples that run, and a place on a reference page."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import reval_kernels
from reval_kernels import hf

ROOT = Path(__file__).parents[2]
PUBLIC = {name: getattr(reval_kernels, name) for name in reval_kernels.__all__ if name != "__version__"}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)} | {
    "TokenValues.returns": reval_kernels.TokenValues.returns
}


def documented(text: str, heading: str) -> set[str]:
    """The names that a section of a docstring explains: `mask, beta: as in ...` explains two."""
    section = re.search(rf"^    (?:    )?{heading}:\n(.*?)(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, heading
    lines = section[1].split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    own = [line.strip() for line in lines if len(line) - len(line.lstrip()) == indent]
    return {name for line in own for part in line.split(";") for name in re.findall(r"\w+", part.partition(":")[0])}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    assert PUBLIC[name].__doc__ and len(PUBLIC[name].__doc__) > 50


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_arguments_results_and_errors(name):
    function, text = FUNCTIONS[name], FUNCTIONS[name].__doc__
    arguments = [p for p in inspect.signature(function).parameters if p != "self"]
    if arguments:
        assert set(arguments) <= documented(text, "Args")
        assert documented(text, "Raises") & {"ValueError"}
    assert documented(text, "Returns")
    assert "    Examples:\n" in text


@pytest.mark.parametrize("function", [hf.token_values_of, hf.at_head, hf.head_of])
def test_the_functions_for_models_document_arguments_results_and_errors(function):
    assert set(inspect.signature(function).parameters) <= documented(function.__doc__, "Args")
    assert {"TypeError", "ValueError"} <= documented(function.__doc__, "Raises")
    assert re.search(r"^    Returns:\n        \S", function.__doc__, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_the_docstrings_run(name):
    runner = doctest.DocTestRunner()
    found = PUBLIC[name]
    if isinstance(found, ModuleType):  # its functions are tested under their own names
        tests = [doctest.DocTestParser().get_doctest(found.__doc__, {}, name, None, None)]
    else:
        tests = [test for test in doctest.DocTestFinder().find(found, name, globs={}) if test.examples]
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
    assert runner.tries > 0 or name in ("BellmanLoss", "TDTargets"), f"{name} has no example"


def test_the_definitions_have_the_same_arguments():
    """Except those that choose how to compute."""
    how = {"backend", "inplace_grad", "precision", "process_group"}
    for name in (
        "token_values",
        "linear_token_values",
        "td_targets",
        "bellman_loss",
        "reval_loss",
        "linear_reval_loss",
    ):
        own = inspect.signature(PUBLIC[name]).parameters.keys() - how
        assert own == inspect.signature(getattr(reval_kernels.reference, name)).parameters.keys()
        assert getattr(reval_kernels.reference, name).__doc__


def test_every_public_name_is_on_the_reference_page():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(reval_kernels[\w.]+)` \|", page, re.MULTILINE)
    of_modules = [name for name in listed if re.match(r"reval_kernels\.(hf|compat)\.", name)]  # the site has them too
    assert {name.rpartition(".")[2] for name in listed if name not in of_modules} - {"BackendInfo"} == PUBLIC.keys()
    assert {"reval_kernels.hf.token_values_of", "reval_kernels.hf.at_head", "reval_kernels.hf.head_of"} <= set(listed)
