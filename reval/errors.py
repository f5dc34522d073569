"""Errors that end a run and that the user can fix. The command line prints only the message, without a traceback."""


class RunError(RuntimeError):
    """Training cannot continue. The message gives the reason and the path of the saved files."""
