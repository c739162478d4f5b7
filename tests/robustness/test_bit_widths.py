"""Every ``wXaY`` from 2 to 8 bits on ``digits_vit``: accuracy does not fall as bits rise, and exports compute the same.
"""

import pytest
import torch

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import verify_qonnx
from maskaq_brevitas.models.zoo import load_model

BITS = range(2, 9)
EXPORTED = ((2, 2), (3, 3), (5, 5), (2, 8), (8, 2))  # 4 and 8 bits are exported by other tests
#: Of 599 digits, 2 points are 12: what another draw of images changes.
NOISE = 2.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Images made once: without the alignment term they do not depend on the scheme."""
    path = tmp_path_factory.mktemp("pool") / "images.safetensors"
    calibrator(load_model("digits_vit"), "w8a8").ensure_images().save(path)
    return path


def calibrator(model, scheme):
    synthesis = SynthesisConfig(steps=20, head_weight=0.0, entropy_weight=0.0, align_weight=0.0)
    return DataFreeCalibrator(model, scheme=scheme, num_images=32, held_back=0, progress=False, synthesis=synthesis)


@pytest.mark.heavy
def test_accuracy_rises_with_bits_and_exports_agree(pool, tmp_path):
    model = load_model("digits_vit")
    digits = digits_split(train=False, model=model)
    accuracy = torch.zeros(9, 9)
    for weight in BITS:
        for activation in BITS:
            made = calibrator(model, f"w{weight}a{activation}")
            made.pool.load(pool)
            quant_model = made.calibrate()
            accuracy[weight, activation] = evaluate(made.freeze(), digits, batch_size=200).top1
            if (weight, activation) in EXPORTED:
                path = tmp_path / "model.onnx"
                export_qonnx(quant_model, path, input_shape=made.geometry.input_size)
                check = verify_qonnx(path, quant_model, made.pool.images()[:4])
                assert check.passed, (weight, activation, check)
    print(accuracy[2:, 2:])
    found = accuracy[2:, 2:]
    for steps in (found[1:] - found[:-1], found[:, 1:] - found[:, :-1]):
        assert float(steps.min()) >= -NOISE, found
    assert evaluate(model, digits).top1 - found[-1, -1] <= NOISE
    assert found[0, 0] + 10 < found[2, 2]
