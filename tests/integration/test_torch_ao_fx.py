"""int8 models of torch.ao and torchao come out of synthetic batches; what is not installed is said in the table."""

import importlib.util
import sys

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset

from integration.torch_ao_fx import flows
from integration.torch_ao_fx.__main__ import main
from integration.torch_ao_fx.__main__ import milliseconds
from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import load_model
from maskaq_brevitas.errors import MissingExtraError

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def loader(count=8):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.zeros(count, dtype=torch.long)), batch_size=4)


def has_fx():
    try:
        flows._fx_package()
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def calib_loader():
    return DataFreeCalibrator(
        load_model("digits_vit"), scheme="w8a8", num_images=8, held_back=0, batch_size=4, steps=2, progress=False
    )


@pytest.mark.skipif(not has_fx(), reason="this torch has no FX graph mode quantization any more")
@pytest.mark.parametrize("make", (flows.fx_int8, flows.fx_qat_int8))
def test_fx_model_has_int8_weights_and_agrees(digits_vit, calib_loader, make):
    engine = torch.backends.quantized.engine
    before = {name: value.clone() for name, value in digits_vit.state_dict().items()}
    int8 = make(digits_vit, calib_loader)
    assert torch.backends.quantized.engine == engine and not digits_vit.training
    assert all(torch.equal(value, before[name]) for name, value in digits_vit.state_dict().items())
    assert int8.get_submodule("blocks.0.mlp.fc1").weight().dtype == torch.qint8
    images = calib_loader.pool.images()
    with torch.no_grad():
        expected, found = digits_vit(images), int8(images)
    assert not torch.equal(expected, found)
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() >= 0.75


@pytest.mark.skipif(not HAS_TORCHAO, reason="the extra pt2e is not installed")
def test_pt2e_reference_takes_any_batch(tiny_vit):
    reference = flows.pt2e_int8(tiny_vit, loader())
    images = next(iter(loader()))[0]
    targets = [str(node.target) for node in reference.function[0].graph.nodes]
    assert sum("dequantize_per_channel" in target for target in targets) == 10  # the weights of 9 Linear and a Conv2d
    with torch.no_grad():
        expected = tiny_vit(images)
        for count in (1, 3, 4):
            found = reference(images[:count])
            assert found.shape == (count, 10) and not torch.equal(found, expected[:count])
            torch.testing.assert_close(found, expected[:count], rtol=0, atol=0.2)


@pytest.mark.skipif(not HAS_TORCHAO, reason="the extra pt2e is not installed")
@pytest.mark.parametrize(("has_vnni", "highest"), ((True, 255), (False, 127)))
def test_activations_take_a_bit_less_where_int8_kernels_would_overflow(tiny_vit, monkeypatch, has_vnni, highest):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    reference = flows.pt2e_int8(tiny_vit, loader())
    nodes = [node for node in reference.function[0].graph.nodes if "quantize_per_tensor.default" in str(node.target)]
    assert nodes and {node.args[4] for node in nodes} == {highest}


def test_missing_torchao_and_broken_compiler_are_said_in_the_table(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskaq_brevitas\[pt2e\]'"):
        flows.pt2e_package()

    def broken(*_arguments, **_options):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    main(["--images", "4", "--steps", "1", "--eval-limit", "20"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    table = {(line[:15].strip(), line[17:33].strip()): line[33:].split() for line in lines[2:-5]}
    assert table["float, eager", ""][2] == "1.00"
    accuracy, _, speed = table["FX static", "synthetic images"]
    assert float(accuracy) > 60 and float(speed) > 0
    assert len(table["FX static", "real images"]) == 1
    assert table["PT2E reference", "real images"] == table["float, compiled", ""] == ["failed"]
    said = [line for line in lines if line.startswith("failed: ")]
    assert len(said) == 4 and sum("maskaq_brevitas[pt2e]" in line for line in said) == 3
    assert said[-1] == "failed: float, compiled: RuntimeError: no C++ compiler"


def test_fx_is_looked_for_where_it_may_be(monkeypatch):
    monkeypatch.setattr(flows, "_FX_HOMES", ("torch.nowhere", "torch.ao.quantization"))
    if has_fx():
        assert flows._fx_package()[1].__name__ == "torch.ao.quantization.quantize_fx"
    monkeypatch.setattr(flows, "_FX_HOMES", ("torch.nowhere",))
    with pytest.raises(ImportError, match="No FX graph mode quantization: No module named 'torch.nowhere'. Use PT2E"):
        flows._fx_package()


def test_milliseconds_take_turns():
    calls = []

    class Model(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)

    found = milliseconds({name: Model(name) for name in ("a", "b")}, torch.zeros(2), repeats=3)
    assert calls == ["a", "b"] * 5 and found.keys() == {"a", "b"} and min(found.values()) >= 0
