import json

import pytest
import torch
from torch import nn

from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.run_directory import installed_versions

IDENTITY = {"seed": 0, "scheme": {"name": "w4a4", "bits": [4, 4]}, "overrides": None}


def listing(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_new_run(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b", IDENTITY)
    assert RunDirectory.read_identity(run.path) == IDENTITY
    assert list(listing(run.path)) == ["run.json"]


@pytest.mark.parametrize("mode", ("new", "resume", "overwrite"))
def test_an_empty_folder_is_taken(tmp_path, mode):
    RunDirectory(tmp_path, IDENTITY, mode)
    assert RunDirectory.read_identity(tmp_path) == IDENTITY


def test_unknown_mode_writes_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match="run_mode: expected one of new, resume, overwrite, got 'resum'"):
        RunDirectory(tmp_path / "run", IDENTITY, "resum")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ("new", "resume", "overwrite"))
def test_foreign_files_are_left_alone(tmp_path, mode):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="holds no run of this package"):
        RunDirectory(tmp_path, IDENTITY, mode)
    assert listing(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("mode", ("new", "resume", "overwrite"))
def test_a_file_in_the_way(tmp_path, mode):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunDirectoryError, match="is a file; expected a directory"):
        RunDirectory(tmp_path / "run", IDENTITY, mode)


def test_a_run_is_refused_unless_said(tmp_path):
    RunDirectory(tmp_path, IDENTITY).write_json("report.json", {"x": 1})
    before = listing(tmp_path)
    with pytest.raises(RunDirectoryError, match="Continue it with --resume, replace it with --overwrite"):
        RunDirectory(tmp_path, IDENTITY)
    assert listing(tmp_path) == before


def test_resume_keeps_the_files(tmp_path):
    RunDirectory(tmp_path, IDENTITY).write_json("report.json", {"x": 1})
    before = listing(tmp_path)
    assert RunDirectory(tmp_path, IDENTITY, "resume").read_json("report.json") == {"x": 1}
    assert listing(tmp_path) == before


def test_resume_of_another_run_names_every_differing_key(tmp_path):
    RunDirectory(tmp_path, IDENTITY)
    other = {"seed": 1, "scheme": {"name": "w4a4", "bits": [4, 8]}, "overrides": None, "extra": True}
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory(tmp_path, other, "resume")
    message = str(error.value)
    for part in ("seed: 0 -> 1", "scheme.bits: [4, 4] -> [4, 8]", "extra: None -> True"):
        assert part in message
    assert "name" not in message and "overrides" not in message
    assert RunDirectory.read_identity(tmp_path) == IDENTITY


def test_tuples_compare_like_the_lists_of_json(tmp_path):
    RunDirectory(tmp_path, {"size": (3, 4)})
    RunDirectory(tmp_path, {"size": (3, 4)}, "resume")


def test_overwrite_removes_the_earlier_run(tmp_path):
    run = RunDirectory(tmp_path, IDENTITY)
    run.write_json("state/x.json", {"x": 1})
    RunDirectory(tmp_path, {"seed": 2}, "overwrite")
    assert list(listing(tmp_path)) == ["run.json"] and RunDirectory.read_identity(tmp_path) == {"seed": 2}


@pytest.mark.parametrize("text", ("{", "[]", '{"format": 1}', ""))
def test_damaged_manifest(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for mode in ("new", "resume"):
        with pytest.raises(RunDirectoryError, match="run.json (is damaged|cannot be read)"):
            RunDirectory(tmp_path, IDENTITY, mode)
    assert listing(tmp_path) == {"run.json": text.encode()}


def test_overwrite_leaves_what_no_run_writes(tmp_path):
    run = RunDirectory(tmp_path, IDENTITY)
    run.write_json("state/tuning.json", {})
    for name in ("notes.txt", "report.json", "model.onnx.partial", "plots/a.png"):
        run.file(name).write_text("x")
    RunDirectory(tmp_path, IDENTITY, "overwrite")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["notes.txt", "plots/a.png", "run.json"]


def test_no_run_to_read(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run: expected a file run.json"):
        RunDirectory.read_identity(tmp_path)


def test_tensors_round_trip(tmp_path):
    run = RunDirectory(tmp_path, IDENTITY)
    base = torch.randn(4, 6)
    tensors = {"part": base[:, ::2], "shared": base, "same": base, "scalar": torch.tensor(3)}
    run.write_tensors("state/t.safetensors", tensors)
    assert run.has("state/t.safetensors") and not run.has("state/other")
    found = run.read_tensors("state/t.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    run.remove("state/t.safetensors", "state/never-there")
    assert not run.has("state/t.safetensors")


@pytest.mark.parametrize("read", ("read_tensors", "read_json"))
def test_damaged_or_missing_file(tmp_path, read):
    run = RunDirectory(tmp_path, IDENTITY)
    with pytest.raises(RunDirectoryError, match="file cannot be read"):
        getattr(run, read)("file")
    (tmp_path / "file").write_bytes(b"\x10{")
    with pytest.raises(RunDirectoryError, match="file cannot be read"):
        getattr(run, read)("file")


@pytest.mark.parametrize("name", ("../other.json", "/etc/hosts", "state/../../x"))
def test_a_name_that_leads_out_of_the_run_is_refused(tmp_path, name):
    run = RunDirectory(tmp_path / "run", IDENTITY)
    for call in (run.file, run.has, run.read_json, run.read_tensors, run.remove, lambda name: run.write_json(name, {})):
        with pytest.raises(RunDirectoryError, match="leads out of it"):
            call(name)
    assert list(listing(tmp_path)) == ["run/run.json"]


def test_fingerprint_sees_value_name_shape_and_dtype():
    def of(**tensors):
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return fingerprint(model)

    value = torch.arange(6.0)
    prints = [
        of(a=value),
        of(b=value),
        of(a=value.view(2, 3)),
        of(a=value.int()),
        of(a=value + 1),
        of(a=value, c=value),
    ]
    assert len(set(prints)) == len(prints)
    assert of(a=value.view(2, 3).T) == of(a=value.view(2, 3).T.contiguous())
    assert of(c=value, a=value) == of(a=value, c=value)
    assert len(of(a=torch.tensor(True))) == 64


def test_versions_are_plain():
    versions = json.loads(json.dumps(installed_versions()))
    assert versions["torch"] == torch.__version__.partition("+")[0] and {
        "python",
        "timm",
        "brevitas",
        "maskaq_brevitas",
    } <= set(versions)
