"""A run through every stage on a small ViT, which says where it is, for processes that are killed."""

from dataclasses import replace
from pathlib import Path

import torch
from random_vit import random_vit
from torch import nn

from maskaq_brevitas.calibrator import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.export import export_qonnx

#: The stages in which a run may die; the names begin like those of ``DataFreeCalibrator.stages``.
STAGES = ("synthesis", "calibration", "reconstruction", "distillation", "export")
RESULTS = ("images.safetensors", "held_back.safetensors", "quant_model.safetensors", "model.onnx")
TUNING = (
    ReconstructConfig(steps=6, batch_size=4),
    DistillConfig(epochs=3, refresh_every=1, refresh_steps=2, batch_size=4, learning_rate=1e-4),
)  # fmt: skip


def small_vit() -> nn.Module:
    """16 x 16 input, 4 x 4 patches, 2 blocks of width 32, random weights of a fixed seed."""
    return random_vit(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4)


def calibrator_of(folder, kind=DataFreeCalibrator, **changes) -> DataFreeCalibrator:
    """The calibrator of the run in ``folder``, which is begun or resumed."""
    options = dict(
        scheme=replace(resolve_scheme("w4a4"), weight_range="minmax", activation_range="minmax"), num_images=8,
        held_back=4, batch_size=4, seed=0, progress=False, tuning=TUNING, run_mode="resume",
        synthesis=SynthesisConfig(steps=6, warmup_steps=1, batch_size=4, procedural_share=0.0),
    )  # fmt: skip
    return kind(small_vit(), run_dir=folder, **{**options, **changes})


def run(folder, place=None, began=None, export=True) -> None:
    """Begin or resume the run in ``folder`` and finish it.

    Args:
        place: shared text that names the stage in which the run is.
        began: called at the beginning of each stage.
        export: without it the run ends before the export.
    """

    def enter(stage: str) -> None:
        if place is not None:
            place.value = ("distillation" if stage.startswith("refresh") else stage).encode()
        if began is not None:
            began(stage)

    class Told(DataFreeCalibrator):
        def stage(self, name):
            enter(name)
            return super().stage(name)

    torch.set_num_threads(1)
    calibrator = calibrator_of(folder, Told)
    calibrator.quantize()
    calibrator.save()
    if not export:
        return
    enter("export")
    export_qonnx(calibrator.quant_model, Path(folder) / "model.onnx", input_shape=calibrator.geometry.input_size)


def results(folder, export=True) -> dict[str, bytes]:
    """What a finished run leaves, byte by byte."""
    return {name: (Path(folder) / name).read_bytes() for name in RESULTS[: None if export else -1]}
