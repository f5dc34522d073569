"""The first Ctrl-C sets `asked`, a second one ends the run at once. Afterwards the old signal handlers are back."""

import os
import signal
import threading

import pytest

from reval import interrupt
from reval.interrupt import Interruptible


@pytest.fixture(autouse=True)
def handlers():
    """Set the signal handlers of a program in a terminal. The process that started the tests may have changed them."""
    before = {n: signal.signal(n, signal.default_int_handler) for n in interrupt.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_asks_and_the_second_ends(number, monkeypatch):
    monkeypatch.setattr(interrupt, "SAME", 0.0)
    said = []
    with pytest.raises(KeyboardInterrupt), Interruptible(lambda: said.append(1)) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and said == [1]
        os.kill(os.getpid(), number)
    assert said == [1] and signal.getsignal(number) is signal.default_int_handler


def test_one_that_comes_twice_at_once_is_one():
    with Interruptible(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_a_thread_without_handlers_works_all_the_same():
    seen = []

    def run():
        with Interruptible(lambda: None) as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruptible(lambda: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked


def test_a_closed_terminal_cannot_be_written_to_and_the_run_is_saved_all_the_same():
    def say():
        raise OSError(5, "Input/output error")

    with Interruptible(say) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked
