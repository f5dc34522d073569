"""Errors that end a run and are the user's to mend; the command line shows them as one message, without a traceback."""


class RunError(RuntimeError):
    """Training cannot go on. The message says why, and where what was saved lies."""
