import subprocess
import sys
import textwrap

from maskaq_brevitas import errors

BUILTINS = {
    "ConfigurationError": ValueError, "InputError": ValueError, "ModelError": TypeError, "CheckpointError": ValueError,
    "DataError": ValueError, "SynthesisError": RuntimeError, "TuningError": RuntimeError, "ExportError": RuntimeError,
    "RunDirectoryError": RuntimeError, "MissingExtraError": ImportError, "DamagedFileError": RuntimeError,
    "WriteError": OSError,
}  # fmt: skip


def test_errors_are_also_what_a_caller_expects():
    found = {name for name in errors.__all__ if issubclass(getattr(errors, name), errors.MaskAQError)}
    assert found == {*BUILTINS, "MaskAQError"}
    for name, builtin in BUILTINS.items():
        assert issubclass(getattr(errors, name), builtin), name


def test_missing_extra_names_the_command():
    message = str(errors.MissingExtraError("matplotlib", "viz"))
    assert "'matplotlib'" in message and "pip install 'maskaq_brevitas[viz]'" in message


def test_warnings_can_be_filtered():
    assert issubclass(errors.SkippedLayerWarning, errors.MaskAQWarning)
    assert issubclass(errors.CompilationWarning, errors.MaskAQWarning)
    assert issubclass(errors.MaskAQWarning, UserWarning)


def test_import_changes_nothing():
    """torch, timm and brevitas are imported first: what they do is theirs."""
    code = """
        import logging, os, random, sys, warnings
        import numpy, torch, timm, brevitas.nn, brevitas.quant, brevitas.graph.calibrate
        from timm.layers import use_fused_attn
        import tqdm, safetensors.torch

        def state():
            return (
                torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
                torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(), use_fused_attn(), dict(os.environ), list(warnings.filters),
                logging.getLogger().level, list(logging.getLogger().handlers), os.getcwd(),
            )

        before = state()
        import maskaq_brevitas
        for one, other in zip(before, state()):
            assert one == other, (one, other)
        assert not {"onnx", "matplotlib", "onnxruntime", "qonnx"} & set(sys.modules)
        assert not logging.getLogger("maskaq_brevitas").handlers
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
