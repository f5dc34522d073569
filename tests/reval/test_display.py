"""The output on the terminal. The tests set the time, as a number of seconds."""

from __future__ import annotations

import io
import os
import time
from dataclasses import replace

import pytest

import reval.components
from reval import display
from reval.config import Config, RunConfig, load_config
from reval.display import Display
from reval.evaluation.answers import Answered, Evaluation
from reval.loop import train
from reval.rollout import RolloutError
from reval.rollout.none import NoRollout
from reval.waiting import Waiting


@pytest.fixture
def clock(monkeypatch):
    """A list. Its last number is the current time in seconds."""
    now = [100.0]
    monkeypatch.setattr(display.time, "perf_counter", lambda: now[-1])
    return now


def settings(**run) -> Config:
    return replace(Config(), run=RunConfig(**{"iterations": 10, "display": "plain"} | run))


METRICS = {"reward": 0.5, "step_time": 3.0, "reward_errors": 2.0, "eval/accuracy": 0.25}


def test_one_plain_line_an_iteration(clock, capsys):
    with Display(settings()) as shown:
        clock.append(104.0)
        shown.iteration(1, METRICS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "1/10 | reward 0.50 | 2 reward errors! | held-out accuracy 0.25 | 3.0 s | 36 s left"


def test_the_time_left_of_a_resumed_run_is_that_of_its_own_iterations(clock, capsys):
    with Display(settings(), iteration=6) as shown:
        clock.append(130.0)
        with shown.busy("answering"):
            clock.append(150.0)  # work before the first iteration is done once, so it does not count
        clock.append(160.0)
        shown.iteration(7, METRICS)
        with shown.busy("answering"):
            clock.append(190.0)  # work between iterations is repeated, so it counts
        clock.append(200.0)
        shown.iteration(8, METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert "resumed after iteration 6" in lines[0]
    assert lines[-4].endswith(" 30 s left") and lines[-1].endswith(" 50 s left")


def test_long_times_are_in_minutes_and_hours(clock, capsys):
    with Display(settings(iterations=650)) as shown:
        clock.append(160.0)
        shown.iteration(1, METRICS)
        shown.iteration(640, METRICS | {"step_time": 60.0})
        clock.append(100.0 + 640 * 60)
        shown.iteration(640, METRICS)
    ends = [line.rsplit(" | ", 1)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert ends == ["10.8 h left", "1 s left", "10 min left"]


def test_quiet_prints_nothing(capsys):
    with Display(settings(display="rich"), quiet=True) as shown:
        with shown.busy("answering"):
            pass
        shown.iteration(1, METRICS)
        shown.note("note")
        shown.results(None, None, "folder")
    assert capsys.readouterr().out == ""


def test_the_rich_display_counts_from_the_resumed_iteration(capsys):
    with Display(settings(display="rich"), iteration=6) as shown:
        assert shown._progress.tasks[0].completed == 6
        shown.iteration(7, METRICS)
        assert shown._progress.tasks[0].completed == 7 and shown._progress.tasks[0].total == 10
    assert "held-out accuracy 0.25" in capsys.readouterr().out


def test_the_plain_display_says_what_it_waits_for_after_a_while(clock, capsys):
    with Display(settings()) as shown:
        engine = shown.waiting.engine_progress()
        capsys.readouterr()
        with shown.waiting("generating", asks_engine=True):
            engine(100, 8)
            clock.append(129.0)
            shown._tick()
            assert capsys.readouterr().out == "", "short work prints nothing"
            engine(1070, 5)
            clock.append(130.0)
            shown._tick()
            shown._tick()
            assert capsys.readouterr().out == "  generating for 30 s: 33 tokens/s, 5 sequences left\n"
        with shown.waiting("updating") as progress:
            progress(1, 12)
            clock.append(155.0)
            engine(2000, 3)  # with rollout.ahead
            shown._tick()
            progress(2, 12)
            clock.append(160.0)
            shown._tick()
            assert capsys.readouterr().out == "  updating for 30 s: 2 of 12 micro-batches\n"
        clock.append(300.0)
        shown._tick()
        assert capsys.readouterr().out == "", "it waits for nothing"
        with shown.busy("answering"):
            clock.append(331.0)
            shown._tick()
    assert capsys.readouterr().out == "answering\n  answering for 31 s\n  done in 31 s\n"


def test_the_plain_display_watches_by_itself(clock, capsys, monkeypatch):
    """Code that takes long calls nothing. A thread prints, which ends with the display."""
    monkeypatch.setattr(display, "TICK", 0.01)
    with Display(settings()) as shown, shown.waiting("scoring"):
        clock.append(140.0)
        until = time.monotonic() + 20
        while "scoring" not in (out := capsys.readouterr().out) and time.monotonic() < until:
            time.sleep(0.01)
    assert out == "  scoring for 40 s\n" and not shown._thread.is_alive()


def test_the_rich_display_shows_the_wait_below_the_bar(clock, capsys):
    with Display(settings(display="rich")) as shown:
        with shown.waiting("updating") as progress:
            progress(3, 4)
            clock.append(107.0)
            shown._console.print(shown._progress.get_renderable())
            assert capsys.readouterr().out.endswith("\nupdating for 7 s: 3 of 4 micro-batches\n")
        shown._console.print(shown._progress.get_renderable())
        assert "updating" not in capsys.readouterr().out and shown._thread is None


def test_a_wait_that_fails_is_over(clock):
    waiting = Waiting()
    with pytest.raises(KeyError), waiting("updating"):
        assert waiting.text() == "updating for 0 s"
        raise KeyError
    assert waiting.text() == ""


def test_the_speed_is_that_of_the_current_request(clock):
    """With rollout.ahead the engine's request began before the run waits for it."""
    waiting = Waiting()
    engine = waiting.engine_progress()
    engine(5000, 9)
    with waiting("generating", asks_engine=True):
        assert waiting.text() == "generating for 0 s"
        engine(6000, 8)
        assert waiting.text() == "generating for 0 s: 8 sequences left"
        clock.append(110.0)
        engine(6500, 7)
        assert waiting.text() == "generating for 10 s: 50 tokens/s, 7 sequences left"
        clock.append(120.0)
        engine(100, 20)
        clock.append(122.0)
        engine(300, 19)
        assert waiting.text() == "generating for 22 s: 100 tokens/s, 19 sequences left"
        engine(150, 40)  # the next turn of an environment, with more tokens than the first report of the last one
        assert waiting.text() == "generating for 22 s: 40 sequences left"


def test_the_engine_of_a_run_reports_to_its_display(monkeypatch, tmp_path):
    seen = []

    class Reporting(NoRollout):
        """Reports, and fails, so that the run ends there."""

        progress = None

        def generate(self, prompts, **options):
            self.progress(7, 1)
            raise RolloutError("enough")

    monkeypatch.setattr(Waiting, "engine_progress", lambda self: lambda *report: seen.append((self.text(), *report)))
    monkeypatch.setattr(reval.components, "make_rollout", lambda *arguments: Reporting())
    with pytest.raises(RolloutError, match="enough"):
        train(load_config(["configs/tiny.yaml"], [f"run.dir={tmp_path}/run", "data.held_out=0", "reward.workers=1"]))
    assert seen == [("generating for 0 s", 7, 1)]


def answered(prompt, text: str, score: float, benchmark: str | None = None) -> Answered:
    return Answered(prompt, [text, "x"], [score, 0.0], greedy=text, greedy_score=score, benchmark=benchmark)


def test_the_results_compare_what_was_answered_before_and_after(capsys):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "[1] + 1"}]
    before = [answered("gone", "a", 1.0), answered(chat, "b[/]", 0.0), answered("2 + 2", "1", 0.0, "aime24")]
    after = [answered(chat, "c" * 400 + "end", 1.0), answered("new", "d", 1.0), answered("2 + 2", "4", 1.0, "aime24")]
    Display(settings()).results(Evaluation(before), Evaluation(after), "folder")
    out = capsys.readouterr().out
    assert "[1] + 1" in out and "b[/]" in out and "end" in out and "gone" not in out and "new" not in out
    assert "wrong" in out and "right" in out and out.count("c") < 400
    assert "held-out accuracy, temperature 1 (2 problems x 4 answers): 0.250 -> 0.500" in out
    assert "held-out accuracy, greedy: 0.500 -> 1.000" in out and "aime24, avg@2: 0.000 -> 0.500" in out


def test_no_table_without_rows(capsys):
    run = Evaluation([answered("2 + 2", "4", 1.0)])
    Display(settings(table=0)).results(run, run, "folder")
    out = capsys.readouterr().out
    assert "problem" not in out.partition("held-out accuracy")[0] and "held-out accuracy, greedy" in out


def test_without_held_out_problems_the_accuracy_is_the_benchmarks(capsys):
    run = Evaluation([answered("2 + 2", "4", 1.0, "aime24")])
    Display(settings()).results(run, run, "folder")
    assert "mean accuracy of the benchmarks: 0.500 -> 0.500" in capsys.readouterr().out


def test_answers_with_other_settings_are_not_compared(capsys):
    """A resumed run may evaluate with other settings than it did before training."""
    before, after = (replace(answered("p", "a", 1.0), settings={"samples": n}) for n in (1, 4))
    Display(settings()).results(Evaluation([before]), Evaluation([after]), "folder")
    out = capsys.readouterr().out
    assert "answered with samples=1 before training, with samples=4 after it" in out and "->" not in out


def show_everything() -> None:
    """Show text that no encoding but Unicode has, and text that not even UTF-8 can encode."""
    run = Evaluation([answered("7 × 6 ≥ ?", "✗ 😀 é \ud83d", 1.0)])
    for kind in ("plain", "rich"):
        with Display(settings(display=kind)) as shown:
            with shown.busy("answering"):
                pass
            shown.iteration(1, METRICS)
            shown.note("naïve – ✓")
            shown.results(run, run, "folder")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_shows_everything(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    show_everything()
    text = raw.getvalue().decode(encoding)
    assert "\\ud83d" in text and text.count("right") >= 2
    assert ("naïve" if encoding != "ascii" else r"na\xefve") in text


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stdout", [None, Gone(), open(os.devnull, "w")])
def test_a_run_goes_on_when_nothing_can_be_shown(stdout, monkeypatch):
    if stdout is not None and not isinstance(stdout, Gone):
        stdout.close()
    monkeypatch.setattr("sys.stdout", stdout)
    show_everything()
