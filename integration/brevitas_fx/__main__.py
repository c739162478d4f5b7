"""Brevitas' FX flows, ``quantize`` and ``quantize_flexml``, on a timm ViT, calibrated on noise, synthetic, real images.

    python -m integration.brevitas_fx --model digits_vit
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize
from brevitas.graph.target.flexml import preprocess_for_flexml_quantize
from brevitas.graph.target.flexml import quantize_flexml
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate
from torch import nn

from integration.brevitas_fx.left_float import float_computations
from integration.material import BATCH
from integration.material import Material
from integration.material import add_options
from integration.material import command_line
from integration.material import print_table
from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import prepare_for_fx

TITLES = ["flow", "calibrated on", "top-1 [%]", "seconds", "alignment"]


def quantized(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """``quantize`` as a Brevitas user calls it, but for ``prepare_for_fx``."""
    return quantize(preprocess_for_quantize(prepare_for_fx(model)))


def quantized_flexml(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """The same with ``quantize_flexml``: all scales are powers of two."""
    return quantize_flexml(preprocess_for_flexml_quantize(prepare_for_fx(model), image))


FLOWS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "quantize": quantized, "quantize_flexml": quantized_flexml,
}  # fmt: skip


def rows_of(name: str, material: Material, options: argparse.Namespace) -> tuple[list[list[str]], str]:
    """The rows of one flow, and a sentence about what it quantized and what it left in float."""
    image = material.noise[:1]
    rows: list[list[str]] = []

    def add(kind: str, quant_model: nn.Module, seconds: float, alignment: str = "") -> None:
        rows.append([name, kind, material.top1(quant_model), f"{seconds:.0f}", alignment])
        material.note(*rows[-1][:3])

    def on_images(kind: str, images: torch.Tensor) -> nn.Module:
        quant_model = FLOWS[name](material.model, image)
        start = time.perf_counter()
        calibrate(material.loader(images), quant_model)
        add(kind, quant_model, time.perf_counter() - start)
        return quant_model

    on_images("Gaussian noise", material.noise)

    quant_model = FLOWS[name](material.model, image)
    start = time.perf_counter()
    calib_loader = DataFreeCalibrator(
        material.model, quant_model=quant_model, num_images=options.images, batch_size=BATCH, steps=options.steps,
        seed=options.seed,
    )  # fmt: skip
    calibrate(calib_loader, quant_model)
    add("synthetic images", quant_model, time.perf_counter() - start)
    start = time.perf_counter()
    entry = calib_loader.refresh()
    calib_loader.calibrate()  # Brevitas alone would ignore a second calibration
    rows[-1][-1] = f"{entry['alignment_before']:.4f}"
    add("the same, refreshed", quant_model, time.perf_counter() - start, f"{entry['alignment_after']:.4f}")
    real = on_images("real images", material.real)

    layers = sum(isinstance(module, QuantWeightBiasInputOutputLayer) for module in real.modules())
    quantizers = sum(isinstance(module, QuantIdentity) for module in real.modules())
    left = ", ".join(f"{count} {kind}" for kind, count in sorted(float_computations(real, image).items()))
    return rows, f"{name}: {layers} quantized layers, {quantizers} QuantIdentity; on float numbers compute: {left}."


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m integration.brevitas_fx", description=__doc__.partition("\n")[0])
    add_options(parser)
    options, material = Material.parse(parser, arguments)
    rows = [["float model", "", material.top1(material.model), "", ""]]
    sentences = []
    for name in FLOWS:
        found, sentence = rows_of(name, material, options)
        rows += found
        sentences.append(sentence)
    print_table(
        options, [material.headline(options), (TITLES, rows), "\n".join(sentences)],
        command=command_line("integration.brevitas_fx", arguments),
    )  # fmt: skip


if __name__ == "__main__":
    main()
