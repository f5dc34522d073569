"""Finds a function or class of the user by its name in the settings: package.module:name or path/to/file.py:name."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def find(spec: str, kind: str, built_in: Iterable[str], error: type[ValueError]) -> Callable[..., Any]:
    """The function or class that `spec` names.

    Args:
        spec: "package.module:name", or "path/to/file.py:name". The path is relative to the current directory. The
            directory of the file is not added to the import path.
        kind: what error messages call it. Example: "reward function".
        built_in: the names without a colon that would also have been right, for error messages.
        error: the exception if there is nothing of this name. An error inside the module or file is raised unchanged.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise error(
            f"{kind} {spec!r} is unknown: expected one of {', '.join(built_in)}, or "
            f"'package.module:name', or 'path/to/file.py:name'{did_you_mean(spec, built_in)}"
        )
    load = _load_file if where.endswith(".py") else _load_module
    module = load(where, f"{kind} {spec!r}", error)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if _defined(value, module) and not n.startswith("_")]
        fault = "is not callable" if hasattr(module, name) else "does not exist"
        raise error(
            f"{kind} {spec!r}: {name!r} {fault} in {where!r}; its functions and classes are "
            f"{', '.join(known) or '(none)'}{did_you_mean(name, known)}"
        )
    return found


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the allowed name that is nearest to the given one. Empty if none is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _defined(value: Any, module: ModuleType) -> bool:
    return inspect.isfunction(value) or (inspect.isclass(value) and value.__module__ == module.__name__)


def _load_module(where: str, what: str, error: type[ValueError]) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as missing:
        # If `where` itself is missing, the setting is wrong. If `where` imports a package that is missing, the user
        # needs the full traceback.
        if missing.name is None or not f"{where}.".startswith(f"{missing.name}."):
            raise
        raise error(
            f"{what}: there is no module {missing.name!r} on the import path; expected 'package.module:name', or "
            "'path/to/file.py:name' for a file outside it"
        ) from missing


def _load_file(where: str, what: str, error: type[ValueError]) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise error(f"{what}: there is no file {path}{did_you_mean(path.name, _siblings(path))}")
    name = f"reval_user_file_{path.stem}"
    file_spec = importlib.util.spec_from_file_location(name, path)
    assert file_spec is not None and file_spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    file_spec.loader.exec_module(module)
    return module


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
