"""Streams that never raise, whatever happens to the terminal, the pipe or the disk behind them."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from reval.output import Lenient, lenient, lenient_output, missing_output


class Failing(io.StringIO):
    """A stream that raises `error` at every write."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_what_an_encoding_lacks_is_written_as_escapes():
    raw = io.BytesIO()
    stream = lenient(io.TextIOWrapper(raw, encoding="latin-1"))
    print("é ✗ \ud83d 😀", file=stream, flush=True)
    assert raw.getvalue().decode("latin-1") == "é \\u2717 \\ud83d \\U0001f600\n"
    assert stream.lost is None and stream.encoding == "latin-1"


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (BrokenPipeError(32, "Broken pipe"), None),
        (OSError(5, "Input/output error"), None),  # the terminal was closed
        (
            OSError(28, "No space left on device"),
            "standard output cannot be written: [Errno 28] No space left on device",
        ),
        (
            ValueError("I/O operation on closed file."),
            "standard output cannot be written: I/O operation on closed file.",
        ),
    ],
)
def test_a_stream_that_fails_is_no_error_and_the_loss_is_known(error, missing, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with lenient_output():
        print("text")
        assert missing_output() == missing
    assert isinstance(sys.stdout, Failing)


def test_a_stream_that_python_does_not_have_drops_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lenient_output():
        print("text")
        print("text", file=sys.stderr)
        assert not sys.stdout.isatty() and missing_output() is None
    assert sys.stdout is None


def test_closed_outputs_are_open_in_every_process():
    """Otherwise a file would become descriptor 1, and a reward worker could not redirect its output."""
    code = """
import os, subprocess, sys
from reval.output import lenient_output
with lenient_output():
    assert open(os.devnull).fileno() > 2
    sys.exit(subprocess.call(["ls", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2"]))
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "CODE": code}
    line = f'{sys.executable} -c "$CODE" >&- 2>&- <&-'
    assert subprocess.run(["bash", "-c", line], env=environment).returncode == 0


def test_a_lenient_stream_is_not_wrapped_again():
    stream = lenient(io.StringIO())
    assert lenient(stream) is stream and isinstance(stream, Lenient)


def test_no_descriptor_is_left_open():
    before = os.listdir("/proc/self/fd")
    with lenient_output():
        pass
    assert os.listdir("/proc/self/fd") == before
