"""Labelled data and accuracy, against numpy, and every message about bad data."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from maskaq_brevitas.errors import DataError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import MissingExtraError
from maskaq_brevitas.evaluation import digits_images
from maskaq_brevitas.evaluation import digits_split
from maskaq_brevitas.evaluation import evaluate
from maskaq_brevitas.evaluation import labelled_folder


class Lookup(nn.Module):
    """Gives the row of a table that the first pixel names; remembers the flags that it was called with."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout()
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        return self.table[images[:, 0, 0, 0].long()]


def numbered(labels):
    """A data set whose i-th image holds the number i."""
    return [(torch.full((3, 2, 2), float(index)), label) for index, label in enumerate(labels)]


def picture(path, size=(32, 32), seed=0):
    """Writes an RGB PNG of random pixels; gives them, (height x width x 3) uint8."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def table(folder, text):
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder


# ---- digits


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, train_labels = digits_images(train=True)
    test, test_labels = digits_images(train=False)
    assert train.shape == (1198, 3, 32, 32) and test.shape == (599, 3, 32, 32)
    for images in (train, test):
        assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    share = torch.bincount(test_labels) / (torch.bincount(test_labels) + torch.bincount(train_labels))
    assert torch.allclose(share, torch.full((10,), 1 / 3), atol=0.01)
    assert test_labels[:12].tolist() == [2, 3, 7, 0, 8, 4, 8, 4, 6, 5, 4, 9]  # the split that digits_vit was trained on


def test_digits_split_is_normalised_for_the_model(digits_vit):
    image, label = digits_split(False, digits_vit)[3]
    raw, labels = digits_images(train=False)
    np.testing.assert_allclose(image.numpy(), (raw[3].numpy() - 0.3) / 0.35, rtol=1e-5, atol=1e-6)
    assert image.shape == (3, 32, 32) and label == labels[3] and isinstance(label, int)


def test_digits_vit_reads_the_held_out_digits(digits_vit):
    result = evaluate(digits_vit, digits_split(False, digits_vit))
    assert result.top1 >= 97.0 and result.images == 599
    labels = digits_images(train=False)[1]
    assert result.top1 == pytest.approx(100 * np.mean(result.predictions.numpy() == labels.numpy()))


def test_digits_need_scikit_learn_and_the_right_size(monkeypatch, tiny_vit, digits_vit):
    tiny_vit.patch_embed.img_size = (64, 64)
    with pytest.raises(DataError, match=r"3 x 32 x 32 input for the digits, got one with input size \(3, 64, 64\)"):
        digits_split(True, tiny_vit)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'maskaq_brevitas[demo]'")):
        digits_split(True, digits_vit)


# ---- accuracy


def test_accuracy_equals_numpy():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(53, 12)).astype(np.float32), generator.integers(0, 12, 53)
    result = evaluate(Lookup(torch.from_numpy(logits)), numbered(labels.tolist()), batch_size=8)
    rank = (logits > logits[np.arange(53), labels][:, None]).sum(axis=1)
    assert result.top1 == pytest.approx(100 * np.mean(rank == 0))
    assert result.top5 == pytest.approx(100 * np.mean(rank < 5))
    assert result.images == 53
    np.testing.assert_array_equal(result.predictions.numpy(), logits.argmax(axis=1))


def test_fewer_than_five_classes():
    result = evaluate(Lookup(torch.eye(3)), numbered([0, 0, 2]))
    assert result.top1 == pytest.approx(200 / 3) and result.top5 == 100


def test_limit_takes_evenly_spaced_images():
    model = Lookup(torch.eye(10))
    assert evaluate(model, numbered(range(10)), limit=4).predictions.tolist() == [0, 2, 5, 7]
    assert evaluate(model, numbered(range(10)), limit=99).images == 10


def test_flags_and_random_state_are_put_back():
    model = Lookup(torch.eye(4)).train()
    model.dropout.eval()
    before = torch.get_rng_state()
    evaluate(model, numbered(range(4)), batch_size=3)
    assert model.calls == [(3, False, False), (1, False, False)]
    with pytest.raises(DataError):
        evaluate(model, numbered([0, 9]))
    assert model.training and not model.dropout.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluate_refuses_bad_input():
    model = Lookup(torch.eye(4))
    with pytest.raises(DataError, match=r"labels from 0 to 3, the classes of the model, got 4 in the data set"):
        evaluate(model, numbered([1, 4]))
    with pytest.raises(InputError, match="at least one image, got an empty one"):
        evaluate(model, [])
    with pytest.raises(InputError, match="batch_size of at least 1, got 0"):
        evaluate(model, numbered([0]), batch_size=0)
    with pytest.raises(InputError, match="limit of at least 1, got -1"):
        evaluate(model, numbered([0]), limit=-1)
    with pytest.raises(InputError, match=r"with a batch of 1, got \(1, 2, 2\)\. Evaluate a model with a classifier"):
        evaluate(Lookup(torch.zeros(4, 2, 2)), numbered([0]))


# ---- folders


def test_labels_csv_in_its_own_order(tmp_path, tiny_vit):
    first, second = picture(tmp_path / "b.png", seed=1), picture(tmp_path / "sub" / "a.png", seed=2)
    dataset = labelled_folder(table(tmp_path, "\ufefffile,label,note\nb.png,7,x\nsub/a.png, 0,y\n"), tiny_vit)
    assert len(dataset) == 2 and dataset.labels == [7, 0]
    for (image, _), pixels in zip((dataset[0], dataset[1]), (first, second), strict=True):
        expected = (pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.5  # nothing is resized: every image fits already
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)


def test_other_sizes_get_the_transform_of_timm(tmp_path, tiny_vit):
    pixels = picture(tmp_path / "a.png", size=(64, 40))
    picture(tmp_path / "b.png")
    table(tmp_path, "file,label\na.png,1\nb.png,2\n")
    image, label = labelled_folder(tmp_path, tiny_vit)[0]
    small = Image.fromarray(pixels).resize((51, 32), Image.Resampling.BICUBIC).crop((10, 0, 42, 32))
    assert image.shape == (3, 32, 32) and label == 1
    np.testing.assert_allclose(image.numpy(), (np.asarray(small).transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)
    expected = r"Expected images of 32 x 32 pixels .* got 64 x 40 in '.*a\.png'\. Leave resize out"
    with pytest.raises(DataError, match=expected):
        labelled_folder(tmp_path, tiny_vit, resize=False)


def test_resize_can_be_asked_for(tmp_path, tiny_vit):
    tiny_vit.pretrained_cfg["crop_pct"] = 0.5
    picture(tmp_path / "a.png")
    table(tmp_path, "file,label\na.png,1\n")
    plain, resized = labelled_folder(tmp_path, tiny_vit), labelled_folder(tmp_path, tiny_vit, resize=True)
    assert plain[0][0].shape == resized[0][0].shape == (3, 32, 32)
    assert not torch.allclose(plain[0][0], resized[0][0])


def test_grey_images_become_rgb(tmp_path, tiny_vit):
    Image.new("L", (32, 32), 255).save(tmp_path / "a.png")
    assert torch.equal(labelled_folder(table(tmp_path, "file,label\na.png,1\n"), tiny_vit)[0][0], torch.ones(3, 32, 32))


def test_a_model_of_other_channels_needs_a_dataset(tmp_path):
    picture(tmp_path / "a.png")
    table(tmp_path, "file,label\na.png,1\n")
    model = VisionTransformer(img_size=32, patch_size=8, in_chans=5, embed_dim=16, depth=1, num_heads=2, num_classes=4)
    with pytest.raises(DataError, match=r"got VisionTransformer with 5 channels, .* Give evaluate\(\) a Dataset"):
        labelled_folder(tmp_path, model)


def test_class_folders_in_natural_order(tmp_path, tiny_vit):
    for number in range(11):
        picture(tmp_path / f"class_{number}" / "a.png", seed=number)
    dataset = labelled_folder(tmp_path, tiny_vit, num_classes=11)
    assert dataset.labels == list(range(11))  # class_10 comes after class_9
    with pytest.raises(DataError, match=r"Expected 10 sub-folders in .*, got 11\. Write a 'labels\.csv'"):
        labelled_folder(tmp_path, tiny_vit)
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match="got images without a label"):
        labelled_folder(tmp_path, tiny_vit, num_classes=12)


@pytest.mark.parametrize("text, message", [
    ("a.png,1\n", r"Expected the columns 'file,label' in the first line of '.*labels\.csv', got \['a\.png', '1'\]"),
    ("", r"Expected the columns .* got None"),
    ("file,label\n", r"Expected at least one image in '.*labels\.csv', got none"),
    ("file,label\na.png\n", r"with an integer label in line 2 of '.*', got 'a\.png,'"),
    ("file,label\na.png,1\na.png,cat\n", r"with an integer label in line 3 of '.*', got 'a\.png,cat'"),
    ('file,label\n"a.png,1\n', r"Expected a UTF-8 table 'file,label', cannot read '.*labels\.csv'"),
    ("file,label\na.png,10\n", r"Expected labels from 0 to 9, .* got 10 in line 2 of '.*labels\.csv'"),
    ("file,label\na.png,-1\n", r"Expected labels from 0 to 9, .* got -1 in line 2"),
    ("file,label\nb.png,1\n", r"Expected the image 'b\.png' named in line 2 of .*, found no such file"),
    ("file,label\n../a.png,1\n", r"Expected a file inside the folder in line 2 of .*, got '\.\./a\.png'"),
    ("file,label\n/etc/hosts,1\n", r"Expected a file inside the folder .* got '/etc/hosts'"),
    ("file,label\nsub\\..\\..\\a.png,1\n", r"Expected a file inside the folder"),
])
def test_malformed_labels(tmp_path, tiny_vit, text, message):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        labelled_folder(table(tmp_path, text), tiny_vit)


def test_labels_that_are_not_text(tmp_path, tiny_vit):
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"Expected a UTF-8 table 'file,label', cannot read"):
        labelled_folder(tmp_path, tiny_vit)


def test_folder_missing_or_empty(tmp_path, tiny_vit):
    with pytest.raises(DataError, match=r"Expected a folder of labelled images, found none at '.*absent'"):
        labelled_folder(tmp_path / "absent", tiny_vit)
    with pytest.raises(DataError, match=r"Expected labels in .* got no images"):
        labelled_folder(tmp_path, tiny_vit)


def test_broken_images(tmp_path, tiny_vit):
    table(tmp_path, "file,label\na.png,1\n")
    (tmp_path / "a.png").write_bytes(b"this is not an image")
    with pytest.raises(DataError, match=r"Expected an image, cannot decode '.*a\.png'.*Remove the file and its label"):
        labelled_folder(tmp_path, tiny_vit)
    # A whole header before missing pixels is only found out when the image is read.
    (tmp_path / "a.png").unlink()
    table(tmp_path, "file,label\na.jpg,1\n")
    Image.effect_noise((32, 32), 90).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:len(content) * 3 // 4])
    dataset = labelled_folder(tmp_path, tiny_vit)
    with pytest.raises(DataError, match=r"cannot decode '.*a\.jpg'"):
        evaluate(tiny_vit, dataset)
