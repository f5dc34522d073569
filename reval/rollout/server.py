"""A rollout engine in a separate process: client.py starts `python -m reval.rollout.server SOCKET WEIGHTS TRAINER`.

SOCKET and WEIGHTS are file descriptors that the trainer opened: a socket for requests, and memory for weights, which
both processes map. TRAINER is the process id of the trainer. A request or reply is its length in bytes (8 bytes, little
endian), then JSON. Before a reply, messages with the engine's progress may come. The process ends when the trainer
closes the socket. If the trainer's process ends, this process ends too, even while it generates.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Any) -> None:
    """Send one message. Raises TimeoutError if the peer accepts no data within the socket's timeout."""
    data = json.dumps(message).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, waiting: Callable[[], None] = lambda: None) -> Any:
    """Receive one message. Each time the socket's timeout passes without data, `waiting` is called; it may raise.

    Raises EOFError if the peer has closed the connection.
    """
    [length] = LENGTH.unpack(_exactly(connection, LENGTH.size, waiting))
    return json.loads(_exactly(connection, length, waiting))


def _exactly(connection: socket.socket, count: int, waiting: Callable[[], None]) -> bytes:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, 1 << 20))
        except TimeoutError:
            waiting()
            continue
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def serve(connection: socket.socket, weights_fd: int) -> None:
    """Make the engine that the first request names. Then answer requests until the trainer closes the socket."""
    try:
        spec = receive(connection)
        module, _, name = spec["factory"].partition(":")
        engine = getattr(import_module(module), name)(**spec["arguments"])
    except EOFError:
        return
    except Exception as error:
        send(connection, _failure(error))
        return
    if hasattr(engine, "progress"):
        engine.progress = lambda tokens, left: send(connection, {"progress": [tokens, left]})
    send(connection, {"result": os.getpid()})
    while True:
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        try:
            reply = {"result": _answer(engine, weights_fd, request["call"], request["arguments"])}
        except Exception as error:
            reply = _failure(error)
        send(connection, reply)


def _answer(engine: Any, weights_fd: int, call: str, arguments: dict[str, Any]) -> Any:
    if call == "generate":
        return [[[r.token_ids, r.finished] for r in group] for group in engine.generate(**arguments)]
    if call == "load":  # pass a path, because worker processes of the engine open the memory too
        return engine.load(f"/proc/{os.getpid()}/fd/{weights_fd}", **arguments)
    return engine.log_probs(**arguments)


def _failure(error: Exception) -> dict[str, Any]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}", "text": str(error), "usage": isinstance(error, ValueError)}


def _end_with(parent: int) -> None:
    """Wait until the trainer's process ends. Then kill this process and the processes that it started."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    connection_fd, weights_fd, parent = map(int, sys.argv[1:])
    for fd in (connection_fd, weights_fd):
        os.set_inheritable(fd, False)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with socket.socket(fileno=connection_fd) as connection:
        serve(connection, weights_fd)
    os._exit(0)  # sys.exit would wait for threads that the engine left; the trainer kills the remaining processes


if __name__ == "__main__":
    main()
