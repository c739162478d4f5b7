"""What a model gives, as exports and their checks see it."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export.outputs import check_outputs
from maskaq_brevitas.export.outputs import joined
from maskaq_brevitas.export.outputs import output_tensors

ONE, TWO = torch.arange(6.0).view(2, 3), torch.arange(16.0).view(2, 2, 2, 2)


@pytest.mark.parametrize(
    ("value", "count"),
    ((ONE, 1), ([ONE, TWO], 2), ((ONE,), 1), (OrderedDict(out=ONE, loss=None, aux=TWO), 2),
     ([], None), ([{"boxes": ONE}], None), ([ONE, None], None), ("text", None), ({"loss": None}, None)),
)  # fmt: skip
def test_tensors_of_an_output(value, count):
    found = output_tensors(value)
    assert found is None if count is None else len(found) == count and found[0] is ONE


def test_several_are_joined_image_by_image():
    assert joined([TWO]) is TWO
    assert joined([ONE, TWO]).tolist() == [[0, 1, 2, *range(8)], [3, 4, 5, *range(8, 16)]]


class Gives(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "message"),
    (
        (
            lambda images: [{"boxes": images}],
            "Gives cannot be exported: it gives list of dict, .*Export the part in front",
        ),
        (lambda images: images.mean(), r"it gives Tensor \(\), "),
        (lambda images: torch.zeros(7, 4), r"it gives Tensor \(7, 4\), "),
        (lambda images: {"loss": None}, "it gives dict"),
    ),
)
def test_other_outputs_are_refused(answer, message):
    with pytest.raises(ExportError, match=message):
        check_outputs(Gives(answer), torch.zeros(2, 3, 4, 4))


def test_maps_pass_and_a_model_that_fails_is_left_to_the_exporter():
    check_outputs(Gives(lambda images: [images, images[:, 0]]), torch.zeros(2, 3, 4, 4))
    check_outputs(Gives(lambda images: images @ 1), torch.zeros(2, 3, 4, 4))
