"""One model in three libraries: the same logits in float, and nearly the same once it is quantized."""

from dataclasses import replace

import torch
from digits_elsewhere import as_torchvision
from digits_elsewhere import as_transformers

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.models.families import read_logits

# Searched ranges would differ: timm's qkv is one layer with one input quantizer, theirs are three.
SCHEME = replace(resolve_scheme("w4a8"), activation_range="minmax", weight_range="minmax", bias_correction=False)


def test_digits_vit_is_quantized_alike_in_every_library(digits_vit):
    data = digits_split(train=False, model=digits_vit)
    pixels = torch.stack([image for image, _ in data])[:128]
    labels = torch.tensor([label for _, label in data])[:128]

    def quantized(model):
        calibrator = DataFreeCalibrator(model, scheme=SCHEME, num_images=16, progress=False)
        with torch.no_grad():
            return calibrator.calibrated_on(pixels[:16])(pixels)

    with torch.no_grad():
        logits = digits_vit(pixels)
    expected = quantized(digits_vit)
    error = (expected - logits).norm()
    assert (expected.argmax(dim=1) == labels).float().mean() > 0.9
    for convert in (as_torchvision, as_transformers):
        model = convert(digits_vit)
        with torch.no_grad():
            torch.testing.assert_close(read_logits(model, model(pixels)), logits, rtol=1e-4, atol=1e-4)
        # Sums in another order could round some values to the next code.
        assert (quantized(model) - expected).norm() < 0.05 * error
