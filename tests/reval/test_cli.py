"""The `reval` command. Fakes replace training and evaluation; the tests check the arguments of their calls.

One test uses new processes. Only a new process shows that `python -m reval.train` works and that no large package is
imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import reval
from reval.cli import _flags, _usable, main
from reval.config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """A list of the arguments of each call of reval.loop.train and reval.evaluation.answering.main."""
    made: list[tuple] = []
    for module, function in (("reval.loop", "train"), ("reval.evaluation.answering", "main")):
        fake = ModuleType(module)
        setattr(fake, function, lambda *arguments: made.append(arguments) or 0)
        monkeypatch.setitem(sys.modules, module, fake)
    return made


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "reval.train", "--help"],
        ["-m", "reval.train", TINY, "--dry-run", "optim.lr=1e-6"],
        ["-m", "reval.train", TINY, "--dry-run", "--gpus", "8", "--resume=auto"],
        ["-m", "reval.train", TINY, "optim.lrr=1"],
        ["-m", "reval.cli", "evaluate", "--help"],
        ["-m", "reval.cli", "--help"],
    ],
)
def test_a_fresh_process_answers_without_importing_anything_heavy(arguments):
    result = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    log = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|")[-1].strip().partition(".")[0] for line in log}
    assert "yaml" in imported
    assert imported.isdisjoint({"torch", "transformers", "triton", "numpy", "rich", "reasoning_gym", "reval_kernels"})
    wrong = "optim.lrr=1" in arguments
    assert result.returncode == (2 if wrong else 0)
    assert bool(result.stdout) != wrong
    rest = result.stderr.replace("\n".join(log), "").strip()
    assert rest == ("reval train: unknown setting 'optim.lrr'; did you mean 'optim.lr'?" if wrong else "")


def test_train_passes_the_resolved_config_on(calls):
    assert main(["train", TINY, "optim.lr=2e-6", "replay.updates_per_iteration=4"]) == 0
    (((config,)),) = calls
    assert config == load_config([TINY], ["optim.lr=2e-6", "replay.updates_per_iteration=4"])
    assert (config.optim.lr, config.replay.updates_per_iteration, config.model.name) == (2e-6, 4, "tiny")


def test_overrides_alone_are_enough_and_win_wherever_they_stand(calls):
    assert main(["train", "optim.lr=2e-6", TINY]) == 0
    assert calls[0][0].optim.lr == 2e-6
    assert main(["train", "model.name=tiny"]) == 0
    assert calls[1] == (load_config([], ["model.name=tiny"]),)


def test_dry_run_prints_the_config_and_does_not_train(calls, capsys, tmp_path):
    assert main(["train", "--dry-run", TINY, "optim.lr=2e-6"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config([printed]) == load_config([TINY], ["optim.lr=2e-6"])
    assert main(["train", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(Config().to_yaml())
    rest = out.removeprefix(Config().to_yaml()).splitlines()
    assert rest[0].startswith("# An estimate for 1 GPU ") and all(line.startswith("# ") for line in rest)
    assert calls == []


def test_dry_run_estimates_for_the_gpus_of_torchrun_or_of_the_flag(calls, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for arguments, gpus in (([], 4), (["--gpus", "16"], 16), (["--gpus=2"], 2)):
        assert main(["train", TINY, "--dry-run", *arguments]) == 0
        assert f"# An estimate for {gpus} GPUs" in capsys.readouterr().out
    assert main(["train", TINY, "--gpus=2"]) == 2
    assert capsys.readouterr().err.startswith("reval train: --gpus only goes with --dry-run")
    assert calls == []


@pytest.mark.parametrize("given", [["--resume", "auto"], ["--resume=auto"]])
def test_resume_is_a_setting_too(calls, given):
    assert main(["train", *given, TINY, "run.resume=false"]) == 0
    assert calls[0][0] == load_config([TINY], ["run.resume=auto"])


def test_resume_takes_a_path(calls):
    assert main(["train", TINY, "--resume", "runs/a=b/checkpoint"]) == 0
    assert calls[0][0].run.resume == "runs/a=b/checkpoint"


def test_arguments_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out=~/c.png", "~/runs/a", "run.dir=~/b"]
    assert _flags(given, ("--help", "--out")) == ({"--out": "/home/me/c.png"}, ["/home/me/runs/a", "run.dir=~/b"])


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting(command, flag, capsys, calls):
    assert main([command, flag]) == 0
    out = capsys.readouterr().out
    for section, values in Config().to_dict().items():
        assert f"\n{section}: " in out
        for name in values:
            assert f"\n  {section}.{name}=" in out
    assert calls == []


def test_help_and_version(capsys):
    assert main(["--help"]) == main(["-h"]) == main(["env", "--help"]) == 0
    assert main(["compare", "-h"]) == 0
    assert capsys.readouterr().out.count("usage: reval train CONFIG.yaml") == 4
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"reval {reval.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reval: give a command: train, evaluate, compare, plot, env (reval --help)"),
        (["tarin"], "reval: no command 'tarin'; there are train, evaluate, compare, plot, env (reval --help)"),
        (["train"], "reval train: name a config file, such as configs/demo.yaml (--help lists every setting)"),
        (
            ["train", TINY, "--lr=1"],
            "reval train: unknown flag --lr=1; there are --help, --dry-run, --resume and --gpus; settings are "
            "section.setting=value",
        ),
        (
            ["train", TINY, "--resume"],
            "reval train: --resume needs a value: --resume auto, false or a checkpoint's folder",
        ),
        (
            ["train", TINY, "--resume", "--dry-run"],
            "reval train: --resume needs a value: --resume auto, false or a checkpoint's folder",
        ),
        (["train", TINY, "--dry-run", "--gpus=0"], "reval train: --gpus must be a whole number, at least 1; got '0'"),
        (
            ["evaluate", "--gpus=1"],
            "reval evaluate: unknown flag --gpus=1; there are --help, --dry-run, --out and --json; settings are "
            "section.setting=value",
        ),
        (["compare", "a"], "reval compare: name two runs, checkpoints or files of answers; got 1"),
        (["compare", "a", "b", "--seed=x"], "reval compare: --seed must be a whole number, at least 0; got 'x'"),
        (["train", TINY, "optim.lr=fast"], "reval train: optim.lr must be a number; got 'fast'"),
        (["train", TINY, "lr=1"], "reval train: unknown setting 'lr'; did you mean 'optim.lr'?"),
        (["evaluate", "optim.lr=1"], "reval evaluate: name a run folder or a checkpoint (reval --help)"),
        (
            ["evaluate", TINY],
            f"reval evaluate: CHECKPOINT must be a folder, a run's or a checkpoint's; '{TINY}' is not one",
        ),
        (["env", "torch"], "reval env: env takes no arguments; got torch"),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr_and_status_2(arguments, message, capsys, calls):
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", message + "\n")
    assert calls == []


def test_a_config_error_found_later_looks_the_same_and_a_bug_does_not(capsys, calls, monkeypatch):
    def fail(error: BaseException):
        def train(config):
            raise error

        monkeypatch.setattr(sys.modules["reval.loop"], "train", train)
        return main(["train", TINY])

    assert fail(ConfigError("run.dir must be a new folder")) == 2
    assert capsys.readouterr().err == "reval train: run.dir must be a new folder\n"
    assert fail(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "reval train: interrupted\n"
    with pytest.raises(ValueError, match="a bug"):
        fail(ValueError("a bug"))


def test_main_reads_the_process_s_arguments(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reval", "--version"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["reval"])
    assert main() == 2


def test_evaluate_takes_the_run_s_settings_then_files_then_overrides(calls, tmp_path, capsys):
    checkpoint = tmp_path / "step-3"
    checkpoint.mkdir()
    more = tmp_path / "more.yaml"
    more.write_text("optim: {lr: 1e-2, eps: 1e-4}\n")
    assert main(["evaluate", str(checkpoint)]) == 0  # there is no config.yaml yet
    (tmp_path / "config.yaml").write_text("optim: {lr: 1e-3, warmup: 5}\n")
    assert main(["evaluate", str(checkpoint)]) == 0
    assert main(["evaluate", str(tmp_path), str(more), "optim.eps=1e-5"]) == 0
    expected = [
        load_config(),
        load_config([], ["optim.lr=1e-3", "optim.warmup=5"]),
        load_config([], ["optim.lr=1e-2", "optim.warmup=5", "optim.eps=1e-5"]),
    ]
    assert calls == [(c, p, None, False) for c, p in zip(expected, [checkpoint, checkpoint, tmp_path], strict=True)]
    assert main(["evaluate", str(checkpoint), "--dry-run"]) == 0
    assert capsys.readouterr().out == expected[1].to_yaml() and len(calls) == 3
    (checkpoint / "config.yaml").write_text("optim: {lr: 1e-4}\n")
    assert main(["evaluate", str(checkpoint)]) == 0  # config.yaml in the checkpoint itself is preferred
    assert calls[3][0] == load_config([], ["optim.lr=1e-4"])
    assert main(["evaluate", str(checkpoint), "--out", "a.jsonl", "--json"]) == 0
    assert calls[4][2:] == (Path("a.jsonl"), True)


def test_compare_reads_two_files_of_answers(tmp_path, capsys):
    for name, score in (("a=1", 0.0), ("b", 1.0)):  # for compare, a=1 is the name of a file
        (tmp_path / name).write_text(f'{{"prompt": "p", "scores": [{score}]}}\n')
    paths = [str(tmp_path / "a=1"), str(tmp_path / "b")]
    assert main(["compare", *paths, "--resamples", "50", "--seed=3"]) == 0
    out = capsys.readouterr().out
    assert "held-out: B is better." in out and "(50 resamples, seed 3)" in out
    (tmp_path / "b").write_text('{"prompt": "p", "scores": [1, 1]}\n')
    assert main(["compare", *paths]) == 1
    assert "different settings: samples 1 and 2." in capsys.readouterr().err
    assert main(["compare", *paths, "--different-settings"]) == 0
    capsys.readouterr()
    assert main(["compare", paths[0], "gone"]) == 1
    assert capsys.readouterr().err.startswith("reval compare: 'gone' holds no evaluation")


def test_env_names_versions_devices_and_backends(capsys, monkeypatch):
    fake = ModuleType("reval_kernels")
    fake.backends = lambda: {
        "triton": SimpleNamespace(available=False, default_for=(), reason="no GPU"),
        "portable": SimpleNamespace(available=True, default_for=("cpu", "mps"), reason=""),
    }
    monkeypatch.setitem(sys.modules, "reval_kernels", fake)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    names = ["reval", "python", "torch", "transformers", "triton", "CPU", "threads", "GPU"]
    assert list(dict.fromkeys(line.split()[0] for line in out.splitlines()[:-2])) == names
    assert out.startswith(f"reval          {reval.__version__}\npython         3.")
    assert "\ntorch          2." in out
    assert "  triton       not available: no GPU\n" in out
    assert "  portable     available, default for cpu, mps\n" in out


@pytest.mark.parametrize(
    ("gpus", "interpret", "expected"),
    [
        (1, "", "available, default for cuda"),
        (0, "", "installed, but needs a GPU (or TRITON_INTERPRET=1, to run CPU tensors very slowly)"),
        (0, "1", "available for CPU tensors, very slowly: TRITON_INTERPRET=1 is set"),
    ],
)
def test_env_says_whether_triton_can_run_on_this_machine(gpus, interpret, expected, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert _usable(SimpleNamespace(available=True, default_for=("cuda",), reason=None), bool(gpus)) == expected


def test_env_survives_what_is_not_installed(capsys, monkeypatch):
    for missing in ("torch", "reval_kernels"):
        monkeypatch.setitem(sys.modules, missing, None)  # None makes `import` raise ImportError
        monkeypatch.setattr("reval.cli._version", lambda package: "not installed")
        assert main(["env"]) == 0
        out = capsys.readouterr().out
        assert "torch          not installed\n" in out and "threads " in out
        monkeypatch.undo()


def test_plot_draws_runs_that_were_logged(tmp_path, capsys):
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        config = load_config(["configs/tiny.yaml"], [f"run.seed={seed}"])
        (run / "config.yaml").write_text(config.to_yaml())
        rows = [{"iteration": i, "reward": i / 4 + seed} for i in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "x.png"
    runs = [str(tmp_path / "run0"), str(tmp_path / "run1")]
    assert main(["plot", *runs, "--out", str(out), "--metrics=reward", "--axis", "iterations"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and "2" in capsys.readouterr().out
    (tmp_path / "run1" / "metrics.jsonl").open("a").write('{"iteration": 4, "rew')  # the run still writes this line
    assert main(["plot", *runs, "--out", str(out), "--metrics=reward"]) == 0
    capsys.readouterr()
    assert main(["plot"]) == 2 and "name one run folder or more" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--metrics=reward"]) == 2


def test_plot_replaces_only_the_file_that_out_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {template: 'no formula: $ _{ $ {question}'}\n")
    Path("metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    Path("other").mkdir()
    Path("other/config.yaml").write_text("optim: {lr: 1}\n")
    Path("other/metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    plot = ["plot", ".", "other", "--metrics=reward"]
    assert main(plot) == 0 and Path("curves.png").read_bytes().startswith(b"\x89PNG")
    Path("curves.png").write_text("a picture of the run")
    capsys.readouterr()
    assert main(plot) == 2
    assert capsys.readouterr().err.startswith("reval plot: this folder already has a curves.png; --out FILE.png names")
    assert Path("curves.png").read_text() == "a picture of the run"
    assert main([*plot, "--out", "curves.png"]) == 0 and Path("curves.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for bad, message in (
        ("x", "--out must end with the kind of picture, such as x.png"),
        ("x.docx", "'x.docx' cannot be drawn: Format 'docx' is not supported"),
        ("gone/x.png", "'gone/x.png' cannot be drawn: [Errno 2] No such file"),
    ):
        assert main([*plot, "--out", bad]) == 2
        assert capsys.readouterr().err.startswith(f"reval plot: {message}")


# ---- What printing may do to a command: nothing ----


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `reval ...` as a line of bash, with pipefail. Python buffers its output, as it does for users."""
    line = f"set -o pipefail; {sys.executable} -m {command}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | environment
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "line",
    [
        f"reval train {TINY} --dry-run | head -1",
        "reval train --help | true",
        "reval --version >&-",
        "reval --version >&- 2>&- <&-",
    ],
)
def test_a_reader_that_goes_away_is_no_error(line):
    done = shell(line)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_has_its_status_although_nobody_reads_the_message():
    assert shell("reval tarin 2>&-").returncode == 2


@pytest.mark.parametrize("line", [f"train {TINY} --dry-run", "--version"])
def test_output_that_could_not_be_written_is_an_error_where_it_is_the_purpose(line):
    done = shell(f"reval {line} > /dev/full")
    assert done.returncode == 1 and "standard output cannot be written: [Errno 28] No space left" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_dry_run_is_a_config_in_every_encoding(encoding, tmp_path):
    done = shell(
        f"reval train data.template='ü✗€ {{question}}' --dry-run > {tmp_path}/c.yaml", PYTHONIOENCODING=encoding
    )
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "c.yaml").read_bytes().decode(encoding)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert load_config([tmp_path / "c.yaml"]).data.template == "ü✗€ {question}"


def test_a_module_in_the_current_folder_is_found_by_the_command_and_by_reward_workers(tmp_path, monkeypatch, calls):
    """The installed command, unlike `python -m reval.train`, starts without the current folder on the import path."""
    (tmp_path / "own_rewards.py").write_text("def one(prompts, completions, *_, **__): return [1.0] * len(completions)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert main(["train", TINY]) == 0
    from reval.rewards import RewardPool

    with RewardPool("own_rewards:one", workers=1, timeout=10.0) as pool:
        assert pool.score(["p"], ["c"], [[1]], {}).rewards == [1.0]
    assert sys.path.count(str(tmp_path)) == 1 and main(["train", TINY]) == 0 and sys.path.count(str(tmp_path)) == 1


def test_what_a_notebook_leaves_in_the_environment_does_not_matter(tmp_path, monkeypatch, calls):
    """matplotlib, and what imports it, cannot be imported when MPLBACKEND names a backend that is not installed."""
    left = "module://matplotlib_inline.backend_inline"
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    done = shell(f"reval plot {tmp_path} --metrics reward --out {tmp_path}/x.png", MPLBACKEND=left)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MPLBACKEND", left)

    def seen(*_):
        calls.append(os.environ["MPLBACKEND"])
        return 0

    monkeypatch.setattr(sys.modules["reval.loop"], "train", seen)
    monkeypatch.setattr(sys.modules["reval.evaluation.answering"], "main", seen)
    assert main(["train", TINY]) == main(["evaluate", str(tmp_path)]) == 0
    assert calls == ["agg", "agg"]


@pytest.mark.parametrize("package", ["yaml", "rich"])
def test_without_a_package_of_the_trainer_the_message_names_it(package, tmp_path):
    """`yaml` is imported by cli.py itself, `rich` when training starts."""
    code = f"""
import sys
sys.modules[{package!r}] = None
from reval.__main__ import main
sys.exit(main(["train", "configs/tiny.yaml", "run.dir={tmp_path}/run"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"needs the package {package}, of the extra `train`: pip install 'reval-kernels[train]'" in done.stderr
    assert "Traceback" not in done.stderr
