import json
import os

import pytest
from small_quant_vit import QUANTIZERS

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export import export_qonnx
from maskaq_brevitas.export import model_card
from maskaq_brevitas.export import write_card

# By hand: 32 x 32 pixels in patches of 8 and a class token, 64 channels, 2 heads, 2 blocks, 10 classes.
TOKENS, WIDTH = 17, 64
PATCHES = 16 * (3 * 8 * 8) * WIDTH
LINEARS = TOKENS * 12 * WIDTH * WIDTH * 2
ATTENTION = 2 * TOKENS * TOKENS * WIDTH * 2
HEAD = WIDTH * 10
WEIGHTS = 3 * 8 * 8 * WIDTH + 12 * WIDTH * WIDTH * 2 + HEAD


def test_costs_and_data_types(exported):
    card = model_card(exported.path)
    assert card.macs == PATCHES + LINEARS + ATTENTION + HEAD
    assert card.macs_by_type == {
        "SCALEDINT<8> x SCALEDINT<4>": PATCHES + LINEARS + HEAD, "SCALEDINT<8> x SCALEDINT<8>": ATTENTION
    }  # fmt: skip
    assert card.bops == 32 * (PATCHES + LINEARS + HEAD) + 64 * ATTENTION
    assert (card.weights, card.weight_bits) == (WEIGHTS, 4 * WEIGHTS)
    assert card.activations > 0 and card.activation_bits > card.activations
    assert {"Softmax", "LayerNormalization", "Gelu"} <= set(card.uncounted)
    assert len(card.quantizers) == QUANTIZERS
    assert card.quantizers["blocks.0.mlp.fc1.weight_quant"] == "SCALEDINT<4>"
    assert card.quantizers["blocks.0.mlp.fc1.input_quant"] == "SCALEDINT<8>"
    assert card.quantizers["blocks.0.attn.probabilities_quant"].endswith("SCALEDINT<8>")
    assert card.tensors["global_out"] == "FLOAT32"


def test_card_of_a_dynamic_file_is_that_of_one_image(quant_vit, exported, tmp_path):
    file = export_qonnx(quant_vit, tmp_path / "dynamic.onnx", input_shape=(3, 32, 32), dynamic_batch=True)
    card = model_card(file.path)
    assert (card.macs, card.bops) == (model_card(exported.path).macs, model_card(exported.path).bops)
    path = write_card(card, file.path)
    assert sorted(os.listdir(tmp_path)) == ["dynamic.card.json", "dynamic.onnx"]
    content = json.loads(path.read_text())
    assert content["macs"] == card.macs and content["quantizers"] == card.quantizers


def test_no_file(tmp_path):
    with pytest.raises(ExportError, match="Expected a QONNX file"):
        model_card(tmp_path / "none.onnx")
