"""The console script, in process: main job, bad input, round trips, interruption."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image

from maskaq_brevitas import cli
from maskaq_brevitas.commands import quantizing
from maskaq_brevitas.commands.common import load_run
from maskaq_brevitas.config import EFFORTS
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.export import FORMATS
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import save_json
from maskaq_brevitas.models.swin import SWIN
from maskaq_brevitas.options import parse
from maskaq_brevitas.options import read_saved
from maskaq_brevitas.options import to_yaml
from maskaq_brevitas.support import small_model
from maskaq_brevitas.synthesis import maker

TINY = ["--images", "4", "--batch-size", "4", "--steps", "2", "--eval-limit", "20", "--quiet"]
SHORT = [*TINY, "--no-export", "--no-baselines"]


def quantize(out, *more, budget=SHORT):
    return cli.main(["quantize", "digits_vit", "--scheme", "w4a4", *budget, "--out", str(out), *more])


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A finished run without export and baselines."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert quantize(out) == 0
    return out


def _files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_automatic_batch_size_is_saved_as_a_number(tmp_path):
    out = tmp_path / "run"
    assert quantize(out, "--batch-size", "auto", "--eval-limit", "1") == 0
    assert parse("quantize", ["--config", str(out / "config.yaml")]).batch_size == 16
    assert '"batch_size": 16' in (out / "run.json").read_text()


def assert_equal_on_all(run, file, count, capsys):
    """``maskaq evaluate`` finds the top-1 of a file equal to that of the run's model on each of the images."""
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--eval-limit", str(count), "--quiet", "--onnx", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    accuracy = {line.split("  ")[0]: line.split()[-2:] for line in lines if line.endswith(f" {count}")}
    assert accuracy["ONNX file"] == accuracy["quantized"]
    assert lines[-1] == f"ONNX file and quantized model: equal top-1 on {count} of {count} images"


@pytest.mark.heavy
def test_the_main_job(tmp_path, capsys):
    out = tmp_path / "run"
    assert quantize(out, budget=TINY) == 0
    assert _files(out) == [
        "config.yaml", "held_back.safetensors", "images.png", "images.safetensors", "model.card.json",
        "model.onnx", "quant_model.safetensors", "report.json", "report.md", "run.json",
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert printed.err == ""
    names = ["float", "calibrated on Gaussian noise", "calibrated on synthetic images",
             "calibrated on real training images"]  # fmt: skip
    for name in [*names, "size", "QONNX check"]:
        assert f"\n{name} " in printed.out
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["accuracy"]] == names
    assert [row["calibration_images"] for row in report["accuracy"]] == [None, 4, 4, 4]
    assert report["accuracy"][0]["top1"] >= 90 and {row["images"] for row in report["accuracy"]} == {20}
    assert report["qonnx"]["passed"] and report["qonnx"]["top1_agreement"] == 1
    card = json.loads((out / "model.card.json").read_text())
    assert report["card"] == card and card["macs"] == report["cost"]["macs"] and card["bops"] == report["cost"]["bops"]
    assert "## QONNX model card" in (out / "report.md").read_text()

    assert_equal_on_all(out, out / "model.onnx", 10, capsys)  # made for one image, which the batch is cut into

    (out / "model.onnx").unlink()
    assert cli.main(["export", str(out), "--batch", "dynamic"]) == 0
    assert "passed: executed on 8 images" in capsys.readouterr().out
    assert_equal_on_all(out, out / "model.onnx", 10, capsys)


def test_an_effort_sets_defaults_and_what_is_said_still_counts(tmp_path):
    best = EFFORTS["best"]
    options = parse("quantize", ["digits_vit", "--effort", "best", "--steps", "7", "--tuning.drawn_images", "3"])
    assert (options.images, options.steps, options.tune, options.epochs) == (
        best.num_images,
        7,
        "distill",
        best.tuning.epochs,
    )
    assert vars(options)["tuning.drawn_images"] == 3
    assert vars(options)["tuning.feature_weight"] == best.tuning.feature_weight > 0
    assert vars(options)["synthesis.kept_tokens"] == best.synthesis.kept_tokens < 1
    assert vars(options)["synthesis.precision"] == vars(options)["tuning.precision"] == "auto"
    (tmp_path / "saved.yaml").write_text(to_yaml(options))
    again = parse("quantize", ["--config", str(tmp_path / "saved.yaml")])
    assert {**vars(again), "config": None} == {**vars(options), "config": None}
    plain = parse("quantize", ["digits_vit"])
    assert (plain.effort, plain.tune, plain.images) == ("fast", "none", EFFORTS["fast"].num_images)


def test_an_effort_fits_a_model_that_needs_all_tokens(tmp_path, capsys, monkeypatch):
    swin = small_model(SWIN, "swin_tiny_patch4_window7_224")
    monkeypatch.setattr(quantizing, "load_model", lambda *_names, **_options: copy.deepcopy(swin))
    told = [
        "quantize", "swin", "--effort", "best", *SHORT, "--epochs", "1", "--tuning.steps_per_epoch", "1",
        "--tuning.batch_size", "2", "--tuning.drawn_images", "2", "--out",
    ]  # fmt: skip
    assert cli.main([*told, str(tmp_path / "run")]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["tuning"]["kept_tokens"] == saved["synthesis"]["kept_tokens"] == 1
    assert cli.main([*told, str(tmp_path / "run"), "--resume"]) == 0
    assert cli.main([*told, str(tmp_path / "other"), "--tuning.kept_tokens", "0.25"]) != 0
    assert "No tokens of SwinTransformer can be left out" in capsys.readouterr().err


def test_an_effort_fits_a_model_without_classes_unless_told_otherwise():
    best, terms = EFFORTS["best"], ("head_weight", "entropy_weight", "align_weight")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)

    def fitted(*more, images_from=None):
        options = parse("quantize", ["vit", "--effort", "best", *more])
        options.images_from = images_from
        quantizing._fit_effort(options, model)
        return options.images, [vars(options)[f"synthesis.{term}"] for term in terms]

    assert fitted() == (best.num_images // 3, [1, 1, 1])
    assert fitted("--synthesis.align_weight", "1") == (best.num_images // 3, [0, 0, 1])
    assert fitted("--images", "9") == (9, [1, 1, 1])
    # Images of another run are as they are.
    assert fitted(images_from="run") == (best.num_images, [0, 0, 0])


def test_rows_of_a_large_pool_tell_what_they_were_calibrated_on(tmp_path, monkeypatch):
    monkeypatch.setattr("maskaq_brevitas.tuning.model_maker._CALIBRATED_ON", 2)
    assert quantize(tmp_path / "run", "--no-export", budget=TINY) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["calibration_images"] for row in report["accuracy"]] == [None, 2, 2, 2]


def test_a_run_of_before_there_was_a_choice_of_levels_keeps_its_own(tmp_path, capsys):
    out = tmp_path / "run"
    assert quantize(out) == 0
    manifest = load_json(out / "run.json")
    text = json.dumps(manifest)
    assert ', "weight_levels": "all"' in text
    save_json(out / "run.json", json.loads(text.replace(', "weight_levels": "all"', "")))
    assert cli.main(["evaluate", str(out), "--eval-limit", "4"]) == 0
    assert load_run(str(out), read_saved(out / "config.yaml")).scheme.weight_levels == "symmetric"


def test_target_finn_sets_scheme_and_format():
    options = parse("quantize", ["digits_vit", "--scheme", "w4a4", "--target", "finn"])
    assert (options.scheme, options.format, options.out) == ("finn-w4a4", "finn", "runs/digits_vit-finn-w4a4")
    assert parse("quantize", ["digits_vit", "--scheme", "strict-w4a4", "--target", "finn"]).scheme == "strict-w4a4"
    assert parse("export", ["run", "--target", "finn"]).format == "finn"
    assert parse("export", ["run"]).format == parse("quantize", ["digits_vit"]).format == "qonnx"


def test_export_for_finn_refuses_a_run_of_another_scheme(short_run, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    assert cli.main(["export", str(short_run), "--target", "finn", "--output", str(output)]) == 2
    printed = capsys.readouterr().err
    assert "blocks.0.attn.qkv input: expected one static scale" in printed and "--target finn" in printed
    assert not output.exists()


@pytest.mark.heavy
def test_the_main_job_for_finn(tmp_path, capsys):
    out = tmp_path / "run"
    assert quantize(out, "--target", "finn", "--no-baselines", budget=TINY) == 0
    assert {"model.finn.onnx", "model.finn.sample.npz"} < set(_files(out))
    assert "QONNX for FINN check passed" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["lint-finn", str(out / "model.finn.onnx"), "--quiet"]) == 0
    assert "everything lands" in capsys.readouterr().out


def test_evaluate_gives_the_figures_of_the_run(short_run, capsys):
    assert cli.main(["evaluate", str(short_run), "--eval-limit", "20", "--quiet"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: float(line[1]) for line in lines if line and line[0] in ("float", "quantized")}
    report = json.loads((short_run / "report.json").read_text())
    assert rows == {"float": report["accuracy"][0]["top1"], "quantized": report["accuracy"][1]["top1"]}


def test_evaluate_names_a_file_that_is_not_there(short_run, tmp_path, capsys):
    assert cli.main(["evaluate", str(short_run), "--onnx", str(tmp_path / "none.onnx"), "--quiet"]) != 0
    assert "Expected a QONNX or QCDQ file at" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [name for name in FORMATS if name not in ("qonnx", "finn")])  # these in tests above
def test_export_writes_every_format(short_run, tmp_path, capsys, kind):
    before = _files(short_run)
    assert cli.main(["export", str(short_run), "--format", kind, "--batch", "dynamic"]) == 0
    name = FORMATS[kind].file_name
    assert f"{short_run / name}\npassed: executed on 8 images" in capsys.readouterr().out
    assert _files(short_run) == sorted([*before, name])
    if kind == "qcdq":
        assert_equal_on_all(short_run, short_run / name, 50, capsys)
    (short_run / name).unlink()


def test_every_format_is_an_option():
    assert parse("export", ["run"]).format == "qonnx"
    for kind in FORMATS:
        assert parse("export", ["run", "--format", kind]).format == kind
    with pytest.raises(ConfigurationError, match="invalid choice: 'onnx'"):
        parse("export", ["run", "--format", "onnx"])


def test_sensitivity_prints_every_kind_most_costly_first(short_run, capsys):
    assert cli.main(["sensitivity", str(short_run), "--images", "4", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits_vit, w4a4: one kind quantized, all else in float, 4 synthetic images"
    rows = [line.rsplit(maxsplit=3) for line in lines[3:] if line.strip() and not set(line) <= {"-", " "}]
    assert {"mlp.fc2 input", "attn.probabilities", "attn.qkv weight"} < {row[0].strip() for row in rows}
    assert [row[0].strip() for row in rows[-2:]] == ["none", "all"]
    assert float(rows[-2][2]) < 1e-3 < float(rows[-1][2])
    costs = [float(row[2]) for row in rows[:-2]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0
    assert cli.main(["sensitivity", str(short_run), "--images", "0"]) == 2
    assert "--images: expected a whole number >= 1, got 0" in capsys.readouterr().err


def test_tuning_by_reconstruction_and_distillation(tmp_path, capsys):
    more = ("--tune", "reconstruct+distill", "--reconstruct.steps", "2", "--epochs", "1", "--refresh-every", "none")
    assert quantize(tmp_path / "run", *more) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["accuracy"]][-1] == "tuned on synthetic images"
    events = [entry["event"] for entry in report["history"]]
    assert events == ["block"] * (len(events) - 2) + ["distillation starts", "epoch"]
    assert quantize(tmp_path / "run", *more, "--resume") == 0
    capsys.readouterr()
    assert quantize(tmp_path / "run", *more, "--reconstruct.drop", "0", "--resume") == 2
    assert "tuning.0-reconstruct.drop: 0.25 -> 0.0" in capsys.readouterr().err


def test_config_round_trip_gives_the_same_bytes(short_run, tmp_path):
    again = tmp_path / "again"
    assert cli.main(["quantize", "--config", str(short_run / "config.yaml"), "--out", str(again), "--quiet"]) == 0
    for name in ("images.safetensors", "held_back.safetensors", "quant_model.safetensors", "config.yaml"):
        assert (again / name).read_bytes() == (short_run / name).read_bytes(), name
    saved = yaml.safe_load((again / "config.yaml").read_text())
    assert (saved["model"], saved["scheme"], saved["images"], saved["steps"]) == ("digits_vit", "w4a4", 4, 2)


def test_resume_after_interruption_gives_the_same_bytes(short_run, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "run", []
    original = maker.synthesize

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:  # the warm-up, the pool, then the held-back images
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    monkeypatch.setattr(maker, "synthesize", interrupted)
    assert quantize(out) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (out / "images.safetensors").exists()
    monkeypatch.setattr(maker, "synthesize", original)

    assert quantize(out, "--resume", "--seed", "7") == 2
    assert "cannot be resumed with this configuration. Differing: seed: 0 -> 7" in capsys.readouterr().err
    assert quantize(out, "--resume") == 0
    for name in ("images.safetensors", "held_back.safetensors", "quant_model.safetensors"):
        assert (out / name).read_bytes() == (short_run / name).read_bytes(), name


def test_another_run_is_refused_and_overwrite_replaces_it(short_run, tmp_path, capsys):
    out = shutil.copytree(short_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert quantize(out, "--seed", "1") == 2
    assert "holds a run already. Continue it with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert quantize(out, "--seed", "1", "--overwrite") == 0
    assert (out / "images.safetensors").read_bytes() != before[out / "images.safetensors"]
    assert json.loads((out / "run.json").read_text())["identity"]["seed"] == 1


def test_overwrite_spares_a_folder_of_others(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert quantize(tmp_path, "--overwrite") == 2
    assert "holds no run of this package, so nothing in it is overwritten" in capsys.readouterr().err
    assert _files(tmp_path) == ["thesis.txt"]


def _bad_inputs(folder):
    """Arguments, and the message, of each kind of bad input; ``folder`` holds the files they need."""
    convnet, other = folder / "convnet.safetensors", folder / "other.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), convnet)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, other)
    (folder / "unlabelled").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "unlabelled" / "a.png")
    for name, label in (("outside", 10), ("broken", 1)):
        (folder / name).mkdir()
        Image.new("RGB", (32, 32)).save(folder / name / "a.png")
        (folder / name / "labels.csv").write_text(f"file,label\na.png,{label}\n")
    content = (folder / "broken" / "a.png").read_bytes()
    (folder / "broken" / "a.png").write_bytes(content[: len(content) // 2])
    for name, text in (("unknown", "imagess: 3"), ("nested", "synthesis: {tv_wait: 1}"), ("kind", "images: many"),
                       ("damaged", "a: [")):  # fmt: skip
        (folder / f"{name}.yaml").write_text(text)
    return {
        "model": (["digits_vitt"], "Expected 'digits_vit', the name of a timm model, or 'torchvision:'"),
        "no model": ([], "Expected a MODEL, got none"),
        "scheme": (["digits_vit", "--scheme", "w9a4"], "Unknown scheme 'w9a4'"),
        "pattern": (["digits_vit", "--override", "block.*=w8a8"], "The layer pattern 'block.*' matches nothing"),
        "override": (["digits_vit", "--override", "head"], "--override: expected PATTERN=wXaY"),
        "override bits": (["digits_vit", "--override", "head=w1a8"], "Expected bit widths of the form wXaY"),
        "images": (["digits_vit", "--images", "0"], "--images: expected a whole number >= 1, got 0"),
        "steps": (["digits_vit", "--steps", "0"], "steps: expected a whole number >= 1, got 0"),
        "batch": (["digits_vit", "--batch-size", "0"], "batch_size: expected a whole number >= 1, got 0"),
        "batch text": (["digits_vit", "--batch-size", "many"], "invalid whole number or auto value: 'many'"),
        "limit": (["digits_vit", "--eval-limit", "0"], "--eval-limit: expected a whole number >= 1, got 0"),
        "number": (["digits_vit", "--images", "x"], "argument --images: invalid int value: 'x'"),
        "option": (["digits_vit", "--imagess", "3"], "unrecognized arguments: --imagess 3"),
        "synthesis": (["digits_vit", "--synthesis.mask_end", "2"], "mask_end: expected a share in (0, 1], got 2.0"),
        "device": (["digits_vit", "--device", "abacus"], "--device: expected a device of this machine, got 'abacus'"),
        "both": (["digits_vit", "--overwrite", "--resume"], "Expected --overwrite or --resume, got both"),
        "key": (["--config", str(folder / "unknown.yaml")], "unknown key 'imagess'. Did you mean 'images'?"),
        "nested key": (["--config", str(folder / "nested.yaml")], "Did you mean 'synthesis.tv_weight'?"),
        "kind": (["--config", str(folder / "kind.yaml")], "invalid int value: 'many'"),
        "yaml": (["--config", str(folder / "damaged.yaml")], "Expected a YAML file of options, cannot read"),
        "no yaml": (["--config", str(folder / "none.yaml")], "Expected a YAML file of options, cannot read"),
        "convnet": (["test_resnet", "--checkpoint", str(convnet)], "it has no attention. Expected a Vision"),
        "weights": (["digits_vit", "--checkpoint", str(other)], "Expected weights that fit 'digits_vit'"),
        "no labels": (["digits_vit", "--eval-data", str(folder / "unlabelled")], "images without a label"),
        "labels": (["digits_vit", "--eval-data", str(folder / "outside")], "Expected labels from 0 to 9"),
        "broken": (["digits_vit", "--eval-data", str(folder / "broken")], "Expected an image, cannot decode"),
        "calibration": (["digits_vit", "--calibration-data", str(folder / "none")], "Expected a folder of labelled"),
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "given").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name, (arguments, message) in _bad_inputs(tmp_path / "given").items():
        status = cli.main(["quantize", *arguments, "--quiet"])
        error = capsys.readouterr().err
        assert status == 2, name
        assert error.startswith("maskaq: error: ") and error.count("\n") == 1, (name, error)
        assert message in error, (name, error)
        assert not list((tmp_path / "empty").iterdir()), name


def test_a_missing_export_extra_is_named_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "qonnx", None)
    assert quantize(tmp_path / "run", budget=TINY) == 2
    assert "pip install 'maskaq_brevitas[export]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_viz_extra_leaves_out_the_picture_only(short_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("images.png", "report.*"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert quantize(out, "--resume") == 0  # the images are there: this only calibrates and reports
    assert "images.png is left out. This needs the Python package 'matplotlib'" in capsys.readouterr().err
    assert "images.png" not in _files(out) and "report.md" in _files(out)


def test_runs_that_cannot_be_evaluated(short_run, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "holds no run: expected a file run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_bytes((short_run / "run.json").read_bytes())
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "Expected a finished run" in capsys.readouterr().err


def test_every_option_is_in_the_help_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, cls, short in (
        ("synthesis", SynthesisConfig, ("steps", "batch_size")), ("tuning", DistillConfig, ("epochs", "refresh_every")),
        ("reconstruct", ReconstructConfig, ()),
    ):  # fmt: skip
        for key in set(cls.__dataclass_fields__) - set(short):
            assert f"--{section}.{key} " in text
    assert "--images N synthetic images (default: 64)" in text
    assert "--synthesis.tv_weight X coefficients of the five terms." in text
    assert f"so 1 is its equivalent. (default: {SynthesisConfig.tv_weight})" in text


def test_help_and_version_import_neither_torch_nor_brevitas():
    code = (
        "import sys; from maskaq_brevitas import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'brevitas', 'timm', 'matplotlib', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("maskaq_brevitas ")
