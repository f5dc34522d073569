"""Reads, writes and explains settings, for any dataclass whose fields are section dataclasses.

This file contains no name of a setting: `reval.config` declares the settings, and loading, error messages and help
text follow from the declarations. It does not import torch or transformers, so that `--help` is fast.
"""

import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A setting, a config file or the command line is wrong. The command prints the message and exits with status 2."""


# ---- YAML ----------------------------------------------------------------------------------------------------------

TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
NULL = re.compile(r"(?:~|null|Null|NULL|None|)$")


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does, where PyYAML follows YAML 1.1.

    1e-6 is a float (1.1: text). `yes`, `on`, 1:30 and dates are text (1.1: true, true, 90, a date). 010 is 10 (1.1: 8).
    Two extensions: `None` is null, because Python users type it, and 1_000 is an int. A duplicate key is an error.
    """

    yaml_implicit_resolvers: dict = {}

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Writes YAML that readers of YAML 1.1 and of YAML 1.2 both read back correctly.

    It has PyYAML's resolvers (YAML 1.1) and ours. Text that one of them would read as another type is quoted.
    """


_Loader.add_implicit_resolver(TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(TAG + "int", re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(TAG + "merge", re.compile(r"<<$"), ["<"])
_Loader.add_constructor(TAG + "int", _construct_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))
    _class.add_implicit_resolver(TAG + "null", NULL, ["~", "n", "N", ""])
# In single quotes, PyYAML writes the line breaks \x85, \u2028 and \u2029 unescaped, and then reads them back as spaces.
# Double quotes escape them.
_Dumper.add_representer(
    str,
    lambda dumper, v: dumper.represent_scalar(
        TAG + "str", v, style='"' if re.search("[\n\x85\u2028\u2029]", v) else None
    ),
)
for _type in (list, tuple):
    _Dumper.add_representer(_type, lambda dumper, v: dumper.represent_sequence(TAG + "seq", v, flow_style=True))


def parse_yaml(text: str, source: str) -> Any:
    """The value of the YAML document `text`. Bad YAML raises a ConfigError, whose message starts with `source`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{source}{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None


def dump_yaml(data: dict[str, Any], ascii_only: bool = False) -> str:
    """`data` as YAML. `parse_yaml` and any reader of YAML 1.1 read it back to an equal value.

    With `ascii_only`, YAML's escapes stand for all other characters.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only, width=sys.maxsize)


# ---- Types ---------------------------------------------------------------------------------------------------------

PLAIN_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}


def describe(kind: Any) -> str:
    """A type in words, for the help text and for error messages. Example: `int | None` is "a whole number, or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return f"{describe(args[0])}, or null"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(args)
    if origin is tuple:
        return f"a list [{', '.join(describe(arg) for arg in args)}]"
    if origin is list:
        return f"a list [{describe(args[0])}, ...]"
    if origin is dict:
        return "a mapping {name: value, ...}"
    return PLAIN_NAMES[kind]


def show(value: Any) -> str:
    """A value as a user writes it in YAML, with text in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    return repr(value)


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value` converted to the type `kind`. Raises a ConfigError about the setting `name` if that would lose something.

    Example: 1e3 becomes the int 1000, and 1.5 is refused as an int.
    """
    try:
        return _cast(value, kind)
    except (TypeError, OverflowError):
        hint = "; put quotes around it" if kind in (str, str | None) and isinstance(value, int | float) else ""
        raise ConfigError(f"{name} must be {describe(kind)}; got {show(value)}{hint}") from None


def _cast(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_list = isinstance(value, list | tuple)
    if kind is Any or (origin is Literal and value in args):
        return value
    if origin is UnionType:  # always T | None
        return None if value is None else _cast(value, args[0])
    if origin is tuple and is_list and len(value) == len(args):
        return tuple(_cast(item, arg) for item, arg in zip(value, args, strict=True))
    if origin is list and is_list:
        return [_cast(item, args[0]) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == value // 1:  # accepts 1e3; refuses inf, because inf // 1 is nan
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise TypeError


def expand_home(value: Any) -> Any:
    """A path, or a list of paths, with the home folder in the place of a leading `~`. Other values stay as they are."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


# ---- Loading -------------------------------------------------------------------------------------------------------


def settings(config_class: type) -> dict[str, Field]:
    """Every setting, keyed by its full name `section.field`, in the order of declaration."""
    sections = get_type_hints(config_class)
    return {f"{section}.{field.name}": field for section, kind in sections.items() for field in fields(kind)}


def default_of(field: Field) -> Any:
    """The default of a setting. A mutable default is a new object in every call."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def load(config_class: type[ConfigT], paths: Iterable[str | Path], overrides: Iterable[str]) -> ConfigT:
    """Read the files in order, then apply the `section.field=value` overrides in order. The last value wins.

    Raises ConfigError when a file, a name or a value is wrong.
    """
    known = settings(config_class)
    values: dict[str, Any] = {}
    for path in paths:
        values.update(_read_file(Path(path).expanduser(), known))
    for override in overrides:
        _apply_override(values, override, known)
    sections = {}
    for section, kind in get_type_hints(config_class).items():
        own = {field.name: f"{section}.{field.name}" for field in fields(kind)}
        sections[section] = kind(**{f: values[name] for f, name in own.items() if name in values})
    return config_class(**sections)


def is_override(argument: str) -> bool:
    """True if a command-line argument sets a setting (`optim.lr=1`). Otherwise the argument names a file."""
    return re.fullmatch(r"[A-Za-z_][\w.-]*=.*", argument, re.DOTALL) is not None


def _read_file(path: Path, known: dict[str, Field]) -> dict[str, Any]:
    document = parse_yaml(_read_text(path, known), str(path))
    if not isinstance(document, dict | None):
        raise ConfigError(f"{path} must hold sections ({', '.join(_sections(known))}); got {show(document)}")
    values = {}
    for section, body in (document or {}).items():
        section = str(section)
        if section in known:
            nested = "{{{}: ...}}".format(section.split(".")[1])
            raise ConfigError(f"{path}: '{section}' must be nested in a file: `{section.split('.')[0]}: {nested}`")
        if section not in _sections(known):
            inside = next(iter(body), None) if isinstance(body, dict) else None
            raise ConfigError(f"{path}: {_unknown(section if inside is None else f'{section}.{inside}', known)}")
        if not isinstance(body, dict | None):
            raise ConfigError(f"{path}: {_is_section(section, known)}; got {show(body)}")
        for field, value in (body or {}).items():
            if f"{section}.{field}" not in known:
                raise ConfigError(f"{path}: {_unknown(f'{section}.{field}', known)}")
            values[f"{section}.{field}"] = value
    return values


def installed(path: Path) -> Path:
    """The path itself or, if no such file is there, the file of that name among the installed configs (configs/...)."""
    ours = Path(__file__).parent / path
    return ours if path.parts[:1] == ("configs",) and not path.exists() and ours.exists() else path


def _read_text(path: Path, known: dict[str, Field]) -> str:
    try:
        return installed(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if str(path) in known:
            raise ConfigError(f"{path} is a setting and needs a value: {path}=...") from None
        raise ConfigError(f"config file '{path}' does not exist; {_configs_in(path.parent)}") from None
    except IsADirectoryError:
        raise ConfigError(f"config file '{path}' is a folder; {_configs_in(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error}") from None


def _configs_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder '{folder}' does not exist either"
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    return f"'{folder}' holds {', '.join(found) or 'no .yaml file'}"


def _apply_override(values: dict[str, Any], override: str, known: dict[str, Field]) -> None:
    name, _, text = override.partition("=")
    parts = name.split(".")
    key, inside = ".".join(parts[:2]), parts[2:]
    if name in _sections(known):
        raise ConfigError(f"{_is_section(name, known)}; got {override!r}")
    if key not in known or "" in parts or (inside and get_origin(known[key].type) is not dict):
        raise ConfigError(_unknown(name, known))
    if not inside:
        values[key] = _parse_override(name, text, known[key].type)
        return
    # The setting is a free-form mapping. The parts of the name after section.field are keys in it:
    # data.options.deep.c=x sets data.options["deep"]["c"].
    node = values[key] = values.get(key, default_of(known[key]))
    for depth, part in enumerate([*inside[:-1], None], start=2):
        if not isinstance(node, dict):
            raise ConfigError(f"{name} cannot be set: {'.'.join(parts[:depth])} holds {show(node)}, not a mapping")
        if part is not None:
            node = node.setdefault(part, {})
    node[inside[-1]] = _parse_override(name, text, Any)


def _parse_override(name: str, text: str, kind: Any) -> Any:
    if kind not in (str, str | None) or re.fullmatch(r"""(['"]).*\1""", text, re.DOTALL):
        return parse_yaml(text, f"cannot read {name}={text} as YAML")
    # Text is not parsed as YAML, because YAML reads `{question}` as a mapping and ` #1` as a comment.
    return None if kind is not str and NULL.match(text) else text


def _sections(known: dict[str, Field]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in known))


def _fields_of(section: str, known: dict[str, Field]) -> list[str]:
    return [name.split(".")[1] for name in known if name.startswith(section + ".")]


def _is_section(section: str, known: dict[str, Field]) -> str:
    return f"'{section}' is a section, with the settings {', '.join(_fields_of(section, known))}"


def _unknown(name: str, known: dict[str, Field]) -> str:
    """Error message for an unknown setting, with the most similar known settings.

    A candidate must have a similar field name. A similar section alone is not enough, because users often leave out the
    section or get it wrong (`lr` or `rollout.lr` for `optim.lr`).
    """
    parts = name.lower().split(".")
    section, field = (parts[0], parts[1]) if len(parts) > 1 else (None, parts[0])
    scores = {}
    for candidate in known:
        its_section, its_field = candidate.split(".")
        field_score = SequenceMatcher(None, field, its_field).ratio()
        if field_score > 0.6:
            section_score = SequenceMatcher(None, section, its_section).ratio() if section else 0.0
            scores[candidate] = field_score + section_score
    if scores:
        near = [f"'{candidate}'" for candidate, score in scores.items() if score == max(scores.values())]
        return f"unknown setting '{name}'; did you mean {' or '.join(near)}?"
    if section in _sections(known):
        return f"unknown setting '{name}'; '{section}' has {', '.join(_fields_of(section, known))}"
    return f"unknown setting '{name}'; the sections are {', '.join(_sections(known))}; --help lists every setting"


# ---- Help ----------------------------------------------------------------------------------------------------------


def field_docs(section_class: type) -> dict[str, str]:
    """The text under each field of a dataclass, by field name. Python drops this text, so the source is parsed."""
    module = ast.parse(inspect.getsource(sys.modules[section_class.__module__]))
    (body,) = (n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == section_class.__name__)
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            if isinstance(field.target, ast.Name) and isinstance(text.value.value, str):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def help_text(config_class: type, width: int = 100) -> str:
    """Every setting with its default, type and meaning, grouped by section; lines have at most `width` characters."""
    lines = []
    for section, kind in get_type_hints(config_class).items():
        docs = field_docs(kind)
        lines += ["", f"{section}: {kind.__doc__}"]
        for field in fields(kind):
            default = default_of(field)
            shown = default if isinstance(default, str) else show(default)
            declared = f"  {section}.{field.name}={shown}   ({describe(field.type)})"
            lines += textwrap.wrap(declared, width, subsequent_indent=" " * 8)
            lines += textwrap.wrap(docs[field.name], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])
