"""What FINN maps to hardware operators, as data: one rule per ONNX operator, of one version, run on that version.

Each rule names the hardware operator, and what a node has to fulfil; ``check`` names a function of
:mod:`maskaq_brevitas.export.finn_lint`. For another version of FINN, another table is added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FINN_VERSION", "RULES", "UNMAPPED", "Effect", "Need", "Rule"]

#: The version that the rules were read in and run on (September 2026; estimate-only flow).
FINN_VERSION = "FINN+ 1.6.1"

#: What happens to a node that does not fulfil a need: it stays outside the hardware; FINN raises an error and nothing
#: is built; or it is built and computes something else.
Effect = Literal["unmapped", "refused", "wrong"]


@dataclass(frozen=True)
class Need:
    """One requirement of a rule: the check, what is wrong where it fails, what changes that, and what FINN does."""

    check: str
    wrong: str
    remedy: str
    effect: Effect = "unmapped"


@dataclass(frozen=True)
class Rule:
    """How nodes of some ONNX operators become hardware, and the note that belongs to it (parts, tolerances)."""

    operators: tuple[str, ...]
    hardware: str
    needs: tuple[Need, ...] = ()
    note: str = ""


_PROFILE = "quantize and export with --target finn"

RULES = (
    # Unsigned codes are taken by this version, not by FINN's development branch of April 2026.
    Rule(("Quant",), "Thresholding", (
        Need("zero_point_is_0", "its zero point is not 0", f"a signed quantizer: {_PROFILE}", "refused"),
        Need("static_width", "its bit width is not a constant", "a quantizer of fixed width", "refused"),
        Need("rounds_half_even", "rounding mode {rounding_mode} is ignored: it is built as ROUND",
             "rounding mode ROUND", "wrong"),
        Need("at_most_8_bits", "it has more than 8 bits", "FINN's max_multithreshold_bit_width, or 8 bits or fewer"),
        Need("one_scale_axis", "its scale varies over several axes", "one scale per tensor, or per channel", "refused"),
    )),
    Rule(("MatMul", "Gemm"), "MVAU", (
        Need("integer_operands", "an operand does not come from a quantizer", f"quantize both operands: {_PROFILE}"),
        Need("scalar_scales", "an activation operand has a scale per channel, which cannot pass the matmul",
             "one scale per tensor (scheme finn-wXaY or tensor-wXaY)"),
        Need("scales_pass_forks", "its quantizer's scale is shared with other readers and cannot pass the fork",
             f"a quantizer of scale 1 in front of a fork: {_PROFILE}"),
    )),
    Rule(("Conv",), "ConvolutionInputGenerator and MVAU", (
        Need("integer_operands", "an operand does not come from a quantizer", f"quantize input and weight: {_PROFILE}"),
        Need("scalar_scales", "its input has a scale per channel", "one scale per tensor (scheme finn-wXaY)"),
        Need("scales_pass_forks", "its quantizer's scale is shared with other readers and cannot pass the fork",
             f"a quantizer of scale 1 in front of a fork: {_PROFILE}"),
    )),
    Rule(("LayerNormalization",), "LayerNorm", (
        Need("normalises_last_axis", "it normalises over more than the last axis", "channels last"),
        Need("unit_norm_scale", "its scale is in the node", f"the scale as a multiplication behind it: {_PROFILE}"),
        Need("has_norm_bias", "it has no bias input (FINN gives up without one)", f"a bias of zeros: {_PROFILE}"),
        Need("zero_norm_bias", "its bias is dropped without a word", f"the bias as an addition behind it: {_PROFILE}",
             "wrong"),
    )),
    Rule(("Softmax",), "HWSoftmax", (
        Need("works_on_last_axis", "it is built for the last axis whatever its axis",
             "softmax over the last axis", "wrong"),
    )),
    Rule(("Gelu",), "PWPolyF", (
        Need("plain_gelu", "its approximation is ignored", "GELU without approximation", "wrong"),
    ), "Versal parts only; piecewise polynomials"),
    Rule(("Tanh", "Sigmoid"), "PWPolyF", (), "Versal parts only; piecewise polynomials"),
    Rule(("Relu",), "Thresholding, with the quantizer behind it", (
        Need("quantizer_behind", "no quantizer follows it", "a quantizer behind the ReLU"),
    )),
    Rule(("Add", "Sub", "Mul", "Div", "Max"), "Elementwise, or inside thresholds"),
    Rule(("Transpose",), "Shuffle", (), "the first of a graph needs infer_shuffle_skip_first=False"),
    Rule(("Reshape",), "Reshape, or inside a Shuffle", (
        Need("static_shape", "its shape is not a constant", "a static batch of 1: --target finn"),
    )),
    Rule(("Split",), "StreamingSplit", (
        Need("works_on_last_axis", "it does not split the last axis", f"separate linear layers: {_PROFILE}"),
        Need("integer_data", "what it splits does not come from a quantizer", "a quantizer in front of the split"),
    )),
    Rule(("Concat",), "Pad1D or StreamingConcat", (
        Need("pads_tokens_or_joins_channels",
             "it neither puts constant tokens beside streamed ones (axis 1, batch 1) nor joins channels",
             "the class token as a constant: --target finn, or the cut 'encoder'"),
        Need("one_integer_grid", "its operands are not on one integer grid of scale 1",
             "quantizers of scale 1 on all operands: --target finn, or the cut 'encoder'"),
    )),
    Rule(("Gather",), "SelectToken or Crop", (
        Need("picks_constant_tokens", "it does not pick constant, consecutive tokens of one image",
             "x[:, 0] of a batch of 1"),
    )),
    Rule(("Identity",), "nothing"),
)  # fmt: skip

#: Why operators without a rule have none, and what avoids them.
UNMAPPED = {
    "Erf": ("GELU was decomposed", "opset 20, where it is one node: --target finn"),
    "Slice": ("slices have no operator", f"separate q, k, v, and x[:, 0] for a token: {_PROFILE}"),
    "Squeeze": ("no step maps it", f"separate q, k, v: {_PROFILE}"),
    "Unsqueeze": ("no step maps it", f"separate q, k, v: {_PROFILE}"),
    "ReduceMean": ("mean over tokens has no operator", "the cut 'encoder', or a model that pools its class token"),
    "Expand": ("a batch of unknown size", "a static batch of 1: --target finn"),
    "Shape": ("a batch of unknown size", "a static batch of 1: --target finn"),
}
