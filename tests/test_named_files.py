"""Every file that a source file, a config or a page names is in the repository.

A file name is a word with one of the ENDINGS below: `loop.py`, `rewards/pool.py`, `docs/method.md`. A bare name must be
the name of a tracked file in any folder. A name with folders must be the end of a tracked path: `rewards/pool.py` is
the end of `reval/rewards/pool.py`. A word that starts with a top-level folder and ends with a slash must be a folder:
`benchmarks/results/`. ALLOWED lists names of files that are elsewhere, with the reason.

Python is read token by token, so that an attribute named `.h` is not taken for a file. In tests only comments and
docstrings are read: tests make up files in temporary folders, and fail by themselves where a real file is missing.
"""

from __future__ import annotations

import io
import posixpath
import re
import subprocess
import tokenize
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ = ("*.py", "*.cpp", "*.h", "*.yaml", "*.md", "Makefile", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml")
ENDINGS = "py|cpp|h|yaml|toml|md|txt|png|json|jsonl"
FILE_NAME = re.compile(rf"[\w./*-]*[\w*]\.(?:{ENDINGS})(?!\w|\.\w)")
FOLDER = re.compile(r"(?<![\w./-])((?:\w+/)+)(?![\w*<{-])")
NOT_OURS = re.compile(r"\w+://\S+|#include <\S+>")  # addresses and system headers

# Names without folders stand for that name in any folder.
WRITTEN_BY_A_RUN = (
    "config.yaml metrics.jsonl samples.jsonl rollouts.jsonl nonfinite.jsonl reward_errors.txt curves.png "
    "evaluation.jsonl state.json"
).split()
ALLOWED = {
    "a run writes it into its folder": [
        *WRITTEN_BY_A_RUN,
        "reval_state.json",  # ReValTrainer, into a checkpoint of TRL
        *"iteration-*.jsonl evaluations/*.jsonl evaluation-2.jsonl evaluation*.jsonl".split(),
    ],
    "a build or a benchmark writes it": [
        "index.md",
        "settings.md",
        "not_built.txt",
        "metadata.json",
        "-times.png",
        "-curves.png",
        "-overhead.json",
        "families.json",
        "runs/demo/against-grpo.png",
    ],
    "a study writes it": (
        "cell.json log.txt recipe.json train.jsonl held_out.jsonl evidence.json study-NAME.png study-.png"
    ).split(),
    "the user provides it, or an example makes it up": (
        "CONFIG.yaml MORE.yaml FILE.png mine.yaml problems.jsonl my/set.jsonl t0.7.jsonl t1.0.jsonl "
        "path/to/file.py file.py huber.yaml ddp.py fsdp.py"
    ).split(),
    "a library has it: transformers, the CHAMP data set, the compiler": (
        "config.json tokenizer.json tokenizer_config.json vocab.json vocab.txt tekken.json v0.json immintrin.h"
    ).split(),
    "another trainer has it (docs/hooks.md)": (
        "lm_head.py src/prime_rl/trainer/rl/loss.py openrlhf/models/loss.py openrlhf/trainer/ray/ppo_actor.py "
        "skyrl/backends/skyrl_train/utils/ppo_utils.py slime/backends/megatron_utils/loss.py "
        "nemo_rl/algorithms/grpo.py nemo_rl/algorithms/loss/interfaces.py torchtitan/experiments/rl/losses/dapo.py"
    ).split(),
}


@cache
def tracked_files() -> list[str]:
    """Paths from the repository root, without those that are deleted but not yet committed."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git does not list the files of {ROOT}: {listed.stderr.strip()}")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]


@cache
def endings_of_paths() -> set[str]:
    """Every end of every tracked path: for docs/method.md it is {"docs/method.md", "method.md"}."""
    parts = [path.split("/") for path in tracked_files()]
    return {"/".join(path[first:]) for path in parts for first in range(len(path))}


def comments_and_strings(source: str, *, code_strings: bool) -> str:
    """The comments and docstrings of Python source, and its other strings where `code_strings` is true."""
    found, at_start = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        is_string = name in ("STRING", "FSTRING_MIDDLE")
        if name == "COMMENT" or (is_string and (code_strings or at_start)):
            found.append(token.string)
        if name not in ("COMMENT", "NL"):
            at_start = name in ("NEWLINE", "INDENT", "DEDENT")  # a string that starts a statement is a docstring
    return "\n".join(found)


def named_files(path: str, text: str) -> set[str]:
    if path.endswith(".py"):
        text = comments_and_strings(text, code_strings=not path.startswith("tests/"))
    text = NOT_OURS.sub("", text)
    folders = {name for name in FOLDER.findall(text) if any(path.startswith(top(name)) for path in tracked_files())}
    return folders | set(FILE_NAME.findall(text))


def top(name: str) -> str:
    return name.partition("/")[0] + "/"


def is_there(name: str) -> bool:
    if name.endswith("/"):
        return any(path.startswith(name) for path in tracked_files())
    name = name.lstrip("./")  # ../README.md, f"{folder}/loop.py"
    if "*" in name:
        return any(fnmatch(path, name) for path in endings_of_paths())
    return name in endings_of_paths()


def is_allowed(name: str) -> bool:
    names = [allowed for group in ALLOWED.values() for allowed in group]
    return any(name == allowed or fnmatch(posixpath.basename(name), allowed) for allowed in names)


def missing_names(path: str, text: str) -> list[str]:
    return sorted(name for name in named_files(path, text) if not is_there(name) and not is_allowed(name))


def test_every_named_file_exists():
    missing = {}
    for path in tracked_files():
        if any(fnmatch(posixpath.basename(path), pattern) for pattern in READ):
            if names := missing_names(path, (ROOT / path).read_text(encoding="utf-8")):
                missing[path] = names
    lines = "\n".join(f"  {path}: {', '.join(names)}" for path, names in missing.items())
    assert not missing, f"files are named that git does not track (correct the name, or add it to ALLOWED):\n{lines}"


def test_the_files_of_a_run_have_the_names_that_the_trainer_writes():
    sources = [path for path in tracked_files() if path.startswith("reval/") and path.endswith(".py")]
    code = "".join(re.sub(r'"""(.|\n)*?"""|#.*', "", (ROOT / path).read_text(encoding="utf-8")) for path in sources)
    assert [name for name in WRITTEN_BY_A_RUN if name not in code] == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("reval/loop.py", '"""Training: GONE.md section 5."""'),
        ("reval/loop.py", "x = 1  # see gone.h"),
        ("reval/loop.py", 'path = f"{folder}/gone.py"'),
        ("tests/reval/test_loop.py", '"""Like reval/gone.py."""'),
        ("reval_kernels/backends/cpu/rows.cpp", '#include "gone.h"'),
        ("docs/troubleshooting.md", "the batch is in `nonfinite-N.jsonl`"),
        ("docs/method.md", "[the loop](../reval/docs/method.md)"),
        ("configs/demo.yaml", "beta: 0.1  # docs/gone.md section 3"),
        ("docs/kernels.md", "| file (reval_kernels/backends/gone/) |"),
        ("Makefile", "$(wildcard reval_kernels/gone/*.cpp)"),
    ],
)
def test_a_missing_file_is_found(path, text):
    assert len(missing_names(path, text)) == 1


@pytest.mark.parametrize(
    "path, text",
    [
        ("reval/loop.py", "hidden = head.h.json  # docs/method.md, loop.py"),
        ("tests/reval/test_loop.py", 'path = tmp_path / "gone.py"'),
        ("reval_kernels/backends/cpu/rows.cpp", "#include <immintrin/gone.h>"),
        (
            "docs/method.md",
            "[a](../README.md), https://example.org/gone.py, RUN/iteration-000005.jsonl",
        ),
        ("docs/kernels.md", "`reval_kernels/backends/`, `RUN/evaluations/`, `data/benchmarks/<name>`"),
        ("Makefile", "$(wildcard reval_kernels/backends/cpu/*.cpp)"),
    ],
)
def test_a_file_that_is_there_or_elsewhere_is_not(path, text):
    assert missing_names(path, text) == []
