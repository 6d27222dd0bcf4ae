"""All errors of the package, under one base class. Each message ends with advice.

Each class also derives from the built-in exception that a caller would expect, so existing handlers keep working.
"""


class AdaSkipError(Exception):
    """Base class of all errors of this package."""


class LibraryError(AdaSkipError, ImportError):
    """The native library is missing, is of another release, or cannot be used because llama_cpp was imported before."""


class ModelFileError(AdaSkipError, ValueError):
    """A GGUF file is missing, is not GGUF or cannot be loaded."""


class PlanError(AdaSkipError, ValueError):
    """A plan cannot be made, or cannot be used with this model."""


class NotSkippableError(PlanError):
    """A plan names a sublayer that this model cannot skip."""


class BudgetError(PlanError):
    """The number of sublayers to skip, or the speed-up, is out of reach."""


class PlanFileError(PlanError):
    """A plan file is missing, truncated, malformed, or of another version."""


class ProfileError(AdaSkipError, ValueError):
    """A profile file is missing, truncated, malformed, of another version, or cannot be used."""


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
