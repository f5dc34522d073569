"""The examples: the size and the imports that one_file.py promises, a run that learns; a run of each other example."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "one_file.py"
ENVIRONMENT = ROOT / "examples" / "environment.py"
ALLOWED = {"torch", "transformers", "reval_kernels"} | sys.stdlib_module_names
# The trainer package `reval` must stay out of the process, also as an import of an import.
RUN = f"""
import runpy, sys
sys.argv[0] = {str(EXAMPLE)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
assert "reval_kernels" in sys.modules
assert "reval" not in sys.modules
"""


def run(*words: str) -> str:
    """The output of the example as a program; its time is removed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.sub(r"; \d+ s\n", "\n", done.stdout)


def test_the_example_is_one_short_file_that_needs_no_trainer():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported <= ALLOWED
    assert {"transformers", "reval_kernels"} <= imported


def test_the_same_seed_gives_the_same_run():
    first = run("--seed", "3", "--iterations", "6")
    assert first == run("--seed", "3", "--iterations", "6")
    lines = first.splitlines()
    assert len(lines) == 7  # one line for each iteration, then the accuracy
    assert all(re.fullmatch(r" +\d+  reward \d.\d{3}  \|residual\| \d+.\d{3}  loss \d+.\d{3}", s) for s in lines[:-1])


@pytest.mark.slow
def test_the_policy_learns():
    """Seeds 0 to 4 end at 0.95 to 1.00. A guess of the digits with the right length has 0.01."""
    found = re.search(r"accuracy on held-out prompts: ([\d.]+) before, ([\d.]+) after", run("--seed", "0"))
    assert found
    before, after = map(float, found.groups())
    assert before < 0.1
    assert after > 0.7


SHORT = {
    "offline.py": r"accuracy: 0\.3\d in the log, .*\naccuracy: 0\.[6-9]\d after training with ReVal\n$",
    "own_loss.py": r"best policy has 0\.95 .*\nright actions: 0\.[3-6]\d with the square, 0\.7\d with Huber",
    "score_corpus.py": r"^of the 55 texts with the highest score, 5[0-5] are right\n",
    "vocabulary_parallel.py": r"500 of 1001 words, loss (\d+\.\d+), as of one process \(\1\)",
}
"""Examples that take no data and end by themselves, with what they print."""


@pytest.mark.parametrize("name", SHORT)
def test_a_short_example_prints_what_it_found(name):
    """Each also checks itself: gradients of the own loss, sums of endogenous rewards, the loss of one process."""
    source = (ROOT / "examples" / name).read_text()
    assert len(source.splitlines()) <= 150
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported <= {"torch", "reval_kernels"} | sys.stdlib_module_names
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SHORT[name], done.stdout, re.DOTALL), done.stdout


def test_the_index_lists_every_example():
    folder = ROOT / "examples"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.suffix in (".py", ".jsonl", ".yaml")}
    assert "verl/reval.yaml" in files
    assert set(re.findall(r"^\| `([\w/]+\.\w+)` \|", (folder / "README.md").read_text(), re.MULTILINE)) == files


def test_an_environment_of_ones_own(tmp_path):
    """The command that the example prints works, for two iterations."""
    source = ENVIRONMENT.read_text()
    assert len(source.splitlines()) <= 50 and not re.search(r"^(from|import) reval", source, re.MULTILINE)
    command = re.search(r"\n    reval (train (?:.*\\\\\n)*.*)\n", source)
    assert command
    words = shlex.split(command[1].replace("\\\\\n", " "))
    words += ["run.iterations=2", f"run.dir={tmp_path}", "data.size=20", "data.held_out=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "reval.cli", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2/2 | reward " in done.stdout + done.stderr
    assert not (tmp_path / "reward_errors.txt").exists()


def test_the_environment_of_ones_own_answers():
    task = runpy.run_path(str(ENVIRONMENT))["Backwards"](tries=2)
    [row] = task.problems(1, 0, letters="ab", length=3)
    assert set(row["word"]) <= set("ab") and len(row["word"]) == 3
    assert task.reset({"word": "abc"}) == [{"role": "user", "content": "Write abc backwards."}]
    assert task.step("cab?") == ([{"role": "user", "content": "c??"}], 0.0, False)
    assert task.step("c") == ([{"role": "user", "content": "c??"}], 1 - 2 / 3, True)
    task.reset({"word": "abc"})
    assert task.step(" cba\n") == ([], 1.0, True)


@pytest.mark.parametrize("name", ["grpo_log_probs", "dpo_sft"])
def test_the_examples_of_losses_need_no_trainer(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 140 and not re.search(r"^(from|import) reval\b", source, re.MULTILINE)


def test_grpo_with_its_log_prob_line_replaced(capsys):
    """The same loss and gradients, at a fraction of the memory."""
    example = runpy.run_path(str(ROOT / "examples" / "grpo_log_probs.py"))
    example["main"](tokens=64, vocabulary=8192)
    found = re.findall(r"loss (\S+)  peak +(\S+) MiB", capsys.readouterr().out)
    (before, peak_before), (after, peak_after) = [tuple(map(float, pair)) for pair in found]
    assert abs(before - after) <= 1e-5 and abs(before) > 1e-3
    assert peak_before > 8 * 63 * 8192 * 4 / 2**20  # at least one tensor of logits
    assert peak_after < peak_before / 2


def test_dpo_and_sft_on_the_same_token_values():
    """DPO with the SFT term makes the chosen responses likely; DPO alone does not (probabilities 0.88 and 0.02)."""
    train = runpy.run_path(str(ROOT / "examples" / "dpo_sft.py"))["train"]
    after_sft, after_dpo = train(steps=60, sft=1.0, seed=0)
    assert after_sft > 0.6 and after_dpo > 0.7
    assert train(steps=60, sft=0.0, seed=0)[1] < 0.2
