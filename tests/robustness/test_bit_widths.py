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
#: Widths of weights in two overlapping runs: two workers share the work, and the comparisons still chain from 2 to 8.
WEIGHT_BITS = (range(2, 6), range(5, 9))
EXPORTED = ((2, 2), (3, 3), (5, 5), (2, 8), (8, 2))  # 4 and 8 bits are exported by other tests


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Images made once: without the alignment term they do not depend on the scheme."""
    path = tmp_path_factory.mktemp("pool") / "images.safetensors"
    calibrator(load_model("digits_vit"), "w8a8").ensure_images().save(path)
    return path


def calibrator(model, scheme):
    synthesis = SynthesisConfig(steps=20, head_weight=0.0, entropy_weight=0.0, align_weight=0.0)
    return DataFreeCalibrator(model, scheme=scheme, num_images=8, held_back=0, progress=False, synthesis=synthesis)


def noise(accuracy, images):
    """Two standard errors of the difference of two accuracies [%], each on its own draw of so many images."""
    accuracy = accuracy.clamp(1.0, 99.0)
    return 2 * (2 * accuracy * (100 - accuracy) / images).sqrt()


@pytest.mark.heavy
@pytest.mark.parametrize("weight_bits", WEIGHT_BITS, ids=str)
def test_accuracy_rises_with_bits_and_exports_agree(weight_bits, pool, tmp_path):
    model = load_model("digits_vit")
    digits = digits_split(train=False, model=model)
    accuracy = torch.zeros(len(weight_bits), len(BITS))
    for row, weight in enumerate(weight_bits):
        for column, activation in enumerate(BITS):
            made = calibrator(model, f"w{weight}a{activation}")
            made.pool.load(pool)
            quant_model = made.calibrate()
            accuracy[row, column] = evaluate(made.freeze(), digits, batch_size=200).top1
            if (weight, activation) in EXPORTED:
                path = tmp_path / "model.onnx"
                export_qonnx(quant_model, path, input_shape=made.geometry.input_size)
                check = verify_qonnx(path, quant_model, made.pool.images()[:4])
                assert check.passed, (weight, activation, check)
    print(accuracy)
    for fewer, more in ((accuracy[:-1], accuracy[1:]), (accuracy[:, :-1], accuracy[:, 1:])):
        assert (fewer - more <= noise(fewer, len(digits))).all(), accuracy
    assert accuracy[0, 0] + 10 < accuracy[2, 2], accuracy  # two bits more of both: beyond doubt
    assert (accuracy[:, 0] + 10 < accuracy[:, -1]).all(), accuracy
    assert float(evaluate(model, digits).top1 - accuracy[-1, -1]) <= 2.0, accuracy
