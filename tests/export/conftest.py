import pytest
from small_quant_vit import build_quant_vit
from small_quant_vit import random_images
from torch import Tensor
from torch import nn


@pytest.fixture(scope="session")
def quant_vit() -> nn.Module:
    """W4A8, 2 blocks, 10 classes, 3 x 32 x 32; shared by all tests, none of which may change it."""
    return build_quant_vit()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return random_images(3)


@pytest.fixture(scope="session")
def exported(quant_vit: nn.Module, tmp_path_factory: pytest.TempPathFactory):
    from maskaq_brevitas.export import export_qonnx

    return export_qonnx(quant_vit, tmp_path_factory.mktemp("export") / "vit.onnx", input_shape=(3, 32, 32))
