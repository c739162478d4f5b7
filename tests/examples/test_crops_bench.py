"""The comparison of runs on photographs without labels."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from maskaq_brevitas import cli
from maskaq_brevitas.errors import InputError

BENCH = Path(__file__).parents[2] / "examples" / "benchmarks" / "crops.py"


def test_divergence_is_that_of_distributions(bench):
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 7, generator=generator).mul(3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=one), torch.distributions.Categorical(logits=other)
    )
    for row in range(5):
        models = (lambda images, row=row: one[row : row + 1], lambda images, row=row: other[row : row + 1])
        found, equal = bench.compared(models, torch.zeros(1, 3, 2, 2))
        assert found == pytest.approx(float(expected[row]), rel=1e-5)
        assert equal == 100 * float(one[row].argmax() == other[row].argmax())


@pytest.mark.heavy
def test_fewer_bits_are_further_away(bench, tmp_path, capsys):
    budget = "--images 4 --batch-size 4 --steps 1 --no-export --no-baselines --quiet".split()
    budget += ["--synthesis.align_weight", "0", "--eval-limit", "4"]  # no provisional calibration
    runs = []
    for scheme in ("w8a8", "w2a2"):
        runs.append(str(tmp_path / scheme))
        assert cli.main(["quantize", "digits_vit", "--scheme", scheme, *budget, "--out", runs[-1]]) == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(InputError, match="Expected photographs .* found none"):
        bench.photographs(str(photos))
    for number in range(3):
        pixels = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(number))
        pixels = torch.nn.functional.interpolate(pixels, (40, 50), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray(pixels.mul(255).to(torch.uint8).permute(1, 2, 0).numpy()).save(photos / f"{number}.png")
    capsys.readouterr()
    state = torch.get_rng_state()
    for arguments in ([], ["--folder", str(photos), "--crops", "2"]):
        assert bench.main([*runs, *arguments]) == 0
        fine, coarse = (
            float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))
        )
        assert fine < 0.05 and coarse > 5 * fine
    assert torch.equal(state, torch.get_rng_state())
