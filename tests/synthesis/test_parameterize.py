import numpy as np
import pytest
import torch

from maskaq_brevitas.synthesis.parameterize import PixelParameter
from maskaq_brevitas.synthesis.parameterize import SpectrumParameter

LOW, HIGH = torch.tensor([-2.0, -1.0, -1.5]).view(3, 1, 1), torch.tensor([2.0, 1.0, 2.5]).view(3, 1, 1)


def images_inside(batch=2, seed=0):
    share = torch.rand(batch, 3, 8, 6, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05
    return LOW + (HIGH - LOW) * share


@pytest.mark.parametrize("kind", (PixelParameter, SpectrumParameter))
def test_round_trip_and_range(kind):
    images = images_inside()
    parameter = kind(images, LOW, HIGH)
    torch.testing.assert_close(parameter.images().detach(), images, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        parameter.value.add_(torch.randn(parameter.value.shape, generator=torch.Generator().manual_seed(1)) * 50)
    parameter.settle()
    moved = parameter.images()
    assert not torch.equal(moved, images)
    assert (moved >= LOW).all() and (moved <= HIGH).all()
    (gradient,) = torch.autograd.grad(moved.sum(), parameter.value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", (PixelParameter, SpectrumParameter))
def test_put_changes_only_the_chosen_images(kind):
    parameter = kind(images_inside(), LOW, HIGH)
    before = parameter.images().detach().clone()
    fresh = images_inside(1, seed=5)
    parameter.put(torch.tensor([False, True]), fresh)
    after = parameter.images().detach()
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], fresh, rtol=1e-4, atol=1e-4)


def test_a_step_in_the_spectrum_is_larger_at_low_frequencies():
    grey = LOW + (HIGH - LOW) * 0.5 * torch.ones(1, 3, 32, 32)
    parameter = SpectrumParameter(grey, LOW, HIGH)
    with torch.no_grad():
        parameter.value.copy_(torch.randn(parameter.value.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    plane = (parameter.images().detach() - grey)[0].mean(dim=0).double().numpy()
    power = np.abs(np.fft.fft2(plane)) ** 2
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None])
    near, far = power[(frequency > 0.05) & (frequency < 0.1)].mean(), power[frequency > 0.4].mean()
    assert near > 10 * far
