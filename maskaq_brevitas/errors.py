"""The errors and warnings of the package.

Every error derives from :class:`MaskAQError` and from the builtin that a caller would expect, so that both
``except MaskAQError`` and ``except ValueError`` do what they say.
"""

__all__ = [
    "CheckpointError",
    "CompilationWarning",
    "ConfigurationError",
    "DamagedFileError",
    "DataError",
    "ExportError",
    "InputError",
    "MaskAQError",
    "MaskAQWarning",
    "MemoryWarning",
    "MissingExtraError",
    "ModelError",
    "RunDirectoryError",
    "SilentLayerWarning",
    "UncoupledWarning",
    "SkippedLayerWarning",
    "SlowArithmeticWarning",
    "SynthesisError",
    "TuningError",
    "WriteError",
]


class MaskAQError(Exception):
    """Root of all errors that this package raises on purpose."""


class ConfigurationError(MaskAQError, ValueError):
    """A scheme, layer pattern, option or configuration key is unknown or out of range."""


class InputError(MaskAQError, ValueError):
    """A tensor or argument has the wrong shape, dtype or range."""


class ModelError(MaskAQError, TypeError):
    """The model is unknown, or is not a Vision Transformer that this package can quantize."""


class CheckpointError(MaskAQError, ValueError):
    """A weight file is unreadable or does not fit the model."""


class DataError(MaskAQError, ValueError):
    """Evaluation data is missing, unreadable or labelled outside the model's classes."""


class SynthesisError(MaskAQError, RuntimeError):
    """Images could not be synthesised (for example, the objective stays NaN)."""


class TuningError(MaskAQError, RuntimeError):
    """A quant model could not be tuned (for example, the loss stays NaN, or it was never calibrated)."""


class ExportError(MaskAQError, RuntimeError):
    """An export failed, or the exported file does not compute what the model computes."""


class RunDirectoryError(MaskAQError, RuntimeError):
    """A run directory is missing, holds another run, or is damaged."""


class DamagedFileError(RunDirectoryError):
    """A file of a run is missing, cut off, altered, or of another model or configuration; the message names it."""


class WriteError(MaskAQError, OSError):
    """A file cannot be written (disk full, no permission); nothing stands under its name that was not there before."""


class MissingExtraError(MaskAQError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""

    def __init__(self, module: str, extra: str):
        super().__init__(
            f"This needs the Python package '{module}', which is not installed. "
            f"Install it with: pip install 'maskaq_brevitas[{extra}]'"
        )


class MaskAQWarning(UserWarning):
    """Root of the warnings of this package."""


class SilentLayerWarning(MaskAQWarning):
    """A layer got nothing but zeros from the synthetic images, so that its scale says nothing about other images."""


class SkippedLayerWarning(MaskAQWarning):
    """A layer of the model stays in float because no quantized twin is registered for its type."""


class UncoupledWarning(MaskAQWarning):
    """Images are refreshed although their objective does not see the quant model that they should follow."""


class CompilationWarning(MaskAQWarning):
    """``torch.compile`` failed, or the quantizers have no fast form; the run goes on without it, more slowly."""


class SlowArithmeticWarning(MaskAQWarning):
    """An arithmetic was asked for that the hardware only emulates; the run goes on in it, many times slower."""


class MemoryWarning(MaskAQWarning):
    """Memory ran out; the run goes on with fewer images at once, for the same result."""
