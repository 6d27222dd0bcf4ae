"""Every error that this package raises, under one base class. Each message ends with what to do next.

The classes also derive from the built-in exception that a caller would expect, so existing handlers keep working.
"""


class AdaSkipError(Exception):
    """Base class of all errors raised by adaskip_cpp."""


class LibraryError(AdaSkipError, ImportError):
    """The native library cannot be used in this process."""


class LibraryMissingError(LibraryError):
    """This installation has no libllama of ours."""


class LibraryVersionError(LibraryError):
    """The installed llama-cpp-python is not the version that our libllama was built from."""


class ImportOrderError(LibraryError):
    """``llama_cpp``, or its class that is to be replaced, was imported too early."""


class RPCServerError(AdaSkipError, ConnectionError):
    """An rpc-server cannot be used, or this ggml has no RPC."""


class ModelFileError(AdaSkipError, ValueError):
    """A GGUF file is missing, is not GGUF or cannot be loaded."""


class PlanError(AdaSkipError, ValueError):
    """A plan cannot be built or cannot be used with this model."""


class SublayerRangeError(PlanError):
    """A plan names a layer that the model does not have."""


class NotSkippableError(PlanError):
    """A plan names a sublayer that cannot be taken out of this model's graph."""


class ElidedKVError(PlanError):
    """A plan runs an attention for which the model was opened without KV."""


class CompensationError(PlanError):
    """A compensation is unknown, not finite, or not positive."""


class BudgetError(PlanError):
    """The number of sublayers to skip is negative or more than can be skipped."""


class PlanFileError(PlanError):
    """A plan file is missing, truncated, malformed, or of another version."""


class ProfileError(AdaSkipError, ValueError):
    """A profile cannot be used."""


class ProfileFormatError(ProfileError):
    """A profile file is truncated, malformed or lacks a field."""


class ProfileVersionError(ProfileError):
    """A profile file was written in a format version that this release does not read."""


class ProfileMissingError(ProfileError, FileNotFoundError):
    """There is no profile file of this name."""


class ProfileMismatchError(ProfileError):
    """A profile or plan belongs to another model."""


class RequestError(AdaSkipError, ValueError):
    """A request is empty, or longer than the model's context."""


class DataError(AdaSkipError, ValueError):
    """A text, a file of tasks or a setting of a measurement cannot be used."""


class FileError(AdaSkipError, OSError):
    """A file cannot be written; what was there before is still there."""


class PackageMissingError(AdaSkipError, ImportError):
    """An optional package is not installed."""


class StateError(AdaSkipError, ValueError):
    """A saved state cannot be loaded into this model."""


class NativeError(AdaSkipError, RuntimeError):
    """The native evaluator refused or failed."""
