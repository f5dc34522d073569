"""Standard output and standard error that never raise: what cannot be printed must not end a run.

A terminal may be closed, the reader of a pipe may go (`reval train ... | head`), the disk under a redirected output may
be full, and many encodings lack most characters.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Lenient:
    """A text stream whose `write` and `flush` never raise. Everything else is that of the given stream.

    A character that the stream's encoding lacks is written as its escape: é becomes \\xe9 in ASCII. Text that cannot be
    written is dropped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: Exception | None = None
        """The reason why text was dropped; None if all was written."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost = error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lenient(stream: TextIO | None) -> TextIO:
    """The stream as a Lenient one. Python has None for a stream that was closed before the program started; it becomes
    one that drops everything."""
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")
    return cast(TextIO, stream if isinstance(stream, Lenient) else Lenient(stream))


def missing_output() -> str | None:
    """Why standard output lacks text that was printed. None if it is complete, or if its reader has gone."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "lost", None)
    gone = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO)  # EIO: the terminal was closed
    return None if error is None or gone else f"standard output cannot be written: {error}"


@contextmanager
def lenient_output() -> Iterator[None]:
    """Within the block, sys.stdout and sys.stderr are Lenient, and the file descriptors 0, 1 and 2 are open.

    A file that is opened while descriptor 1 is free becomes descriptor 1. Output of C code would then go into the file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # open returns the smallest free descriptor
        os.set_inheritable(descriptor, True)
    before = sys.stdout, sys.stderr
    streams = sys.stdout, sys.stderr = lenient(sys.stdout), lenient(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.flush()
            if getattr(stream, "lost", None) is not None:
                # Python flushes again when it exits, and would fail. The buffered rest goes to /dev/null.
                with suppress(OSError, ValueError):
                    os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
