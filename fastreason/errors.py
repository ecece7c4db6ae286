"""The errors a user can meet; each also inherits the standard exception that fits. No heavy import."""


class FastreasonError(Exception):
    """Base of every error raised on purpose: the message says what happened and what to do."""


class ConfigError(FastreasonError, ValueError):
    """A config key has a value that cannot work; names the key, the value, what is allowed, what to do."""


class DataError(FastreasonError, ValueError):
    """A data set is missing, empty, or lacks a needed column."""


class ModelError(FastreasonError, ValueError):
    """A model folder or name cannot be used."""


class EngineError(FastreasonError, RuntimeError):
    """A generation engine failed to start, died, or answered with something unusable."""


class RewardError(FastreasonError, RuntimeError):
    """A reward function cannot be loaded or returned something that is not a finite number."""


class CheckpointError(FastreasonError, RuntimeError):
    """A checkpoint is missing, incomplete, or does not fit the run."""


class StuckError(FastreasonError, TimeoutError):
    """A wait between processes ran past its limit; names who was waited for."""


class InterruptedWaitError(FastreasonError):
    """The run was told to stop while one process waited for another."""


class PeerLostError(FastreasonError, ConnectionError):
    """Another process of the run ended or closed its connection."""


class NodeError(FastreasonError, ConnectionError):
    """Another machine of the run has failed, or is lost."""
