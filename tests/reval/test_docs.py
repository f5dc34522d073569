"""The documentation names only things that exist. The Python code runs or compiles, reval accepts the commands and the
settings, and every link has a target. tests/test_named_files.py checks the files that the pages name.

A page may define a config file by a yaml block whose first line is its name as a comment (`# mine.yaml`), and then use
it in commands.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from reval import cli, config_io
from reval.config import Config, load_config
from reval.environments import Conversation, EnvironmentPool

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
SETTINGS = set(config_io.settings(Config))
SECTIONS = {name.partition(".")[0] for name in SETTINGS}
CITING = ("reval", "reval_kernels", "tests")
OTHERS = {"data.train_batch_size", "data.train_files", "data.val_files"}  # settings of verl
FILE_ENDINGS = {"py", "md", "yaml", "jsonl", "json", "parquet", "safetensors", "txt", "png", "cpp", "h"}
SOURCES = "".join(p.read_text("utf-8") for package in CITING[:2] for p in (ROOT / package).rglob("*.py"))

page = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "python") -> list[str]:
    # the pieces repeat: prose, the language of a block, the text of the block
    pieces = re.split(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in zip(pieces[1::3], pieces[2::3], strict=True) if name == language]


def prose(page: str) -> str:
    return "".join(re.split(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)[::3])


# ---- Python ----


@page
def test_python_compiles(page):
    for block in blocks(page):
        compile(block, page, "exec")


def test_readme_code_runs():
    shown = blocks("README.md")
    assert shown
    names: dict = {}
    for block in shown:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].requires_grad and names["hidden"].grad.abs().sum() > 0


def test_code_in_huggingface_runs():
    """DDP, FSDP2 and peft included, in one process."""
    names: dict = {}
    for block in blocks("docs/huggingface.md"):
        exec(compile(block, "docs/huggingface.md", "exec"), names)
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())
    assert names["adapted"].base_model.model.lm_head.weight.grad is None


def test_code_in_the_method_runs():
    [block] = blocks("docs/method.md")
    exec(compile(block, "docs/method.md", "exec"), {})


def test_the_code_in_coming_from_runs_with_either_import():
    """Each block runs. Where the other library is installed, it runs with that library's import too, which the tables
    name; what it computes is close."""
    page = "docs/coming_from.md"
    imports = re.findall(r"^\| `(from \S+ import \w+)` \| `(from \S+ import \w+)` \|$", prose(page), re.MULTILINE)
    modules = {after.split()[1]: before.split()[1] for before, after in imports}
    shown = blocks(page)
    assert len(shown) == 3 and len(imports) == 8
    for _, after in imports:
        exec(after, {})
    for block in shown:
        exec(compile(block, page, "exec"), {})
        code = block.partition("\n# The same with log Z")[0].replace(", chunked_log_probs", "")  # TRL has no log Z
        [line] = re.findall(r"^from reval_kernels\.\S+ import .*$", code, re.MULTILINE)
        before = line.replace(line.split()[1], modules[line.split()[1]])
        try:
            exec(before, {})
        except ImportError:
            continue
        results: list[dict] = []
        for one in (code, code.replace(line, before)):
            torch.manual_seed(0)
            results.append({})
            exec(compile(one, page, "exec"), results[-1])
        ours, theirs = results
        named = {"log_probs", "entropies", "top_log_probs", "nll", "entropy", "is_top1", "selected"} & ours.keys()
        assert len(named) >= 3
        for name in named:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_the_loss_in_extending_equals_huber_and_trains(tmp_path, monkeypatch, tiny, tiny_config, trajectories):
    from reval import objectives
    from reval.batching import collate
    from reval.learner import Learner
    from reval.model.forward import hidden_states, token_values
    from reval.policy_gradients import value_objective
    from reval.reference_policy import ReferencePolicy, reference_of
    from reval_kernels.hf import head_of

    (tmp_path / "losses.py").write_text(block_with("docs/extending.md", "def huber"))
    (tmp_path / "huber.yaml").write_text(block_with("docs/extending.md", "losses.py:huber", "yaml"))
    config = load_config([ROOT / "configs" / "tiny.yaml", tmp_path / "huber.yaml"])
    monkeypatch.chdir(tmp_path)
    huber = value_objective(config.objective.name)
    model, _ = tiny
    members = trajectories(6)
    ReferencePolicy(model, tiny_config).annotate(members)
    batch = collate(members, model.device)
    reference = reference_of(members, batch)
    values = token_values(model, batch, tiny_config.model)
    given = (values, batch, reference, config.objective, objectives.Totals(6, 30, 8))
    out = huber(*given)
    kinds = get_type_hints(huber)  # the page says whose types these are
    assert all(isinstance(one, kind) for one, kind in zip((*given, out), kinds.values(), strict=True))
    out.loss.backward()
    expected = torch.nn.functional.huber_loss(out.residual, torch.zeros_like(out.residual), delta=5)
    assert (out.residual.abs() > 5).any() and (out.residual.abs() < 5).any()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    with torch.no_grad():
        hidden = hidden_states(model, batch, tiny_config.model)
        full = objectives.reval(hidden, head_of(model), batch, reference, tiny_config.objective, given[-1])
    torch.testing.assert_close(out.residual.detach(), full.residual, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.log_ratio.detach(), full.log_ratio, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight.grad.abs().sum() > 0
    learner = Learner(model, config)
    losses = [learner.update(members)["loss"] for _ in range(8)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4) and losses[-1] < losses[0]


def test_the_reward_in_extending_scores(tmp_path):
    from reval.rewards import RewardPool

    (tmp_path / "rewards.py").write_text(block_with("docs/extending.md", "def shorter_is_better"))
    with RewardPool(f"{tmp_path}/rewards.py:shorter_is_better", workers=1, timeout=10.0) as pool:
        scores = pool.score(["p", "p"], ["ab", "b"], [[1, 2], [2]], {"answer": ["x", "y"]})
    assert scores.rewards == [0.5, 1.0] and scores.errors == 0


def test_the_environment_in_environments_counts_down(tmp_path):
    code = blocks("docs/environments.md")[0]
    (tmp_path / "game.py").write_text(code)
    with EnvironmentPool(f"{tmp_path}/game.py:Countdown", {"penalty": 0.1}, workers=1, timeout=60) as pool:
        talks = [Conversation({"prompt": "?", "start": 2}) for _ in range(2)]
        pool.start()
        pool.advance(talks)
        for said in (["2", "2"], ["1", "3"]):
            for talk, completion in zip(talks, said, strict=True):
                talk.completions.append(completion)
            pool.advance(talks)
        assert [(t.done, t.reward, t.lost) for t in talks] == [(False, 0.0, False), (True, -0.1, False)]
        talks[0].completions.append("0")
        pool.advance(talks[:1])
        assert (talks[0].done, talks[0].reward) == (True, 1.0)


def test_the_rollout_engine_in_extending_has_every_method_of_the_protocol():
    from reval.rollout import RolloutEngine

    names: dict = {}
    exec(compile(block_with("docs/extending.md", "class Echo"), "docs/extending.md", "exec"), names)
    wanted = {name for name in vars(RolloutEngine) if not name.startswith("_")} | {*RolloutEngine.__annotations__}
    assert wanted <= {name for name in vars(names["Echo"]) if not name.startswith("_")}
    echo = names["Echo"](None, None, times=2)
    [[first, second]] = echo.generate([[5, 6]], responses=2, max_new_tokens=4, temperature=1.0, seed=0)
    assert first.token_ids == second.token_ids == [6, 6] and first.finished


def block_with(page: str, start: str, language: str = "python") -> str:
    [block] = [block for block in blocks(page, language) if start in block]
    return block


# ---- Settings ----


@page
def test_settings_exist(page):
    shown = re.findall(r"`[^`\n]+`", prose(page)) + blocks(page, "") + blocks(page, "bash")
    wrong = []
    for section, name in re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)", "\n".join(shown)):
        if name not in FILE_ENDINGS and f"{section}.{name}" not in SETTINGS | OTHERS:
            wrong.append(f"{section}.{name}")
    assert not wrong, f"{page} names settings that do not exist: {wrong}"


@page
def test_yaml_is_a_config(page, tmp_path):
    for block in blocks(page, "yaml"):
        path = tmp_path / "x.yaml"
        path.write_text(block)
        load_config([path])


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    """`...` in a message stands for any text, so each part between two `...` is searched. The source splits a message
    into strings on several lines; these are joined first."""
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCES)
    messages = re.findall(r'^\| "(.+?)" \|', text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 5
    for part in (part.strip() for message in messages for part in message.split("...")):
        assert part in joined, part


# ---- Commands ----


def commands(page: str) -> list[list[str]]:
    """The words of each command in the page's code blocks, without comments, with continued lines joined."""
    text = "\n".join(blocks(page, "") + blocks(page, "bash"))
    found = []
    for line in text.replace("\\\n", " ").split("\n"):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # not a command, for example output or a formula
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
            words = words[1:]
        if words:
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def reval_arguments(words: list[str]) -> list[str] | None:
    """The arguments of the reval command. None for another command."""
    if words[0] == "reval":
        return words[1:]
    if words[0] in ("python", "python3", "torchrun") and "reval.train" in words:
        return ["train", *words[words.index("reval.train") + 1 :]]
    return None


@page
def test_reval_commands_are_accepted(page, tmp_path, monkeypatch):
    for block in blocks(page, "yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (tmp_path / named[1]).write_text(block)
    for words in commands(page):
        arguments = reval_arguments(words)
        if arguments is None:
            continue
        command, *rest = arguments or [""]
        if command.startswith("-"):
            continue
        assert command in cli.COMMANDS, f"{page}: {' '.join(words)}"
        for flag in (word.partition("=")[0] for word in rest if word.startswith("-")):
            assert flag in re.findall(r"--[\w-]+", cli.USAGE), f"{page}: {' '.join(words)}"
        if command not in ("train", "evaluate"):
            continue
        overrides = [a for a in rest if config_io.is_override(a) and not a.startswith("-")]
        files = [a for a in rest if a.endswith(".yaml")]
        paths = [tmp_path / f if (tmp_path / f).exists() else ROOT / f for f in files]
        load_config(paths, overrides)


@page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    named = [w[1] for w in commands(page) if w[0] == "make" and len(w) > 1]
    named += re.findall(r"`make ([\w-]+)", prose(page))
    assert set(named) <= targets, f"{page}: {set(named) - targets}"


def test_cited_sections_of_the_method_exist():
    """`docs/method.md section 5` and `sections 2 to 4` in sources, `[M 5]` in the configs."""
    files = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".cpp", ".h") and p.relative_to(ROOT).parts[0] in CITING]
    cited = [n for p in files for n in re.findall(r"method\.md\s+sections? (\d(?: \w+ \d)?)", p.read_text("utf-8"))]
    cited += [n for p in (ROOT / "configs").glob("*.yaml") for n in re.findall(r"\[M (\d)\]", p.read_text("utf-8"))]
    sections = re.findall(r"^## (\d)\.", text_of("docs/method.md"), re.MULTILINE)
    assert len(cited) > 40 and set(re.findall(r"\d", "".join(cited))) <= set(sections)


# ---- Names of metrics, links ----


@page
def test_metrics_exist(page):
    """The last part of a metric's name is in the source. Example: `accuracy` of `eval/accuracy`."""
    missing = []
    for name in re.findall(r"`((?:reval|eval|rollout|buffer|completions|reference|time|replay)/[\w/]+)`", prose(page)):
        if name.rpartition("/")[2] not in SOURCES and not (ROOT / name).exists():
            missing.append(name)
    assert not missing, f"{page} names metrics that do not exist: {missing}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@page
def test_links_have_a_target(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {target}"


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)", text_of("docs/README.md")))
    assert linked >= {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
