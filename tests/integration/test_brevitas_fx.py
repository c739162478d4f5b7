"""The command quantizes with both flows, prints its table, and counts what computes on float numbers."""

import pytest
import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.graph.quantize import quantize

from integration.brevitas_fx.__main__ import main
from integration.brevitas_fx.left_float import float_computations
from maskaq_brevitas import prepare_for_fx
from maskaq_brevitas.tuning.calibrate import calibrate

KINDS = ["Gaussian noise", "synthetic images", "the same, refreshed", "real images"]


def test_prints_the_table(capsys, tmp_path):
    options = ["--images", "4", "--steps", "1", "--eval-limit", "20", "--out", str(tmp_path / "new" / "table.txt")]
    main(options)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.strip()]
    assert lines[0] == (
        "digits_vit: 4 calibration images, 1 iterations of synthesis, seed 0, 20 images to evaluate, 1 thread(s)"
    )
    rows = lines[3:11]
    for row, (flow, kind) in zip(
        rows, [(flow, kind) for flow in ("quantize", "quantize_flexml") for kind in KINDS], strict=True
    ):
        assert row.startswith(flow + " ") and kind in row
        assert float(row.split(kind)[1].split()[0]) > 60
    # 6 blocks of 2 matmuls and a softmax; 2 norms each and the last one; scaled queries; positions
    left = "6 Softmax, 1 add, 13 layer_norm, 12 matmul, 6 mul."
    assert lines[11:] == [
        f"{flow}: 26 quantized layers, 53 QuantIdentity; on float numbers compute: {left}"
        for flow in ("quantize", "quantize_flexml")
    ]
    written = (tmp_path / "new" / "table.txt").read_text(encoding="utf-8")
    assert written.startswith("python -m integration.brevitas_fx --images 4 --steps 1 ") and printed in written


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--model", "deit_tiny_patch16_224", "--checkpoint", "none.safetensors"], "found none at 'none.safetensors'"),
        (["--images", "0"], "expected whole numbers >= 1"),
        (["--eval-data", "nowhere"], "found none at 'nowhere'"),
    ),
)
def test_bad_input_ends_with_its_message(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_float_computations(tiny_vit):
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    quant_model = quantize(preprocess_for_quantize(prepare_for_fx(tiny_vit)))
    calibrate(quant_model, [image])
    assert float_computations(quant_model, image) == {"Softmax": 2, "add": 1, "layer_norm": 5, "matmul": 4, "mul": 2}
    whole = float_computations(prepare_for_fx(tiny_vit), image)
    assert whole["Linear"] == 9 and whole["Conv2d"] == 1 and whole["GELU"] == 2 and whole["add"] == 5
