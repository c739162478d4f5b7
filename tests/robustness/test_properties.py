"""What holds for whatever hypothesis thinks of: geometry, masks, schemes, configurations, files from outside."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from small_run import small_vit

from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import from_mapping
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import DataError
from maskaq_brevitas.errors import MaskAQError
from maskaq_brevitas.evaluation import labelled_folder
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.files import save_json
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.options import parse
from maskaq_brevitas.options import read_saved
from maskaq_brevitas.quant.swap import plan_bits
from maskaq_brevitas.synthesis.masks import drop_at_random
from maskaq_brevitas.synthesis.masks import informative_mask
from maskaq_brevitas.synthesis.memory import parts
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.synthesis.pool import balanced_labels

# The same examples on every machine; time limits would depend on its load.
FIXED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
SEED = st.integers(0, 2**31)
LINES = st.text(st.characters(codec="utf-8"), max_size=30)
WORDS = st.sampled_from(("search", "w4a4", "none", ""))
VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS | LINES


@FIXED
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), SEED)
def test_geometry(channels, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(2, channels, generator=generator)
    geometry = Geometry(
        (channels, height, width), (1, 1), 0, False, 3, tuple(draw[0].tolist()), tuple((draw[1] + 0.05).tolist())
    )
    pixels = torch.rand(2, channels, height, width, generator=generator)
    images = geometry.normalize(pixels)
    assert torch.allclose(geometry.denormalize(images), pixels, atol=1e-5)
    low, high = geometry.bounds(images)
    assert (images >= low - 1e-5).all() and (images <= high + 1e-5).all()
    pool = SyntheticImages(2, geometry)
    informative = torch.ones(2, 1, dtype=torch.bool)
    pool.put(torch.arange(2), images, torch.zeros(2, dtype=torch.long), informative)
    assert (pool.images() - images).abs().max() <= 0.51 / 255 / min(geometry.std)  # half a grey level


@FIXED
@given(st.integers(1, 40), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_max=True), SEED)
def test_masks(patches, share, dropped, seed):
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(3, patches, generator=generator)
    mask = informative_mask(received, share)
    assert mask.sum(dim=-1).tolist() == [max(1, round(share * patches))] * 3
    for row, chosen in zip(received, mask, strict=True):
        assert chosen.all() or row[chosen].min() >= row[~chosen].max()
    kept = drop_at_random(mask, dropped, torch.rand(3, patches, generator=generator))
    assert kept.any(dim=-1).all() and not (kept & ~mask).any()


@FIXED
@given(st.integers(1, 500), st.integers(1, 60))
def test_parts_cover_everything_once(count, most):
    found = parts(count, most)
    assert [index for part in found for index in range(count)[part]] == list(range(count))
    assert max(part.stop - part.start for part in found) <= most


@FIXED
@given(st.integers(1, 100), st.integers(0, 30), SEED)
def test_labels_are_balanced(count, classes, seed):
    labels = balanced_labels(count, classes, torch.Generator().manual_seed(seed))
    counts = torch.bincount(labels, minlength=max(1, classes))
    assert len(labels) == count and counts.max() - counts.min() <= 1


@FIXED
@given(st.integers(-1, 10), st.integers(-1, 10), st.sampled_from(("", "strict-", "tensor-", "finn-", "wide-")))
def test_schemes(weight, activation, kind):
    text = f"{kind}w{weight}a{activation}"
    if kind != "wide-" and 2 <= weight <= 8 and 2 <= activation <= 8:
        scheme = resolve_scheme(text)
        assert (scheme.name, scheme.bits.weight, scheme.bits.activation) == (text, weight, activation)
        assert from_mapping(Scheme, to_mapping(scheme)) == scheme
    else:
        with pytest.raises(ConfigurationError, match="Unknown scheme"):
            resolve_scheme(text)


@FIXED
@given(st.one_of(LINES, VALUES))
def test_other_schemes_are_refused(text):
    try:
        scheme = resolve_scheme(text)
    except ConfigurationError:
        return
    assert scheme.name == text


@FIXED
@given(st.dictionaries(LINES, st.sampled_from(("w4a4", "w2a8", "w9a9", "", "x")), max_size=3))
def test_overrides(overrides):
    """Known layers get known widths, or the pattern or the width is refused."""
    try:
        plan = plan_bits(small_vit(), resolve_scheme("w4a4"), overrides)
    except ConfigurationError as error:
        assert any(repr(pattern) in str(error) or text in str(error) for pattern, text in overrides.items())
    else:
        assert all(2 <= bits.weight <= 8 and 2 <= bits.activation <= 8 for bits in plan.values())


@pytest.mark.parametrize("cls", (Scheme, SynthesisConfig, DistillConfig, ReconstructConfig))
def test_configurations(cls):
    names = [entry.name for entry in dataclasses.fields(cls)]

    @FIXED
    @given(st.dictionaries(st.one_of(st.sampled_from(names), LINES), VALUES, max_size=3))
    def check(values):
        try:
            config = from_mapping(cls, values)
        except ConfigurationError:
            return
        assert from_mapping(cls, to_mapping(config)) == config

    check()


@FIXED
@given(
    st.lists(
        st.sampled_from(
            ("--scheme", "w4a4", "--images", "--steps", "0", "7", "-1", "nan", "--tune", "distill", "--epochs",
             "--seed", "--synthesis.kept_tokens", "0.5", "--no-baselines", "--tuning.precision", "bfloat16",
             "--nonsense", "")
        ),
        max_size=6,
    )
)  # fmt: skip
def test_command_lines(words):
    try:
        parse("quantize", ["digits_vit", "--out", "somewhere", *words])
    except (MaskAQError, SystemExit):
        pass


CELLS = st.sampled_from(
    ("file", "label", "a.png", "b.png", "../a.png", "/etc/passwd", "C:\\x", "0", "3", "4", "-1", "1e3", '"', "", "ä",
     "\x00", "<script>", "$(reboot)", "; rm -rf /")
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(path / name)
    return path


@FIXED
@given(
    rows=st.lists(st.lists(CELLS, max_size=3), max_size=4),
    header=st.sampled_from(("file,label", "label,file", "x", "")),
)
def test_label_files(rows, header, folder):
    text = "\n".join([header, *(",".join(row) for row in rows)])
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    try:
        data = labelled_folder(folder, small_vit())
    except DataError:
        return
    for path, label in zip(data.files, data.labels, strict=True):
        assert path.resolve().parent == folder.resolve() and 0 <= label < 4


@FIXED
@given(st.binary(max_size=200))
def test_files_of_any_content(content):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        path.write_bytes(content)
        for load in (load_json, load_tensors):
            with pytest.raises(DamagedFileError):
                load(path)
        with pytest.raises(ConfigurationError):
            read_saved(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | LINES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LINES, inner, max_size=3),
    max_leaves=8,
)


@FIXED
@given(st.dictionaries(LINES.filter(lambda key: key != "sha256"), JSON, max_size=4))
def test_json_comes_back(content):
    with tempfile.TemporaryDirectory() as name:
        save_json(Path(name) / "file", content)
        assert load_json(Path(name) / "file") == content
