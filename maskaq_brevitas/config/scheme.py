"""Bit widths and kinds of quantizers: the named schemes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Literal

from maskaq_brevitas.config.checks import check_at_least
from maskaq_brevitas.config.checks import check_bool
from maskaq_brevitas.config.checks import check_choice
from maskaq_brevitas.config.checks import finite_number
from maskaq_brevitas.errors import ConfigurationError

__all__ = ["LayerBits", "SCHEME_NAMES", "Scheme", "parse_bits", "resolve_scheme"]

#: The schemes that the documentation measures. Any ``wXaY`` with 2 <= X, Y <= 8 is accepted as well.
SCHEME_NAMES = ("w8a8", "w6a6", "w5a5", "w4a8", "w4a4", "w3a3")

_BITS = re.compile(r"w([2-8])a([2-8])")
_AUTO = re.compile(r"auto-(\d(?:\.\d+)?)")

#: What FINN asks for beyond one scale per tensor.
_FINN: dict[str, Any] = {"gelu": "signed", "softmax": "signed", "patch_tokens": 8, "weight_levels": "symmetric"}


@dataclass(frozen=True)
class LayerBits:
    """Bit widths of one layer: ``weight`` (bits) and ``activation`` (bits)."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        check_at_least("LayerBits.weight", self.weight, 1)
        check_at_least("LayerBits.activation", self.activation, 1)

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def parse_bits(text: str) -> LayerBits:
    """Bit widths written as ``wXaY``, for example ``"w4a8"``.

    Raises:
        ConfigurationError: if ``text`` is not of that form or a width is not in 2..8.
    """
    match = _BITS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(
            f"Expected bit widths of the form wXaY with 2 <= X, Y <= 8 (for example 'w4a8'), got {text!r}."
        )
    return LayerBits(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model is quantized: bit widths per kind of layer, and the kind of quantizer where there is a choice.

    Use :func:`resolve_scheme` for the named ones; ``dataclasses.replace`` changes a detail.

    Attributes:
        name: what reports call it.
        bits: nominal widths of all linear layers and of the matmul operands query, key and value (activation width).
        patch_embed: widths of the patch embedding (weight, and the image at its input).
        head: widths of the classifier.
        probability_bits: width of the attention probabilities. ``None`` means the nominal activation width.
        weight_range: ``"minmax"`` (largest absolute value of the channel) or ``"mse"`` (grid search per channel).
        weight_levels: ``"all"`` (from -2^(b-1), one more below zero than above) or ``"symmetric"``: Brevitas' narrow
            range, which leaves seven of eight levels at 3 bits. It counts from 3 to 7 bits and for searched ranges.
        activation_range: ``"percentile"`` (99.999 %), ``"minmax"``, ``"mse"`` (Brevitas' grid search per batch,
            averaged), or ``"search"``: min-max, then shrunk to the least error of the layer's output, token by token
            (:mod:`maskaq_brevitas.tuning.ranges`).
        gelu: quantizer behind the MLP's activation function: ``"asymmetric"`` (unsigned with a zero point) or
            ``"signed"`` (zero point 0, as FINN wants).
        softmax: ``"unsigned"`` or ``"signed"`` (half of the codes unused, as FINN wants).
        input_scales: ``"channel"``: what a LayerNorm or the MLP's activation function gives to a linear layer is
            quantized with one scale per channel (each channel's codes still have the nominal width; a thresholding
            back-end takes the scales for nothing, an integer matmul has to multiply by them before it accumulates).
            ``"tensor"``: one scale, as everywhere else in the graph; channels of unequal range then cost accuracy at
            low bits.
        equalize: range of the channels of LayerNorm outputs and MLP hidden units before they are quantized:
            ``True`` shifts and scales every channel to one common symmetric range and folds the inverse into the
            next weight (and, for a LayerNorm, into its affine part), so that the graph keeps per-tensor quantizers.
            With ``input_scales="channel"`` channels are only shifted; their scales stay in the quantizer.
        bias_correction: whether the mean error that rounding a weight leaves in a linear layer's output, on the
            synthetic images, is taken off its bias.
        average_bits: mixed precision: the widths of the layers at nominal bits are chosen by their sensitivity, such
            that the model costs no more bit operations than with this (fractional) width everywhere; ``bits`` is what
            images are synthesised against. ``None``: all at ``bits``.
        patch_tokens: width at which the patch embedding's output is quantized, so that the class token can be joined to
            it on one integer grid, as FINN wants. ``None``: it is not.
    """

    name: str
    bits: LayerBits
    patch_embed: LayerBits
    head: LayerBits
    probability_bits: int | None = None
    weight_range: Literal["minmax", "mse"] = "mse"
    weight_levels: Literal["all", "symmetric"] = "all"
    activation_range: Literal["percentile", "minmax", "mse", "search"] = "search"
    gelu: Literal["asymmetric", "signed"] = "asymmetric"
    softmax: Literal["unsigned", "signed"] = "unsigned"
    input_scales: Literal["channel", "tensor"] = "tensor"
    equalize: bool = True
    bias_correction: bool = True
    average_bits: float | None = None
    patch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("patch_embed", self.patch_embed), ("head", self.head)):
            if not isinstance(bits, LayerBits):
                raise ConfigurationError(f"Scheme.{name}: expected LayerBits(weight, activation), got {bits!r}.")
            if not (2 <= bits.weight <= 8 and 2 <= bits.activation <= 8):
                raise ConfigurationError(f"Scheme.{name}: expected widths from 2 to 8 bits, got {bits}.")
        for name in ("probability_bits", "patch_tokens"):
            width = getattr(self, name)
            if width is not None:
                check_at_least(f"Scheme.{name}", width, 2)
                if width > 8:
                    raise ConfigurationError(f"Scheme.{name}: expected 2 to 8 bits or None, got {width}.")
        check_choice("weight_range", self.weight_range, ("minmax", "mse"))
        check_choice("weight_levels", self.weight_levels, ("all", "symmetric"))
        check_choice("activation_range", self.activation_range, ("percentile", "minmax", "mse", "search"))
        check_choice("gelu", self.gelu, ("asymmetric", "signed"))
        check_choice("softmax", self.softmax, ("unsigned", "signed"))
        check_choice("input_scales", self.input_scales, ("channel", "tensor"))
        check_bool("equalize", self.equalize)
        check_bool("bias_correction", self.bias_correction)
        if self.average_bits is not None and not 2 <= finite_number(self.average_bits) <= 8:
            raise ConfigurationError(f"Scheme.average_bits: expected 2 to 8 bits or None, got {self.average_bits!r}.")

    @property
    def resolved_probability_bits(self) -> int:
        """Width of the attention probabilities, in bits."""
        return self.bits.activation if self.probability_bits is None else self.probability_bits


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of a name.

    ``wXaY`` keeps patch embedding, head and attention probabilities at 8 bits (comparable with FIMA-Q and GLF-Q, which
    keep the first and last layer at 8; the probabilities are ours, and reports name them), and has one scale per
    channel behind LayerNorms and GELU. ``tensor-wXaY`` is the same with one scale per tensor everywhere.
    ``strict-wXaY`` puts every layer and operand at the nominal widths, with one scale per tensor (comparable with
    MaskAQ's table). ``finn-wXaY`` is ``tensor-wXaY`` with signed quantizers everywhere and quantized patch tokens: what
    FINN maps to hardware. ``auto-B`` chooses widths layer by layer within the bit operations of B bits everywhere
    (``auto-4.5``); the rest as in ``wXaY``.

    Args:
        scheme: ``"wXaY"``, ``"tensor-wXaY"``, ``"strict-wXaY"``, ``"finn-wXaY"`` or ``"auto-B"`` with 2 <= X, Y, B <=
            8, or a :class:`Scheme`, which is returned as it is.

    Raises:
        ConfigurationError: for any other text.

    >>> resolve_scheme("w4a4").head
    LayerBits(weight=8, activation=8)
    >>> resolve_scheme("strict-w4a4").head
    LayerBits(weight=4, activation=4)
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, str) and (match := _AUTO.fullmatch(scheme)):
        average = float(match[1])
        if 2 <= average <= 8:
            bits = LayerBits(int(average), int(average))
            return replace(resolve_scheme(str(bits)), name=scheme, average_bits=average)
    kind, _, widths = scheme.rpartition("-") if isinstance(scheme, str) else ("", "", "")
    try:
        bits = parse_bits(widths)
        check_choice("scheme", kind, ("", "tensor", "strict", "finn"))
    except ConfigurationError:
        raise ConfigurationError(
            f"Unknown scheme {scheme!r}. Expected wXaY, tensor-wXaY, strict-wXaY, finn-wXaY or auto-B with 2 <= X, Y, "
            f"B <= 8, for example {', '.join(SCHEME_NAMES)}."
        ) from None
    outer = bits if kind == "strict" else LayerBits(8, 8)
    return Scheme(
        name=scheme, bits=bits, patch_embed=outer, head=outer, probability_bits=None if kind == "strict" else 8,
        input_scales="tensor" if kind else "channel", **(_FINN if kind == "finn" else {}),
    )
