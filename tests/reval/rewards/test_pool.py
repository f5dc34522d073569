"""The pool with reward functions that misbehave in every way that we know.

The reward functions are in this file. Workers load this file by its path, so every test also tests loading from a file.
Two workers get 40 completions in chunks of 5, and 100 completions in chunks of 13. So the tests cover both a chunk and
the repetition of its completions one by one. Where a completion should be scored in time, the time limit is long,
because a busy machine may stall a worker for a second. No test measures speed; the tests check only that a call ends.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reval.workers as workers_module
from reval.rewards import RewardError, RewardPool, Scores


class Numberlike:
    """Has __float__ and is no int or float, as a numpy scalar may be."""

    def __float__(self):
        return 0.75


def obedient(prompts, completions, completion_ids, **columns):
    """Does what each completion says ("raise", "sleep", ...). Any other completion must be a number: its reward."""
    rewards = []
    for completion in completions:
        if completion == "none":
            rewards.append(None)
        elif completion == "raise":
            raise KeyError("no such luck")
        elif completion == "exit":
            sys.exit("gone")
        elif completion == "die":
            os._exit(3)
        elif completion == "segfault":
            ctypes.string_at(0)
        elif completion == "sleep":
            time.sleep(1000)
        elif completion == "loop in C":
            sum(range(10**15))  # holds the interpreter lock and never checks for signals
        elif completion == "print":
            print("printed by python")
            os.write(1, b"printed by C\n")
            rewards.append(1.0)
        elif completion == "odd types":
            rewards.append(Numberlike())
        elif completion in ("nan", "inf"):
            rewards.append(float(completion))
        elif completion == "huge":
            rewards.append(10**400)
        elif completion == "text":
            rewards.append("1.0")
        elif completion == "list":
            rewards.append([1.0])
        elif completion == "one too many":
            rewards += [0.0, 0.0]
        elif completion == "a tuple":
            return tuple([0.0] * len(completions))
        elif completion == "nothing":
            return None
        elif completion == "two at once":
            if len(completions) > 1:
                raise RuntimeError("one at a time, please")
            rewards.append(1.0)
        elif completion.startswith("child and "):
            child = subprocess.Popen(["sleep", "1000"])
            Path(columns["file"][0]).write_text(str(child.pid))
            if completion == "child and wait":
                child.wait()
            elif completion == "child and die":
                os.kill(os.getpid(), signal.SIGSEGV)
            rewards.append(1.0)
        elif completion == "processes":
            with multiprocessing.Pool(2) as children:
                rewards.append(sum(children.map(abs, [-1, -2, -3])))
        elif completion == "pid":
            rewards.append(os.getpid())
        else:
            rewards.append(float(completion))
    return rewards


def echo(prompts, completions, completion_ids, **columns):
    """Reward 1 for each completion that arrives with its own prompt, tokens and columns."""
    rows = zip(prompts, completions, completion_ids, columns["answer"], columns["about"], strict=True)
    return [
        p == [{"role": "user", "content": c}] and i == [int(c)] and a == c and b == {c: 1} for p, c, i, a, b in rows
    ]


OBEDIENT = f"{__file__}:obedient"


def score(pool, completions, **columns):
    return pool.score(["prompt"] * len(completions), completions, [[1]] * len(completions), columns)


def answer_of(completion):
    """The extractor of `obedient`."""
    if completion == "sleep":
        time.sleep(1000)
    if completion == "raise":
        raise KeyError("no such luck")
    return {"none": None, "number": 7}.get(completion, f"<{completion}>")


obedient.extract_answer = answer_of


def numbers(count):
    return [str(i) for i in range(count)]


@pytest.fixture(scope="module")
def pool():
    """One pool for all tests in which no completion reaches the time limit. Several limits of 60 s would exceed the
    time limit of a test."""
    with RewardPool(OBEDIENT, timeout=60) as pool:
        yield pool


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40, 100])
def test_results_keep_their_order(pool, count):
    assert score(pool, numbers(count)) == Scores([float(i) for i in range(count)], 0, 0, None)


def test_every_argument_reaches_its_completion():
    texts = numbers(40)
    with RewardPool(f"{__file__}:echo", timeout=60) as pool:
        prompts = [[{"role": "user", "content": text}] for text in texts]
        columns = {"answer": texts, "about": [{text: 1} for text in texts]}
        assert pool.score(prompts, texts, [[int(text)] for text in texts], columns).rewards == [1.0] * 40


def test_none_and_odd_numbers(pool):
    assert score(pool, ["none", "odd types", "3"]) == Scores([None, 0.75, 3.0], 0, 0, None)


@pytest.mark.parametrize("workers", [1, 3])
def test_work_is_spread_over_the_workers(workers):
    with RewardPool(OBEDIENT, workers=workers, timeout=60) as pool:
        assert len(set(score(pool, ["pid"] * 40).rewards)) == workers


def test_exceptions_are_counted_and_shown(pool):
    completions = numbers(40)
    completions[31] = completions[17] = "raise"
    scores = score(pool, completions)
    assert scores.rewards == [None if i in (17, 31) else float(i) for i in range(40)]
    assert (scores.timeouts, scores.errors) == (0, 2)
    assert scores.first_error.startswith("completion 17 ('raise'): Traceback")
    assert "in obedient" in scores.first_error and "KeyError: 'no such luck'" in scores.first_error
    assert "SystemExit: gone" in score(pool, ["1", "exit"]).first_error


def test_a_long_completion_is_shortened_in_the_error(pool):
    scores = score(pool, ["1", "x" * 10_000 + "end"])
    assert f"completion 1 ('{'x' * 100} ... {'x' * 97}end')" in scores.first_error
    assert len(scores.first_error) < 2500


def test_exceptions_for_all_completions_are_a_fault_of_the_function(pool):
    with pytest.raises(
        RewardError, match=r"(?s)failed for all 40 completions.*completion 0 .*KeyError: 'no such luck'"
    ):
        score(pool, ["raise"] * 40)
    assert score(pool, ["raise"]).errors == 1  # a single completion does not show that the function is wrong


def test_a_function_that_raises_only_for_chunks_is_shown(pool):
    scores = score(pool, ["two at once"] * 40)
    assert (scores.rewards, scores.errors) == ([1.0] * 40, 0)
    assert "5 completions at once raised, each alone did not" in scores.first_error
    assert "one at a time, please" in scores.first_error


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("nan", r"finite numbers or None, but returned nan \(float\) for completion 17 \('nan'\)"),
        ("inf", r"finite numbers or None, but returned inf \(float\) for completion 17"),
        ("huge", r"finite numbers or None, but returned 10+\.\.\.0+ \(int\) for completion 17"),
        ("text", r"finite numbers or None, but returned '1.0' \(str\) for completion 17"),
        ("list", r"finite numbers or None, but returned \[1.0\] \(list\) for completion 17"),
        ("one too many", r"one reward per completion \(5\), but returned \[15.0, 16.0, 0.0, 0.0, 18.0, 19.0\]"),
        ("a tuple", r"a list with one number or None per completion, but returned tuple: \("),
        ("nothing", r"a list with one number or None per completion, but returned NoneType: None"),
    ],
)
def test_a_broken_contract_is_an_error_and_the_pool_stays_usable(pool, completion, message):
    completions = numbers(40)
    completions[17] = completion
    with pytest.raises(RewardError, match=f"obedient' must return {message}"):
        score(pool, completions)
    assert score(pool, numbers(40)).rewards == [float(i) for i in range(40)]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [("die", "ended itself with exit code 3"), ("segfault", "was killed by SIGSEGV")],
)
def test_a_dying_worker_is_an_error_and_replaced(pool, completion, reason):
    completions = numbers(40)
    completions[17] = completion
    scores = score(pool, completions)
    assert scores.rewards == [None if i == 17 else float(i) for i in range(40)]
    assert (scores.timeouts, scores.errors) == (0, 1)
    assert scores.first_error == f"completion 17 ({completion!r}): the worker process {reason}"


def test_a_worker_that_died_between_calls_costs_nothing(pool):
    for worker in pool._workers.all:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join(10)
    assert score(pool, numbers(40)) == Scores([float(i) for i in range(40)], 0, 0, None)


def test_only_the_hanging_completions_are_lost():
    completions = numbers(40)
    completions[17], completions[30] = "sleep", "loop in C"
    with RewardPool(OBEDIENT, timeout=2) as pool:
        scores = score(pool, completions)
    assert scores == Scores([None if i in (17, 30) else float(i) for i in range(40)], 2, 0, None)


def test_a_chunk_may_take_longer_than_one_completion():
    with RewardPool(f"{__file__}:slow", timeout=2) as pool:
        scores = score(pool, numbers(17))  # in chunks of 3
    assert scores == Scores([float(i) for i in range(17)], 0, 0, None)


def slow(prompts, completions, completion_ids, **columns):
    time.sleep(0.8 * sum(completion in ("3", "4", "5") for completion in completions))  # 2.4 s for the second chunk
    return [float(completion) for completion in completions]


def test_math_that_never_ends_freezes_nothing():
    completions = [rf"\boxed{{{i}}}" for i in range(8)]
    completions[4] = r"\boxed{10^{10^{10}}}"
    with RewardPool("math", timeout=4) as pool:
        scores = score(pool, completions, answer=["4"] * 7 + ["7"])
    assert scores == Scores([0.0] * 4 + [None] + [0.0] * 2 + [1.0], 1, 0, None)


def test_answers_are_extracted_in_the_workers():
    completions = numbers(40)
    completions[3], completions[17], completions[30] = "none", "raise", "sleep"
    with RewardPool(OBEDIENT, timeout=2) as pool:
        assert pool.extract(completions) == [None if i in (3, 17, 30) else f"<{i}>" for i in range(40)]
        with pytest.raises(
            RewardError, match=r"extract_answer of reward function .*obedient' must return text or None, "
        ):
            pool.extract(["1", "number"])
        with pytest.raises(
            RewardError, match="extract_answer of reward function .*obedient' failed for all 2 completions"
        ):
            pool.extract(["raise"] * 2)
        assert score(pool, ["1"]).rewards == [1.0] and pool.extract([]) == []
    with RewardPool("number", timeout=60) as pool:
        assert pool.extract(["9" * 4301, "7.", "seven"]) == ["9" * 4301, "7", None]


def test_a_function_without_an_extractor_extracts_nothing():
    with RewardPool(f"{__file__}:echo", workers=1, timeout=60) as pool:
        assert pool.extract(["1"]) is None


def test_a_frozen_worker_with_a_full_pipe_is_replaced(monkeypatch):
    monkeypatch.setattr(workers_module, "_TRANSFER_SECONDS", 1)
    with RewardPool(OBEDIENT, workers=1, timeout=2) as pool:
        os.kill(pool._workers.all[0].process.pid, signal.SIGSTOP)
        scores = score(pool, ["1", "2"], ballast=["x" * 10**7] * 2)
        assert scores.rewards[1] == 2.0 and scores.errors == 1
        assert "stopped answering" in scores.first_error


def test_what_a_function_prints_goes_to_stderr(capfd, monkeypatch):
    # Without this variable, Python may buffer output. No printed text may be left in a buffer when the pool kills the
    # worker.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with RewardPool(OBEDIENT, workers=1, timeout=60) as pool:
        assert score(pool, ["print", "1", "print"]).rewards == [1.0, 1.0, 1.0]
    out, err = capfd.readouterr()
    assert out == "" and err.count("printed by python\n") == err.count("printed by C\n") == 2


def test_a_function_of_any_file_is_found_from_where_we_are(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def fn(*lists, **columns):\n    return [0.5 for _ in lists[1]]\n")
    monkeypatch.chdir(tmp_path)
    with RewardPool("mine.py:fn", workers=1, timeout=60) as pool:
        assert score(pool, ["a"]).rewards == [0.5]


def test_a_registered_verifier_scores_and_names_a_missing_column():
    with RewardPool("number", timeout=60) as pool:
        assert score(pool, ["7", "8"], answer=["7", "7"]).rewards == [1.0, 0.0]
        with pytest.raises(RewardError, match="needs the column 'answer'.*did you mean 'answers'"):
            score(pool, ["7", "8"], answers=["7", "7"])
        broken = score(pool, ["7", "8"], answer=["7", "seven"])
        assert (broken.rewards, broken.errors) == ([1.0, None], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"'nubmer' is unknown.*did you mean 'number'\?$"),
        ("raise ValueError('not today')", r"(?s)cannot be loaded:\nTraceback.*ValueError: not today"),
        ("def fn(:", r"(?s)cannot be loaded:\n.*SyntaxError"),
        ("import os; os._exit(5)", "a worker could not start: the worker process ended itself with exit code 5"),
    ],
)
def test_a_function_that_cannot_be_loaded_fails_at_construction(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text or "")
    with pytest.raises(RewardError, match=message):
        RewardPool("nubmer" if text is None else f"{path}:fn")


def test_a_worker_that_does_not_get_ready_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "_STARTUP_SECONDS", 1.0)
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(RewardError, match="was not ready after 1 s"):
        RewardPool(f"{tmp_path}/mine.py:fn", workers=1)


def test_imports_do_not_count_against_the_timeout(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ntime.sleep(2)\ndef fn(p, c, i, **columns):\n    return [1.0] * len(c)\n"
    )
    with RewardPool(f"{tmp_path}/mine.py:fn", workers=1, timeout=1) as pool:
        assert score(pool, ["a"]) == Scores([1.0], 0, 0, None)


@pytest.mark.parametrize("settings", [{"workers": 0}, {"timeout": 0}, {"timeout": -1.0}, {"timeout": math.inf}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        RewardPool("number", **settings)


def test_arguments_that_do_not_fit_together(pool):
    with pytest.raises(ValueError, match=r"completion_ids must have one entry per completion \(2\), but has 1"):
        pool.score(["p", "p"], ["1", "2"], [[1]], {})
    with pytest.raises(ValueError, match=r"answer must have one entry per completion \(1\), but has 2"):
        score(pool, ["1"], answer=[1, 2])
    with pytest.raises(ValueError, match="must not have a column 'completions'"):
        pool.score(["p"], ["1"], [[1]], {"completions": ["1"]})
    assert score(pool, ["1"]).rewards == [1.0]


def test_an_interrupted_call_leaves_no_old_answers(monkeypatch):
    with RewardPool(OBEDIENT, timeout=60) as pool:
        monkeypatch.setattr(pool._workers, "_wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(pool, ["111"] * 40)
        monkeypatch.undo()
        assert score(pool, numbers(40)).rewards == [float(i) for i in range(40)]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # Z: the process has ended, but its new parent process has not yet collected it


def wait_for_end(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def test_close_leaves_no_worker():
    pool = RewardPool(OBEDIENT, timeout=60)
    pids = [worker.process.pid for worker in pool._workers.all]
    assert len(pids) == 2 and all(is_running(pid) for pid in pids)
    pool.close()
    assert not any(is_running(pid) for pid in pids)
    pool.close()
    with pytest.raises(RuntimeError, match="after close"):
        score(pool, ["1"])


@pytest.mark.parametrize("completion", ["child and wait", "child and die", "child and go"])
def test_a_worker_takes_its_children_along(tmp_path, completion):
    with RewardPool(OBEDIENT, workers=1, timeout=2) as pool:
        scores = score(pool, [completion], file=[str(tmp_path / "pid")])
        child = int((tmp_path / "pid").read_text())
        kept = completion == "child and go"
        assert wait_for_end([child], 0 if kept else 10) == ([child] if kept else [])
        assert (scores.timeouts, scores.errors) == {"wait": (1, 0), "die": (0, 1), "go": (0, 0)}[completion.split()[-1]]
    assert wait_for_end([child], 10) == []


def test_a_function_may_use_multiprocessing():
    with RewardPool(OBEDIENT, workers=1, timeout=60) as pool:
        assert score(pool, ["processes"]) == Scores([6.0], 0, 0, None)


def test_workers_ignore_ctrl_c():
    with RewardPool(OBEDIENT, timeout=60) as pool:
        pids = {worker.process.pid for worker in pool._workers.all}
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert set(score(pool, ["pid"] * 40).rewards) == pids


@pytest.fixture
def start_script(tmp_path):
    """Returns a function that starts a script with a pool in a new process. The process is killed after the test."""
    started = []

    def start(body, *, guard='if __name__ == "__main__":', how=("script.py",)):
        lines = [f"    {line}" for line in body.splitlines()]
        text = "\n".join(["import sys", "from reval.rewards import RewardPool", guard, *lines])
        (tmp_path / "script.py").write_text(text + "\n")
        script = subprocess.Popen(
            [sys.executable, *how],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(script)
        return script

    yield start
    for script in started:
        script.kill()
        script.communicate(timeout=60)


@pytest.mark.parametrize("how", [("script.py",), ("-m", "script")])
def test_in_a_script(start_script, how):
    body = """with RewardPool("number", timeout=60) as pool:
    print(pool.score(["p"] * 20, ["7"] * 20, [[1]] * 20, {"answer": ["7"] * 20}).rewards == [1.0] * 20)"""
    out, err = start_script(body, how=how).communicate(timeout=60)
    assert (out, err) == ("True\n", "")


def test_a_reward_that_prints_works_when_nobody_reads_it(start_script, tmp_path):
    """`reval train 2>&1 | head`: the reader of stderr, where the workers' output goes, has gone."""
    code = "def one(p, completions, *_):\n    print('text', flush=True)\n    return [1.0] * len(completions)\n"
    (tmp_path / "prints.py").write_text(code)
    body = """import os
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
with RewardPool("prints.py:one", timeout=60) as pool:
    print(pool.score(["p"] * 2, ["7"] * 2, [[1]] * 2, {}).rewards)"""
    assert start_script(body).communicate(timeout=60)[0] == "[1.0, 1.0]\n"


def test_in_a_script_that_forgets_to_close(start_script):
    script = start_script('pool = RewardPool("number")\nprint(pool._workers.all[0].process.pid)')
    out, err = script.communicate(timeout=60)
    assert err == "" and wait_for_end([int(out)], 10) == []


def test_in_a_script_without_a_guard(start_script):
    script = start_script('RewardPool("number", workers=1)', guard="if True:")
    _, err = script.communicate(timeout=60)
    assert script.returncode == 1 and "must do so under `if __name__" in err


def test_children_end_with_a_script_that_forgets_to_close(start_script, tmp_path):
    body = f"""pool = RewardPool({OBEDIENT!r}, workers=1, timeout=60)
print(pool.score(["p"], ["child and go"], [[1]], {{"file": [{str(tmp_path / "pid")!r}]}}).rewards)"""
    assert start_script(body).communicate(timeout=60) == ("[1.0]\n", "")
    assert wait_for_end([int((tmp_path / "pid").read_text())], 10) == []


@pytest.mark.parametrize("completion", ["1", "loop in C", "child and wait"])
def test_workers_end_when_their_trainer_is_killed(start_script, completion, tmp_path):
    body = f"""pool = RewardPool({OBEDIENT!r}, timeout=1)
print(*(worker.process.pid for worker in pool._workers.all), flush=True)
import threading
from reval import workers as module
module.wait = lambda *arguments: (print("sent", flush=True), threading.Event().wait())  # never looks again
pool.score(["p"] * 2, [{completion!r}] * 2, [[1]] * 2, {{"file": [{str(tmp_path / "pid")!r}] * 2}})"""
    script = start_script(body)
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert script.stdout.readline() == "sent\n"
    if completion == "child and wait":
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        pids.append(int((tmp_path / "pid").read_text()))
    script.kill()
    assert len(pids) >= 2 and wait_for_end(pids, 30) == []
