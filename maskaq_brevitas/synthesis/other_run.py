"""The images of another run, for one that makes none of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import from_mapping
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.files import load_tensors
from maskaq_brevitas.files import saved_digest
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import differences
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.synthesis.pool import SyntheticImages

__all__ = ["ImagesOfRun", "images_of"]


class ImagesOfRun:
    """The finished images of a run directory.

    Args:
        path: of the run.
        resumed: it is the run that goes on, and has its images already: they count as those that it began with.

    Attributes:
        num_images, held_back, synthesis: what the run was made with.
        digest: of its files; other images, another digest.

    Raises:
        RunDirectoryError: if ``path`` holds no run, or one whose images are not finished.
        DamagedFileError: if their files are damaged.
    """

    def __init__(self, path: str | Path, *, resumed: bool = False):
        self.path = Path(path)
        self._identity: dict[str, Any] = RunDirectory.read_identity(path)
        try:
            self.num_images = int(self._identity["num_images"])
            self.held_back = int(self._identity["held_back"])
            self.synthesis = from_mapping(SynthesisConfig, self._identity["synthesis"])
        except (KeyError, TypeError, ValueError, ConfigurationError) as error:
            raise RunDirectoryError(f"{path} is no run of this version of the package: {error!r}.") from error
        names = ("images.safetensors", "held_back.safetensors") if self.held_back else ("images.safetensors",)
        self._files = [self.path / name for name in names]
        for file in self._files:
            if not file.is_file():
                raise RunDirectoryError(
                    f"Expected the finished images of a run in {path}, found no {file.name}. Finish that run with "
                    "--resume, or make images here."
                )
            if not resumed:  # before anything is cleared for the run that takes them
                load_tensors(file)
        self.digest = [saved_digest(file) for file in self._files]
        if resumed:
            self.digest = list(self._identity.get("images_from", self.digest))

    def check(self, float_model: nn.Module, *, num_images: int, held_back: int, synthesis: SynthesisConfig) -> None:
        """Whether a run of these settings would have these images.

        Raises:
            ConfigurationError: if not, with the settings that differ.
        """
        if self._identity.get("weights") != fingerprint(float_model):
            raise ConfigurationError(
                f"Expected images of this float model, but the run in {self.path} was made from other weights (a "
                f"{self._identity.get('model')}). Make images for this model."
            )
        ours = {"num_images": num_images, "held_back": held_back, "synthesis": to_mapping(synthesis)}
        theirs = {
            "num_images": self.num_images, "held_back": self.held_back, "synthesis": to_mapping(self.synthesis)
        }  # fmt: skip
        if differing := differences(theirs, ours):
            raise ConfigurationError(
                f"The images of {self.path} were made with other settings: {'; '.join(differing)}. Leave these out, or "
                "make images with them here."
            )

    def load(self, pool: SyntheticImages, held_back: SyntheticImages | None) -> None:
        """Fill both pools, the main one last, because its version says that both are whole.

        Raises:
            DamagedFileError: if a file is missing, damaged, or has changed since this object was made.
        """
        files = dict(zip((pool, held_back), self._files, strict=False))
        for images in (held_back, pool):
            if images is not None:
                images.load(files[images])
        if [saved_digest(file) for file in self._files] != self.digest:
            pool.version = 0
            raise DamagedFileError(f"The images of {self.path} were replaced in the meantime. Start this run again.")


def images_of(source: str | Path | ImagesOfRun | None, run_dir: str | Path | None, mode: str) -> ImagesOfRun | None:
    """The images of ``source``, or of the run itself if it is resumed and has taken them already.

    Raises:
        ConfigurationError: if a run is to be overwritten, or begun, where its images come from.
        RunDirectoryError: as :class:`ImagesOfRun`.
    """
    if source is None or isinstance(source, ImagesOfRun):
        return source
    if run_dir is not None and mode == "resume" and (Path(run_dir) / "images.safetensors").is_file():
        return ImagesOfRun(run_dir, resumed=True)
    if run_dir is not None and Path(run_dir).resolve() == Path(source).resolve():
        raise ConfigurationError(
            f"{source} is to give its images and to become this run. Choose another folder for one of them."
        )
    return ImagesOfRun(source)
