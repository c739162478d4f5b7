"""Runs that are killed, that the disk refuses, or whose files are damaged: the same bytes, or a name of what is broken.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small_run

from maskaq_brevitas.errors import MaskAQError
from maskaq_brevitas.errors import WriteError
from maskaq_brevitas.files import load_json
from maskaq_brevitas.files import load_tensors

KILLS_PER_STAGE = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    small_run.run(folder)
    return folder


def check_files(folder: Path) -> None:
    """Whatever has its final name is whole."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".safetensors"):
            {".json": load_json, ".safetensors": load_tensors}[path.suffix](path)


def kill_in(stage: str, share: float, folder: Path, context, seconds: dict[str, float]) -> bool:
    """Resume a run in a process of its own and kill it ``share`` through a stage; whether it was killed there."""
    place = context.Array("c", 64)
    process = context.Process(target=small_run.run, args=(str(folder), place))
    process.start()
    try:
        while not place.value.startswith(stage.encode()) and process.is_alive():
            time.sleep(0.001)
        process.join(share * seconds[stage])
        alive = process.is_alive()
        process.kill()
    finally:
        process.kill()
        process.join()
    assert alive or process.exitcode == 0
    return alive and place.value.startswith(stage.encode())


@pytest.mark.heavy
def test_killed_at_random_moments_of_every_stage(whole, tmp_path):
    """SIGKILL, again and again in the same run, until every stage has been hit ``KILLS_PER_STAGE`` times."""
    expected = small_run.results(whole)
    context = multiprocessing.get_context("forkserver")  # imports once, and no thread is alive when it forks
    # By name of what is installed: before Python 3.13 the server does not look where small_run lies.
    context.set_forkserver_preload(
        ["maskaq_brevitas.calibrator", "maskaq_brevitas.export", "onnxscript", "qonnx.util.cleanup"]
    )
    draw = random.Random(0)
    seconds, hits = dict.fromkeys(small_run.STAGES, 1.0), dict.fromkeys(small_run.STAGES, 0)
    for attempt in range(3 * KILLS_PER_STAGE):
        missing = [stage for stage in small_run.STAGES if hits[stage] < KILLS_PER_STAGE]
        if not missing:
            break
        folder = tmp_path / f"run-{attempt}"
        for stage in missing:
            if kill_in(stage, draw.random(), folder, context, seconds):
                hits[stage] += 1
            else:
                seconds[stage] /= 2  # this machine is faster than was thought
            check_files(folder)
        small_run.run(folder)
        assert small_run.results(folder) == expected, (attempt, hits)
        assert not [*folder.glob("state/images-*"), *folder.rglob("*.partial")]
        shutil.rmtree(folder)
    print(f"survived {sum(hits.values())} kills: {hits}")
    assert min(hits.values()) >= KILLS_PER_STAGE, hits


def test_files_larger_than_the_system_allows(whole, tmp_path):
    """The run stops with what to do, and goes on to the same bytes once it may write."""
    folder = tmp_path / "run"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (1_000, 4_000, 60_000):  # no manifest, no batch of images, no checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(WriteError, match=f"{folder}.* cannot be written.*Free space"):
                small_run.run(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            check_files(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    small_run.run(folder)
    assert small_run.results(folder) == small_run.results(whole)


@pytest.mark.heavy
def test_full_disk(whole, tmp_path):
    """A small tmpfs that fills up, is enlarged a little, and fills up again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mount.stderr.strip()}")
    try:
        refused = 0
        for size in (16, 48, 128, 256, 384, 512, 768, 1024, 4096):
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            try:
                small_run.run(disk / "run")
            except WriteError as error:
                assert "No space left" in str(error) and str(disk / "run") in str(error)
                refused += 1
            check_files(disk / "run")
            assert not list((disk / "run").rglob("*.partial"))
        assert refused >= 4
        assert small_run.results(disk / "run") == small_run.results(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def interrupted(folder: Path, at: str, count: int) -> None:
    """A run that stops when a stage of that name begins for the ``count``-th time."""
    seen = []

    def began(stage: str) -> None:
        seen.append(stage)
        if sum(name.startswith(at) for name in seen) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_run.run(folder, began=began)


@pytest.mark.heavy
@pytest.mark.parametrize(("at", "count"), (("calibration", 1), ("refresh", 2), ("export", 1)))
def test_damaged_files(whole, tmp_path, at, count):
    """Each file of a run cut short, emptied, with one bit flipped, with another file's content, or gone."""
    expected, draw, tried, refused = small_run.results(whole, export=False), random.Random(0), 0, 0
    interrupted(tmp_path / "run", at, count)
    paths = sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file())

    def flipped(content: bytes) -> bytes:
        broken = bytearray(content)
        broken[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        return bytes(broken)

    damages = (
        lambda content: content[: draw.randrange(len(content) - 1)], lambda content: b"", flipped, flipped,
        lambda content: (whole / "model.onnx").read_bytes(), None,
    )  # fmt: skip
    for path in paths:
        for damage in damages:
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "run", copy)
            if damage is None:
                (copy / path).unlink()
            else:
                (copy / path).write_bytes(damage((copy / path).read_bytes()))
            tried += 1
            try:
                small_run.run(copy, export=False)
            except MaskAQError as error:
                assert path.name in str(error) or str(copy) in str(error), (path, error)
                refused += 1
            else:
                found = small_run.results(copy, export=False)
                different = [name for name in expected if found[name] != expected[name]]
                assert not different, (path, damages.index(damage), different)
            shutil.rmtree(copy)
    print(f"{tried} damaged files: {refused} refused by name, {tried - refused} runs ended with the same bytes")
    assert refused >= 3 * len(paths)  # the plan of a refresh that is over is not read again
    assert os.listdir(tmp_path) == ["run"]
