"""rollout.engine=file.py:Class: an engine of the user in a run, and what its mistakes say.

The engine of docs/extending.md answers with the prompt's last token. One that shares the policy's weights gets the
policy itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reval.config import ConfigError, load_config
from reval.loop import train

ROOT = Path(__file__).parents[2]
[ECHO] = re.findall(
    r"```python\n(from reval.rollout import Response.*?)```", (ROOT / "docs/extending.md").read_text(), re.S
)
SHORT = ["run.iterations=1", "data.size=12", "data.held_out=0", "rollout.prompts=2", "rollout.responses=2"]


def settings(folder: Path, code: str, *overrides: str):
    (folder / "engines.py").write_text(code)
    given = [f"run.dir={folder / 'run'}", f"rollout.engine={folder / 'engines.py'}:Echo", "run.resume=false"]
    return load_config([ROOT / "configs" / "tiny.yaml"], [*SHORT, *given, *overrides])


@pytest.fixture
def code() -> str:
    return ECHO


def test_a_run_with_an_engine_of_ones_own(tmp_path, code):
    """Every sampled response is the prompt's last token, three times."""
    config = settings(tmp_path, code, "rollout.options.times=3", "rollout.probe_tokens=4")
    metrics = train(config)
    assert metrics["completions/mean_length"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert rows and all(len(set(row["completion"].split())) <= 1 for row in rows)


def test_an_engine_that_shares_the_weights_gets_the_policy(tmp_path, code):
    code = code.replace("shares_weights = False", "shares_weights = True").replace(
        "        self.times = times",
        "        self.times = times\n        assert model.get_output_embeddings().weight.requires_grad",
    )
    assert train(settings(tmp_path, code))["completions/mean_length"] == 1
    with pytest.raises(
        ConfigError, match="generates with the policy itself .* This needs one process, rollout.ahead=0"
    ):
        train(settings(tmp_path, code, "rollout.ahead=1", f"run.dir={tmp_path / 'other'}"))


def test_mistakes(tmp_path, code):
    def error(code: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            train(settings(tmp_path, code, *overrides))
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "'Echo' does not exist" in error(code.replace("class Echo", "class Ech0"))
    assert "did you mean 'Ech0'?" in error(code.replace("class Echo", "class Ech0"))
    assert (
        "engines.py:Echo' lacks sync: an engine is a class with shares_weights, generate, sync, log_probs, close"
        in (error(code.replace("def sync", "def synchronise")))
    )
    assert "which does not fit its constructor: got an unexpected keyword argument 'often'" in (
        error(code, "rollout.options.often=1")
    )
    assert "there is no file" in error(code, "rollout.engine=nowhere.py:Echo")


def test_the_estimate_says_that_it_does_not_know(tmp_path, code, capsys):
    from reval.estimate import report

    text = report(settings(tmp_path, code, "model.name=random:Qwen2.5-1.5B"), 1)
    assert "engines.py:Echo', whose memory is not known" in text and "rollout:" not in text
