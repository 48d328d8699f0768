"""The ways a command can fail, each with the exit code that scripts see.

Every message is one line: what is wrong, the value, the limit, where it came from, what to do.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "EM3Error", "NumericError", "Preempted"]


class EM3Error(Exception):
    """Base of all errors that end a command with a one-line message and `exit_code`."""

    exit_code = 1


class ConfigError(EM3Error):
    """An option, a config file or a combination of options is wrong (exit code 2)."""

    exit_code = 2


class DataError(EM3Error):
    """A raw file or a prepared folder is missing, malformed or of another version (exit code 3)."""

    exit_code = 3


class CheckpointError(EM3Error):
    """A checkpoint or a package is missing, incomplete, damaged or belongs to another model (exit code 4)."""

    exit_code = 4


class NumericError(EM3Error):
    """A number is not finite or not what it must be; raised before anything is updated or written (exit code 5)."""

    exit_code = 5


class Preempted(EM3Error):
    """The job was asked to stop and has saved a checkpoint to resume from (exit code 6)."""

    exit_code = 6
