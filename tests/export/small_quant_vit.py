"""A small Brevitas ViT, calibrated on random images, as material for the export tests."""

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant.scaled_int import Int8ActPerTensorFloat
from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
from brevitas.quant.scaled_int import Uint8ActPerTensorFloat
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn

#: Quantizers of the small model: patch embedding, 4 linears in 2 blocks, head (weight and input each); q, k, v and the
#: softmax output in 2 blocks.
QUANTIZERS = 2 * (1 + 4 * 2 + 1) + 4 * 2


class QuantAttention(nn.Module):
    """timm's attention with quantized operands of both matrix products."""

    def __init__(self, attention: nn.Module, bit_width: int):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.q_quant, self.k_quant, self.v_quant = (
            qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=bit_width) for _ in range(3)
        )
        self.probabilities_quant = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=bit_width)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.q_quant(q * self.scale), self.k_quant(k), self.v_quant(v)
        probabilities = self.probabilities_quant((q @ k.transpose(-2, -1)).softmax(-1))
        return self.proj((probabilities @ v).transpose(1, 2).reshape(batch, tokens, width))


def quantize_layers(model: nn.Module, weight_bits: int, act_bits: int) -> nn.Module:
    options = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": weight_bits,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": act_bits,
        "bias_quant": None,
    }
    return layerwise_quantize(model, {nn.Linear: (qnn.QuantLinear, options), nn.Conv2d: (qnn.QuantConv2d, options)})


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        model(images)
    return model


def build_quant_vit(weight_bits: int = 4, act_bits: int = 8, depth: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=depth, num_heads=2, num_classes=10)
        nn.init.normal_(model.cls_token, std=0.5)
        # timm starts with biases of zero, which the exporter drops or merges.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model = quantize_layers(model, weight_bits, act_bits)
        for block in model.blocks:
            block.attn = QuantAttention(block.attn, act_bits)
    return calibrated(model, random_images(16))


def random_images(count: int) -> Tensor:
    return torch.randn((count, 3, 32, 32), generator=torch.Generator().manual_seed(1))
