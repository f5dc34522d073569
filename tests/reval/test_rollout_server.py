"""An engine in a separate process. Requests, replies and weights arrive unchanged. The trainer never waits for ever,
whatever the process does. The engine is fake_engine.py, so no vLLM is needed; test_rollout_vllm.py tests real vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fake_engine
import pytest
import torch

from reval.rollout import Response, RolloutError, server
from reval.rollout.client import ServerRollout, _environment
from reval.rollout.weights import expected_weights

HERE = Path(__file__).parent
LONG = 60.0  # seconds; a passing test never reaches this deadline


class Model(torch.nn.Module):
    """Has a tied weight, a scalar, sizes that are not multiples of the file's alignment, and a float16 weight."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        self.head = self.embed
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.low = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float16))


def start(timeout=LONG, dtype=torch.float32, **arguments):
    return ServerRollout(
        "fake_engine:Fake",
        {"dtype": str(dtype).removeprefix("torch."), **arguments},
        timeout=timeout,
        dtype=dtype,
        expected=expected_weights(Model()),
        environment={"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"},
    )


@pytest.fixture
def engine():
    engine = start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def lasting():
    """One engine for all tests that do not change its state."""
    engine = start()
    yield engine
    engine.close()


def ask(engine, what, **kwargs):
    settings = {"responses": 2, "max_new_tokens": 4, "temperature": 1.0, "seed": 5}
    return engine.generate([[what, 7], [8]], **settings | kwargs)


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_token_ids_and_numbers_come_through(lasting):
    assert not lasting.shares_weights
    assert ask(lasting, fake_engine.ECHO, seed=2**63 + 1) == [
        [Response([0, 7, 2**63 + 1, 0], True), Response([0, 7, 2**63 + 1, 1], False)],
        [Response([8, 2**63 + 1, 0], True), Response([8, 2**63 + 1, 1], False)],
    ]
    assert lasting.log_probs([[1, 2, 3], [4]], [1, 1]) == [[0.0, 0.0], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_in_the_engine_s_type_again_and_again(dtype):
    engine, model = start(dtype=dtype), Model()
    try:
        for value in (1.0, 2.0, 1 / 3):  # 1/3 must be rounded
            with torch.no_grad():
                model.scale.fill_(value)
            engine.sync(model.state_dict().items())  # contains the tied weight under both of its names
            expected = 2 * 15.0 + 6.0 + float(model.scale.detach().to(dtype).double())
            assert engine.log_probs([[1, 2]], [1]) == [[expected]]
        engine.sync((name, w) for name, w in model.state_dict().items() if name != "head")
        assert engine.log_probs([[1, 2]], [1]) == [[expected - 15.0]]
    finally:
        engine.close()


def test_a_large_message_comes_through(lasting):
    prompt = list(range(100_000, 200_000))  # larger than the buffer of a socket
    [[response]] = lasting.generate([[0, *prompt]], responses=1, max_new_tokens=1, temperature=1.0, seed=0)
    assert response.token_ids == [0, *prompt, 0, 0]


def test_wrong_weights_are_refused_and_the_engine_goes_on(lasting):
    weights = Model().state_dict()
    with pytest.raises(ValueError, match="2 of the model's are missing"):
        lasting.sync([("head", weights["head"])])
    lasting.sync(weights.items())
    assert lasting.log_probs([[1, 2]], [1]) == [[36.5]]


def test_an_argument_that_the_engine_refuses_is_a_value_error(lasting):
    with pytest.raises(ValueError, match="^a prompt is too long$"):
        ask(lasting, fake_engine.WRONG)
    with pytest.raises(RolloutError, match="failed while generating 2 responses .* RuntimeError: no blocks"):
        ask(lasting, fake_engine.BROKEN)
    assert len(ask(lasting, fake_engine.ECHO)) == 2
    with pytest.raises(ValueError, match="^dtype must be something else$"):
        start(fail="usage")


@pytest.mark.parametrize(
    ("what", "how"),
    [
        (fake_engine.EXIT, "ended with status 3"),
        (fake_engine.KILL, "was killed by SIGKILL"),
        (fake_engine.CHILD, "was killed by SIGKILL"),
    ],
)
def test_a_process_that_dies_is_an_error_at_once(engine, what, how):
    with pytest.raises(RolloutError, match=f"the engine's process {engine.pid} {how} while generating"):
        ask(engine, what)
    with pytest.raises(RolloutError):  # the next call raises too
        ask(engine, fake_engine.ECHO)
    with pytest.raises(RolloutError):
        engine.sync(Model().state_dict().items())


def test_a_process_killed_between_calls_is_an_error(engine):
    os.kill(engine.pid, signal.SIGKILL)
    assert gone(engine.pid)
    with pytest.raises(RolloutError, match="was killed by SIGKILL while taking new weights"):
        engine.sync(Model().state_dict().items())


def test_a_process_that_does_not_start_tells_its_last_words():
    with pytest.raises(RolloutError, match=r"ended with status 3 while starting\nIts last output:\n +the last words"):
        start(fail="crash")


def test_a_deadline_names_what_was_waited_for_and_ends_the_process():
    engine = start(timeout=LONG)
    engine._timeout = 0.5
    with pytest.raises(RolloutError, match=r"was not done generating .* within rollout\.timeout=0\.5 seconds"):
        ask(engine, fake_engine.SLEEP)
    assert gone(engine.pid)
    engine.close()
    with pytest.raises(RolloutError, match=r"not done starting within rollout\.timeout=5 seconds"):
        start(timeout=5, fail="hang")


def test_a_stopped_process_that_reads_nothing_meets_the_deadline_too():
    engine = start()
    os.kill(engine.pid, signal.SIGSTOP)
    engine._timeout = 0.5
    with pytest.raises(RolloutError, match="not done generating"):
        engine.generate([[0] * 1_000_000], responses=1, max_new_tokens=1, temperature=1.0, seed=0)
    assert gone(engine.pid)
    engine.close()


def test_the_engine_s_progress_arrives_before_the_reply(engine):
    assert len(ask(engine, fake_engine.REPORT)) == 2, "nobody listens"
    seen = []
    engine.progress = lambda tokens, left: seen.append((tokens, left))
    assert len(ask(engine, fake_engine.REPORT)) == 2
    assert seen == [(10, 2), (20, 1)]


def test_an_engine_that_only_reports_reaches_the_deadline(engine):
    engine._timeout = 0.5
    with pytest.raises(RolloutError, match="within rollout.timeout=0.5 seconds"):
        ask(engine, fake_engine.REPORT_FOR_EVER)


def test_close_ends_the_process_and_may_come_twice(engine):
    engine.close()
    assert gone(engine.pid, 1)
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        ask(engine, fake_engine.ECHO)


def test_threads_take_turns(lasting):
    results = {}

    def work(seed):
        for _ in range(20):
            results[seed] = ask(lasting, fake_engine.ECHO, seed=seed)
            lasting.sync(Model().state_dict().items())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[seed][1][0].token_ids == [8, seed, 0] for seed in range(4))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_dies_with_the_trainer_even_while_it_generates(how, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        from test_rollout_server import ask, fake_engine, start
        engine = start()
        print(engine.pid, flush=True)
        ask(engine, fake_engine.SLEEP)
    """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]) as trainer:
        pid = int(trainer.stdout.readline())
        trainer.send_signal(how)
    assert gone(pid)


def test_ctrl_c_does_not_reach_the_engine(lasting):
    assert os.getpgid(lasting.pid) != os.getpgid(0)


def test_the_engine_sees_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    got = _environment({"CUDA_VISIBLE_DEVICES": "3"})
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & got.keys()
    assert (got["KEPT"], got["CUDA_VISIBLE_DEVICES"]) == ("1", "3")


def test_a_peer_that_is_gone_ends_a_message():
    ours, theirs = socket.socketpair()
    theirs.sendall(server.LENGTH.pack(10) + b"[1")
    theirs.close()
    with ours, pytest.raises(EOFError):
        server.receive(ours)
