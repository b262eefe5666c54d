"""Errors that are printed as one sentence, without a traceback."""


class ConfigError(ValueError):
    """One sentence that names the config key, its value and what would be right.

    `launch/pretrain.py` prints it from one process, without a traceback, and exits with code 2.
    """


class RunFailed(RuntimeError):
    """One sentence that says why a run failed, and how to continue.

    `launch/pretrain.py` prints it from one process, without a traceback, and exits with code 1.
    """
