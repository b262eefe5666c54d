"""The one error a user can mend: something in the configuration."""


class ConfigError(ValueError):
    """One sentence that names the config key, its value and what would be right.

    `launch/pretrain.py` prints it from one process, without a traceback, and exits with code 2.
    """
