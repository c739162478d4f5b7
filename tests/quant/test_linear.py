"""Linear layers whose input has four axes: Brevitas' algorithms do to them what they do to a list of tokens."""

import copy

import pytest
import torch
from borrowed import hooks
from brevitas.graph.calibrate import calibration_mode
from brevitas.nn import QuantLinear
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_bias_correction
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gpfq
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_qronos
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate
from torch import nn

from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.quant.linear import ChannelScaledLinear
from maskaq_brevitas.quant.linear import TokenLinear
from maskaq_brevitas.quant.schemes import activation_quantizer
from maskaq_brevitas.quant.schemes import weight_quantizer
from maskaq_brevitas.quant.swap import swap_layers

ALGORITHMS = {
    "gptq": lambda model, loader: apply_gptq(loader, model, create_weight_orig=True),
    "gpfq": lambda model, loader: apply_gpfq(loader, model, act_order=False),
    "qronos": lambda model, loader: apply_qronos(model, loader),
    "bias correction": lambda model, loader: apply_bias_correction(loader, model),
}
SCHEME = resolve_scheme("w3a8")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind, inputs, outputs):
    """A quantized layer with fixed weights."""
    channels = inputs if kind is ChannelScaledLinear else None
    found = kind(
        inputs, outputs, bias=True, weight_quant=weight_quantizer(3, SCHEME), bias_quant=None,
        input_quant=activation_quantizer("signed", 8, SCHEME, channels), return_quant_tensor=False,
    )  # fmt: skip
    found.weight.data.copy_(draw(outputs, inputs, seed=outputs))
    found.bias.data.zero_()
    return found


class Merging(nn.Module):
    """Two layers on a grid of tokens (batch x height x width x channels), as Swin has them between its stages."""

    def __init__(self, kind, as_list):
        super().__init__()
        self.first, self.second, self.as_list = layer(kind, 8, 12), layer(kind, 12, 6), as_list

    def forward(self, x):
        shape = x.shape
        x = x.flatten(1, 2) if self.as_list else x
        return self.second(self.first(x).relu()).reshape(*shape[:-1], 6)


def calibrated(kind, as_list, loader):
    model = Merging(kind, as_list).eval()
    with torch.no_grad():
        with calibration_mode(model):
            for images, _ in loader:
                model(images)
        model(loader[0][0])
    return model


@pytest.mark.parametrize("kind", (TokenLinear, ChannelScaledLinear))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_grid_is_a_list_of_tokens(kind, algorithm):
    loader = [(draw(4, 3, 5, 8, seed=seed), torch.zeros(4)) for seed in range(3)]
    # The reference has three axes all along, and Brevitas' own layer where that takes the quantizer without a warning.
    expected = calibrated(QuantLinear if kind is TokenLinear else kind, True, loader)
    found = calibrated(kind, False, loader)
    before = copy.deepcopy(found.state_dict())
    with torch.no_grad():
        assert torch.equal(found(loader[0][0]), expected(loader[0][0]))
    for model in (expected, found):
        ALGORITHMS[algorithm](model, loader)
    changed = "bias" if algorithm == "bias correction" else "weight"
    for name in ("first", "second"):
        assert torch.equal(getattr(found, name).weight, getattr(expected, name).weight)
        assert torch.equal(getattr(found, name).bias, getattr(expected, name).bias)
        assert not torch.equal(before[f"{name}.{changed}"], getattr(getattr(found, name), changed))
    with torch.no_grad():
        output = found(loader[0][0])
        assert output.shape == (4, 3, 5, 6) and torch.equal(output, expected(loader[0][0]))
    assert hooks(found) == 0


@pytest.mark.parametrize("shape", ((4, 8), (4, 15, 8), (4, 3, 5, 8), (2, 2, 3, 5, 8)))
def test_any_number_of_axes(shape):
    one, other = layer(TokenLinear, 8, 12).eval(), layer(QuantLinear, 8, 12).eval()
    seen = []
    one.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].ndim, output.ndim)))
    x = draw(*shape)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
    assert seen == [(min(len(shape), 3),) * 2]
    assert list(one.state_dict()) == list(other.state_dict())


class OnGrid(nn.Module):
    """A layer in a ViT that sees its tokens with one axis more."""

    def __init__(self, width):
        super().__init__()
        self.reduction = nn.Linear(width, width)

    def forward(self, x):
        return x + self.reduction(x[:, None])[:, 0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_swap_puts_such_layers_in(tiny_vit, algorithm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_vit.norm_pre = OnGrid(64).eval()
    quant_model, _ = swap_layers(tiny_vit, "w4a8")
    loader = [(draw(4, 3, 32, 32, seed=seed), torch.zeros(4)) for seed in range(2)]
    calibrate(loader, quant_model)
    with torch.no_grad():
        quant_model(loader[0][0])
    before = copy.deepcopy(quant_model.state_dict())
    ALGORITHMS[algorithm](quant_model, loader)
    changed = "bias" if algorithm == "bias correction" else "weight"
    for name, module in quant_model.named_modules():
        if isinstance(module, QuantLinear):
            assert not torch.equal(before[f"{name}.{changed}"], getattr(module, changed)), name
    with torch.no_grad():
        expected = tiny_vit(loader[0][0])
        assert (quant_model(loader[0][0]) - expected).norm() < 0.5 * expected.norm()
