"""What PyTorch computes, for FINN to be compared with: outputs, and what every activation quantizer was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor
from torch import nn

from maskaq_brevitas.export.capture import capture_calls
from maskaq_brevitas.export.finn_form import Cut
from maskaq_brevitas.export.finn_form import finn_form
from maskaq_brevitas.quant.snapshot import integer_bounds

__all__ = ["write_reference"]


@torch.no_grad()
def write_reference(quant_model: nn.Module, images: Tensor, path: Path, cut: Cut = "full") -> None:
    """Write an ``.npz`` with ``input`` and ``output`` ``(samples, ...)``, and the levels of each quantizer.

    Args:
        quant_model: of a scheme ``finn-wXaY``.
        images: ``(samples, channels, height, width)``, normalised.
        path: of the file. ``levels/SAMPLE/NAME`` holds what the quantizer NAME was given, divided by its scale;
            ``range/NAME`` its lowest and highest code.
        cut: the part that is executed; the input of ``"encoder"`` are embedded tokens.
    """
    form = finn_form(quant_model, cut)
    stem = finn_form(quant_model).stem if cut == "encoder" else None
    # The quantizer of constant zeros is folded away.
    watched = {
        name: module
        for name, module in form.named_modules()
        if isinstance(module, QuantIdentity) and not name.endswith("prefix_codes")
    }
    arrays: dict[str, np.ndarray] = {}
    for name, module in watched.items():
        arrays[f"range/{name}"] = np.array(integer_bounds(module.act_quant))
    inputs, outputs = [], []
    for index, image in enumerate(images):
        given = image[None] if stem is None else stem(image[None])
        output, calls = capture_calls(form, given, lambda module: module in set(watched.values()))
        inputs.append(given)
        outputs.append(output)
        for name, module in watched.items():
            arrays[f"levels/{index}/{name}"] = (calls[name][0].input / module.act_quant.scale()).numpy()
    np.savez(path, input=torch.cat(inputs).numpy(), output=torch.cat(outputs).numpy(), **arrays)
