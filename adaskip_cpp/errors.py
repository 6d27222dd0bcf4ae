"""All errors of the package, under one base class. Each message ends with advice.

Each class also derives from the built-in exception that a caller would expect, so existing handlers keep working.
"""


class AdaSkipError(Exception):
    """Base class of all errors of this package."""


class LibraryError(AdaSkipError, ImportError):
    """The native library cannot be used in this process."""


class LibraryMissingError(LibraryError):
    """This installation lacks the package's own libllama."""


class LibraryVersionError(LibraryError):
    """The installed llama-cpp-python is not the release that the package's libllama was built for."""


class ImportOrderError(LibraryError):
    """``llama_cpp``, or its class that is to be replaced, was imported too early."""


class RPCServerError(AdaSkipError, ConnectionError):
    """An rpc-server cannot be used, or ggml was built without RPC."""


class ModelFileError(AdaSkipError, ValueError):
    """A GGUF file is missing, is not GGUF or cannot be loaded."""


class PlanError(AdaSkipError, ValueError):
    """A plan cannot be made, or cannot be used with this model."""


class SublayerRangeError(PlanError):
    """A plan names a layer that is not in the model."""


class NotSkippableError(PlanError):
    """A plan names a sublayer that this model cannot skip."""


class ElidedKVError(PlanError):
    """A plan needs K and V of an attention, and the model was opened without memory for them."""


class CompensationError(PlanError):
    """A compensation is unknown, not finite, or not positive."""


class BudgetError(PlanError):
    """The number of sublayers to skip, or the speed-up, is out of reach."""


class PlanFileError(PlanError):
    """A plan file is missing, truncated, malformed, or of another version."""


class ProfileError(AdaSkipError, ValueError):
    """A profile cannot be used."""


class ProfileFormatError(ProfileError):
    """A profile file is truncated, malformed or incomplete."""


class ProfileVersionError(ProfileError):
    """A profile file has a format version that this release does not read."""


class ProfileMissingError(ProfileError, FileNotFoundError):
    """There is no profile file with this name."""


class ProfileMismatchError(ProfileError):
    """A profile or plan belongs to another model."""


class RequestError(AdaSkipError, ValueError):
    """A request is empty, too long for the context, or has a field that cannot be used."""


class DataError(AdaSkipError, ValueError):
    """A text, a file of tasks, or a setting of a measurement cannot be used."""


class FileError(AdaSkipError, OSError):
    """A file cannot be written. The old file is unchanged."""


class PackageMissingError(AdaSkipError, ImportError):
    """An optional package is not installed."""


class StateError(AdaSkipError, ValueError):
    """A saved state cannot be loaded into this model, or the model's state does not allow the call."""


class NativeError(AdaSkipError, RuntimeError):
    """The native code failed."""
