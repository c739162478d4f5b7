import json
import os
import random
import resource
import signal
import struct

import pytest
import torch
from safetensors.torch import save_file

from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import WriteError
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.files import save_json
from maskaq_brevitas.files import save_tensors
from maskaq_brevitas.files import whole_file
from maskaq_brevitas.files import write_whole

TENSORS = {
    "a": torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), "b": torch.arange(7), "c": torch.tensor(True),
    "d": torch.ones(3, dtype=torch.bfloat16),
}  # fmt: skip
CONTENT = {"seed": 0, "none": None, "nested": {"rate": 1e-3, "name": "ä", "list": [1, 2.5, "x"]}, "nan": float("inf")}


def write_tensors(path):
    save_tensors(path, TENSORS)


def write_json(path):
    save_json(path, CONTENT)


def same(found):
    if "a" not in found:
        return found == CONTENT
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


KINDS = pytest.mark.parametrize(
    ("write", "load"), ((write_tensors, load_tensors), (write_json, load_json)), ids=("tensors", "json")
)


@KINDS
def test_round_trip_and_equal_bytes(tmp_path, write, load):
    write(tmp_path / "file")
    write(tmp_path / "again")
    assert same(load(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "again").read_bytes()
    os.umask(mask := os.umask(0))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


@KINDS
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, write, load):
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    # The last byte of the JSON is a line end.
    for length in sorted({0, 1, 7, 8, 9, len(whole) - 2, *random.Random(0).sample(range(len(whole) - 1), 60)}):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=str(path)):
            load(path)


@KINDS
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(tmp_path, write, load):
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    refused = 0
    for bit in random.Random(1).sample(range(8 * len(whole)), 200):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            found = load(path)
        except DamagedFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # white space of JSON
            assert same(found), bit
    assert refused > 150


@pytest.mark.parametrize(
    "content",
    (
        struct.pack("<Q", 1 << 62) + b"{}",  # a header of exabytes
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}'.ljust(78),
        struct.pack("<Q", 2) + b"[]",
        b"PK\x03\x04 a zip archive, as torch.save writes it",
    ),
)
def test_bad_headers_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedFileError, match="file cannot be read"):
        load_tensors(tmp_path / "file")


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "file").write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match="file cannot be read"):
        load_json(tmp_path / "file")


def test_a_file_without_checksum_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "tensors")
    (tmp_path / "json").write_text("{}")
    for load in (load_tensors, load_json):
        with pytest.raises(DamagedFileError, match="checksum is missing"):
            load(tmp_path / load.__name__.removeprefix("load_"))


@pytest.mark.parametrize(
    ("like", "message"),
    (
        ({**TENSORS, "e": torch.ones(1)}, "lacks tensor e"),
        ({name: TENSORS[name] for name in "abc"}, "holds the unknown tensor d"),
        ({**TENSORS, "a": torch.ones(40, 7)}, r"a is \(40, 6\) F32, expected \(40, 7\) F32"),
        ({**TENSORS, "b": torch.arange(7.0)}, r"b is \(7,\) I64, expected \(7,\) F32"),
    ),
)
def test_other_tensors_than_expected_are_refused_unread(tmp_path, like, message):
    write_tensors(tmp_path / "file")
    with pytest.raises(DamagedFileError, match=message):
        load_tensors(tmp_path / "file", like)
    assert same(load_tensors(tmp_path / "file", TENSORS))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda aside: aside.write_text("old"))

    def fail(aside):
        aside.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    with pytest.raises(WriteError, match="file cannot be written: disk full"), whole_file(path) as aside:
        aside.write_bytes(b"half")
        raise OSError("disk full")
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "old"


@KINDS
def test_a_file_larger_than_the_system_allows(tmp_path, write, load):
    """The same refusal that a full disk gives, from a limit that any user may set."""
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(WriteError, match="file cannot be written.*Free space"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and same(load(path)) and os.listdir(tmp_path) == ["file"]


def test_json_is_readable_by_others(tmp_path):
    write_json(tmp_path / "file")
    content = json.loads((tmp_path / "file").read_text())
    assert len(content.pop("sha256")) == 64 and content == CONTENT
