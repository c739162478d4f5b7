"""``DataFreeCalibrator``: a calibration DataLoader for a model without data, and the facade over a run's stages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal

import torch
from torch import Tensor
from torch import nn
from torch.utils.data import DataLoader

from maskaq_brevitas.config import EffortName
from maskaq_brevitas.config import ReconstructConfig
from maskaq_brevitas.config import Scheme
from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.config import TuningConfig
from maskaq_brevitas.config import resolve_effort
from maskaq_brevitas.config import resolve_scheme
from maskaq_brevitas.config import scheme_of_run
from maskaq_brevitas.config import to_mapping
from maskaq_brevitas.errors import ConfigurationError
from maskaq_brevitas.errors import DamagedFileError
from maskaq_brevitas.errors import InputError
from maskaq_brevitas.errors import RunDirectoryError
from maskaq_brevitas.errors import SilentLayerWarning
from maskaq_brevitas.errors import UncoupledWarning
from maskaq_brevitas.models.backbone import HostedBackbone
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.models.geometry import read_geometry
from maskaq_brevitas.models.health import check_finite
from maskaq_brevitas.models.token_choice import check_token_choice
from maskaq_brevitas.modes import own_modes
from maskaq_brevitas.modes import warn_of_emulation
from maskaq_brevitas.progress import bars
from maskaq_brevitas.progress import stage
from maskaq_brevitas.quant.equalize import EqualizedPlace
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import SwapRecord
from maskaq_brevitas.quant.swap import swap_layers
from maskaq_brevitas.quant.swap import with_layers_outside
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.run_directory import installed_versions
from maskaq_brevitas.synthesis.maker import PoolMaker
from maskaq_brevitas.synthesis.maker import RefreshStart
from maskaq_brevitas.synthesis.maker import device_batches
from maskaq_brevitas.synthesis.maker import drop_batches
from maskaq_brevitas.synthesis.other_run import ImagesOfRun
from maskaq_brevitas.synthesis.other_run import images_of
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.tuning.calibrate import calibrate
from maskaq_brevitas.tuning.calibrate import is_calibrated
from maskaq_brevitas.tuning.calibrate import provisional_calibration
from maskaq_brevitas.tuning.calibrate import returned_quant_tensors
from maskaq_brevitas.tuning.calibrate import silent_quantizers
from maskaq_brevitas.tuning.checkpoint import has_checkpoint
from maskaq_brevitas.tuning.checkpoint import load_checkpoint
from maskaq_brevitas.tuning.distill_stage import DistillStage
from maskaq_brevitas.tuning.distill_stage import refresh_is_due
from maskaq_brevitas.tuning.model_maker import QuantModelMaker
from maskaq_brevitas.tuning.optimizer import OptimizerFactory
from maskaq_brevitas.tuning.reconstruct_stage import ReconstructStage
from maskaq_brevitas.tuning.stages import STAGE_NAMES
from maskaq_brevitas.tuning.stages import check_tuning
from maskaq_brevitas.tuning.stages import described_tuning
from maskaq_brevitas.tuning.stages import fitting_effort
from maskaq_brevitas.tuning.stages import tuning_stages
from maskaq_brevitas.tuning.stages import with_precision
from maskaq_brevitas.tuning.state import load_quant_state

if TYPE_CHECKING:
    from maskaq_brevitas.report import Report

__all__ = ["DataFreeCalibrator"]


class DataFreeCalibrator(DataLoader[tuple[Tensor, int]]):
    """Synthetic calibration batches for a Vision Transformer, made from the model itself.

    A ``torch.utils.data.DataLoader``: iterating yields ``(images, labels)``, images normalised float32
    ``(batch, channels, height, width)`` on the CPU, labels int64 ``(batch,)``. The images are made at first use and
    stay the same on every pass, until :meth:`refresh` replaces them in place.

    Args:
        float_model: trained float model of a registered family of timm, torchvision or transformers (``maskaq
            models``). It is not changed. The quant model of a transformers classifier gives its logits, a tensor. Mean
            and standard deviation of another model than timm's are told by its ``pretrained_cfg``, see
            :func:`~maskaq_brevitas.models.geometry.read_geometry`.
        quant_model: a Brevitas model of it that exists already, FX-traced (``brevitas.graph.quantize``) or not;
            ``None`` swaps the layers by ``scheme``.
        backbone: name of the module to quantize inside a larger model (detection, segmentation), such as
            ``"backbone.body"``; the rest stays in float. Images are made from the backbone alone. :attr:`quant_model`
            and all that methods return is the larger model; :attr:`float_model` and :attr:`quant_backbone` are the
            backbone as a network from images to its features
            (:class:`~maskaq_brevitas.models.backbone.HostedBackbone`).
        scheme: name (``"w4a8"``, ``"strict-w4a4"`` ...) or :class:`~maskaq_brevitas.config.Scheme`.
        overrides: shell pattern of layer names -> ``wXaY``.
        effort: ``"fast"`` (calibration only), ``"default"`` or ``"best"``: sets ``num_images``, ``synthesis`` and
            ``tuning`` where they are not given. README tells what they come to.
        num_images: images in the pool.
        batch_size: images per batch of the loader.
        steps: iterations of synthesis per batch; overrides ``synthesis.steps``.
        held_back: images that only measure and select, never calibrate; ``None`` means an eighth of
            ``num_images``, 8 to 128.
        synthesis: everything else about how images are made.
        images_from: folder of a run of the same float model whose images are taken instead of making new ones: those
            of one run serve for several schemes. ``num_images``, ``held_back`` and ``synthesis`` are that run's. The
            alignment term coupled its images to its own quant model; a refresh couples them to this one. A run
            directory of its own gets a copy, and does without that run from then on.
        tuning: how :meth:`quantize` tunes the quant model, one configuration or several that follow each other;
            an empty list only calibrates it, ``None`` means that of ``effort``.
        seed: of all randomness. Same seed, machine and thread count: the same bytes.
        device: where the networks run; ``None`` means where ``float_model`` is.
        run_dir: folder in which finished batches and results are kept, so that an interrupted run can continue.
        run_mode: ``"new"``, ``"resume"`` or ``"overwrite"``, see :class:`~maskaq_brevitas.run_directory.RunDirectory`.
        progress: show progress bars; they are silent when the output is no terminal.
        **loader: further arguments of ``DataLoader`` (``num_workers``, ``pin_memory``, ``shuffle`` ...).

    Raises:
        ConfigurationError: unknown scheme or pattern, or a loader argument that would break the contract.
            Or ``images_from`` is a run of another model, or of other images than ``num_images`` and ``synthesis`` say.
        InputError: if ``num_images`` is below 1.
        RunDirectoryError: if ``images_from`` holds no run, or one without its images.
        ModelError: if a weight is not finite, the model has no known attention, its family is refused, or needs all of
            its tokens and ``kept_tokens`` says otherwise.

    Example:
        >>> from maskaq_brevitas import DataFreeCalibrator, load_model
        >>> model = load_model("digits_vit")
        >>> calibrator = DataFreeCalibrator(model, scheme="w4a4", num_images=4, steps=2, progress=False)
        >>> images, labels = next(iter(calibrator))
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """

    @own_modes()
    def __init__(
        self,
        float_model: nn.Module,
        quant_model: nn.Module | None = None,
        *,
        backbone: str | None = None,
        scheme: str | Scheme = "w4a8",
        overrides: Mapping[str, str] | None = None,
        effort: EffortName = "fast",
        num_images: int | None = None,
        batch_size: int = 16,
        steps: int | None = None,
        held_back: int | None = None,
        synthesis: SynthesisConfig | None = None,
        images_from: str | Path | ImagesOfRun | None = None,
        tuning: TuningConfig | Sequence[TuningConfig] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        run_dir: str | Path | None = None,
        run_mode: Literal["new", "resume", "overwrite"] = "new",
        progress: bool = True,
        **loader: Any,
    ):
        if loader.get("persistent_workers"):
            raise ConfigurationError(
                "persistent_workers=True would go on serving the images of before a refresh. Leave it out."
            )
        taken = images_of(images_from, run_dir, run_mode)
        named = resolve_effort(effort)
        if num_images is not None and (type(num_images) is not int or num_images < 1):
            raise InputError(f"num_images: expected a whole number >= 1, got {num_images!r}.")
        check_finite(float_model, "float_model")
        self.hosted: HostedBackbone | None = None
        larger = quant_model
        if backbone is not None:
            self.hosted = HostedBackbone(float_model, backbone)
            float_model = self.hosted.network
            quant_model = None if quant_model is None else self.hosted.network_of(quant_model)
        self.float_model = float_model
        self.geometry: Geometry = read_geometry(float_model)
        self.device = torch.device(device) if device is not None else next(float_model.parameters()).device
        self.scheme = resolve_scheme(scheme)
        self.overrides = dict(overrides or {})
        work = fitting_effort(named, float_model, *([] if quant_model is None else [quant_model]))
        if num_images is None:
            num_images = work.num_images if taken is None else taken.num_images
        if synthesis is None:
            synthesis = work.synthesis if taken is None else taken.synthesis
        if steps is not None:
            synthesis = replace(synthesis, steps=steps)
        synthesis = with_precision(synthesis, self.device)
        if held_back is None:
            held_back = min(128, max(8, num_images // 8)) if taken is None else taken.held_back
        if taken is not None:
            taken.check(float_model, num_images=num_images, held_back=held_back, synthesis=synthesis)
        self.images_from = taken
        self.tuning = self._stages(work.tuning if tuning is None else tuning)
        if synthesis.kept_tokens < 1 or any(getattr(config, "kept_tokens", 1) < 1 for config in self.tuning):
            check_token_choice(float_model)
        self.seed = seed
        self.progress = progress
        self.swap_record: SwapRecord | None = None
        # Makes our quant models; None where one was given.
        self.quant_maker: QuantModelMaker | None = None
        self._given_quant_model = None if quant_model is None else fingerprint(quant_model)
        # Iterating may come in the middle of Brevitas' calibration mode, which switches these flags.
        self._returned = {} if quant_model is None else returned_quant_tensors(quant_model)
        if quant_model is None:
            self.quant_maker = QuantModelMaker(
                float_model, self.geometry, self.scheme, self.overrides, seed=seed, device=self.device
            )
            quant_model, self.swap_record = swap_layers(float_model, self.scheme, self.overrides)
            if self.hosted is not None:
                self.swap_record = with_layers_outside(self.swap_record, self.hosted.layers_outside(), self.hosted.name)
        self._quant_model = quant_model.to(self.device)
        self._larger_model = self._in_place(self._quant_model) if larger is None else larger.to(self.device)
        self.equalized: list[EqualizedPlace] = []
        # Version of the pool, and what calibration on it gave.
        self._before_tuning: tuple[int, nn.Module] | None = None
        self.range_factors: dict[str, float] = {}
        self.stages: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.held_back = SyntheticImages(held_back, self.geometry) if held_back else None
        pool = SyntheticImages(num_images, self.geometry)
        self._bar = bars(progress)
        self.maker = PoolMaker(
            float_model, self.geometry, pool, self.held_back, synthesis, seed=seed, device=self.device, bar=self._bar
        )
        self.run: RunDirectory | None = None
        if run_dir is not None:
            self.run = RunDirectory(run_dir, self.identity(num_images), run_mode)
        # Without one of its own a DataLoader draws from the caller's random state.
        loader.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(pool, batch_size=batch_size, **loader)

    # -- the loader ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]  # torch's is a private class
        self.ensure_images()
        return super().__iter__()

    @property
    def pool(self) -> SyntheticImages:
        """The synthetic images (empty until first use, see :meth:`ensure_images`)."""
        return self.dataset  # type: ignore[return-value]

    @property
    def quant_model(self) -> nn.Module:
        """The quant model: ours, or the one that was given; with ``backbone``, the larger model."""
        return self._larger_model

    @property
    def quant_backbone(self) -> nn.Module:
        """What is quantized, from images to one tensor: the quant model, or with ``backbone`` that part of it.

        It is one and the same with the part in :attr:`quant_model`.
        """
        return self._quant_model

    @property
    def calibration_images(self) -> int:
        """How many images of the pool the quant model is calibrated on."""
        return len(self.pool) if self.quant_maker is None else self.quant_maker.count(len(self.pool))

    @property
    def allocated(self) -> dict[str, str]:
        """Widths of single layers that mixed precision has chosen, layer name -> ``wXaY``."""
        return {} if self.quant_maker is None else self.quant_maker.allocated

    @property
    def synthesis(self) -> SynthesisConfig:
        """How images are made."""
        return self.maker.config

    @property
    def redrawn(self) -> int:
        """Images drawn again so far because their objective was not finite."""
        return self.maker.redrawn

    @property
    def refreshes(self) -> list[dict[str, Any]]:
        """The refreshes in :attr:`history`."""
        return [entry for entry in self.history if entry["event"] == "refresh"]

    @property
    def version(self) -> int:
        """How often the pool was made or replaced."""
        return self.pool.version

    # -- the stages ---------------------------------------------------------------------------------------------

    @own_modes()
    def ensure_images(self) -> SyntheticImages:
        """Make the images, or take them from another run, if there are none yet; return the pool.

        Raises:
            SynthesisError: if an image stays non-finite after the configured number of draws.
            DamagedFileError: if the run directory has lost its images, or they are damaged.
        """
        if self.pool.version > 0:
            return self.pool
        if self.run is not None and self.run.has("images.safetensors"):
            self.maker.load(self.run)
            drop_batches(self.run, self.pool.version)
            return self.pool
        if self.run is not None and has_checkpoint(self.run):
            # Images made anew would be those of before the refreshes that the tuned model has seen.
            raise DamagedFileError(
                f"{self.run.path / 'images.safetensors'} is missing, but the quant model has been tuned on it. Put the "
                "file back, or start the run again with --overwrite."
            )
        if self.images_from is not None:
            self.images_from.load(self.pool, self.held_back)
            if self.run is not None:
                self.maker.save(self.run)
            return self.pool
        warn_of_emulation("synthesis", self.synthesis.precision, self.device)
        # Calibration loops iterate under no_grad or in inference mode, whose tensors could not be differentiated.
        with torch.no_grad(), self.stage("synthesis"):
            self.maker.fill(self._coupled_snapshot(), self.run)
        return self.pool

    @own_modes()
    def calibrate(self) -> nn.Module:
        """Set all scales of the quant model on the finished images; return the quant model.

        With our own swap this equalises channels, calibrates through Brevitas' ``calibration_mode`` and refines ranges,
        as the scheme says, on 256 of the images at most, drawn from them. A model that was given is calibrated as
        it is, on all of them.
        """
        self.ensure_images()
        self._assign_widths()
        with self.stage("calibration"):
            if self.quant_maker is None:
                calibrate(self._quant_model, device_batches(self.pool, self.batch_size or 16, self.device))
            else:
                batches = self._calibration_batches(self.quant_maker)
                self.equalized, self.range_factors = self.quant_maker.calibrate(self._quant_model, batches)
        silent = silent_quantizers(self._quant_model)
        if silent:
            warnings.warn(
                f"The synthetic images give nothing but zeros (or one value) at the input of {', '.join(silent)}: what "
                "other images give there will be clipped. More images (num_images) may reach it.",
                SilentLayerWarning,
                stacklevel=2,
            )
        return self.quant_model

    @own_modes()
    def quantize(
        self,
        tuning: TuningConfig | Sequence[TuningConfig] | None = None,
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> nn.Module:
        """Synthesise, calibrate and, with a tuning, tune; return the quant model, ready for export.

        With a run directory every epoch and block is kept, and an interrupted run goes on where it was. What is kept in
        the end is chosen on the held-back images (without them: the last epoch). :attr:`history` tells losses, block
        errors and refreshes.

        Args:
            tuning: as in the constructor; ``None`` means that of the constructor, and if that is ``None`` too, nothing
                is tuned.
            optimizer: builds another optimiser for distillation than ``DistillConfig.optimizer``, for example
                ``torch.optim.RMSprop``.

        Raises:
            ConfigurationError: if the constructor was given another tuning.
            RunDirectoryError: if the run directory holds a run with another tuning.
            ModelError: if a tuning compares blocks, and the quant model that was given has none (FX-traced).
            TuningError: if the loss stays non-finite for a whole epoch.
        """
        tunings = self._stages(tuning) or self.tuning
        if self.tuning not in ((), tunings):
            raise ConfigurationError(
                "quantize() got another tuning than the constructor. Give it to one of them, or make a new calibrator."
            )
        if not tunings:
            return self.calibrate()
        check_tuning(tunings, self.float_model, self._quant_model)  # before the images are made
        for config in tunings:
            warn_of_emulation("tuning", getattr(config, "precision", "float32"), self.device)
        if self.run is not None:
            self.run.claim("tuning.json", described_tuning(tunings))
        self.ensure_images()
        self._assign_widths()
        found = load_checkpoint(self.run) if self.run is not None else None
        if found is None:
            self.calibrate()
            if self.quant_maker is not None:
                self._before_tuning = self.pool.version, self._snapshot()
        else:
            load_quant_state(self._quant_model, found.tensors["model"])
            self.history = found.note["history"]
        for index, config in enumerate(tunings):
            if found is not None and index < found.stage:
                continue
            with self.stage(STAGE_NAMES[type(config)]):
                work = self._tuning_stage(index, config, optimizer)
                if found is not None and index == found.stage:
                    work.resume(found)
                else:
                    work.start()
                work.execute()
                self.best_epoch = getattr(work, "best_epoch", self.best_epoch)
        if self.run is not None:
            self.save()
        return self.quant_model

    @own_modes()
    def refresh(
        self, *, share: float = 1.0, steps: int | None = None, start: RefreshStart = "images"
    ) -> dict[str, Any]:
        """Synthesise again against the quant model as it is now, and replace images of the pool in place.

        Args:
            share: of the optimised images to replace, in (0, 1]; those replaced longest ago come first. Images that are
                drawn (``synthesis.procedural_share``) do not follow a model, and stay.
            steps: iterations; ``None`` means a quarter of ``synthesis.steps`` from images, all of them from noise.
            start: ``"images"`` continues from the present images, at a quarter of the learning rate; ``"noise"``
                begins anew. The labels of the images replaced stay the same set, in a new order for ``"noise"``.

        Returns:
            What changed: pool version, images replaced, and the masked alignment distance to the quant model
            before and after (lower is closer).

        Warns:
            UncoupledWarning: if the objective does not see the quant model.

        Raises:
            InputError: if ``share`` is outside (0, 1].
        """
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number in (0, 1], got {share}.")
        if self.synthesis.align_weight == 0 and self.geometry.num_classes:
            warnings.warn(
                "The images are made again, but do not follow the quant model: the term of the objective that sees it "
                "is switched off (synthesis.align_weight is 0, as with effort='best').",
                UncoupledWarning, stacklevel=2,
            )  # fmt: skip
        self.ensure_images()
        if not is_calibrated(self._quant_model):
            self.calibrate()
        if steps is None:
            steps = self.synthesis.steps if start == "noise" else max(1, self.synthesis.steps // 4)
        count = max(1, round(share * self.maker.refreshable))
        with torch.no_grad(), self.stage(f"refresh {self.version + 1}"):
            entry = self.maker.refresh(self._quant_model, self.run, count=count, steps=steps, start=start)
        self.history.append(entry)
        return entry

    def epochs(self, count: int, *, refresh_every: int | None = None, **refresh: Any) -> Iterator[int]:
        """Epoch numbers from 0, refreshing the images against the quant model whenever ``refresh_every`` have passed.

        Args:
            count: epochs.
            refresh_every: epochs between refreshes; ``None`` never refreshes.
            **refresh: arguments of :meth:`refresh`.

        Example:
            ``for epoch in calibrator.epochs(100, refresh_every=30): for images, labels in calibrator: ...``

        Raises:
            InputError: if a number is below 1.
        """
        if count < 1 or (refresh_every is not None and refresh_every < 1):
            raise InputError(f"Expected whole numbers >= 1, got count={count}, refresh_every={refresh_every}.")
        self.ensure_images()
        for epoch in range(count):
            if refresh_is_due(epoch, refresh_every):
                self.refresh(**refresh)
            yield epoch

    @own_modes()
    def calibrated_on(self, images: Tensor | None = None) -> nn.Module:
        """A fresh quant model with the same quantizers, calibrated in the same way on other images, and frozen.

        This is the row to compare with: noise, real images where there are some, or what tuning began with.

        Args:
            images: normalised, ``(images, channels, height, width)``; ``None``: the synthetic ones as they are now, as
                many as :meth:`calibrate` takes.

        Raises:
            ConfigurationError: if the quant model was given: it cannot be made afresh.
        """
        if self.quant_maker is None:
            raise ConfigurationError("calibrated_on() needs a scheme to swap layers by; this quant model was given.")
        if images is None and self._before_tuning is not None and self._before_tuning[0] == self.pool.version:
            return self._in_place(self._before_tuning[1])
        if images is None:
            self.ensure_images()
            batches = self._calibration_batches(self.quant_maker)
        else:
            batches = list(images.to(self.device).split(self.batch_size or 16))
        quant_model = self.quant_maker.make()
        self.quant_maker.calibrate(quant_model, batches)
        return self._in_place(frozen_snapshot(quant_model, self.geometry.input_size))

    @own_modes()
    def freeze(self) -> nn.Module:
        """A copy of the quant model for fast inference: weights quantized once, scales fixed, no gradients.

        Its outputs equal the quant model's bit for bit; it holds no Brevitas quantizers, so export the quant model.
        """
        return self._in_place(self._snapshot())

    # -- persistence --------------------------------------------------------------------------------------------

    def identity(self, num_images: int | None = None) -> dict[str, Any]:
        """All that affects the numbers of this run, as plain values."""
        return {
            "scheme": to_mapping(self.scheme),
            "overrides": self.overrides,
            "num_images": len(self.pool) if num_images is None else num_images,
            "held_back": len(self.held_back) if self.held_back is not None else 0,
            "synthesis": to_mapping(self.synthesis),
            **({} if self.images_from is None else {"images_from": self.images_from.digest}),
            **({"tuning": described_tuning(self.tuning)} if self.tuning else {}),
            **({} if self.quant_maker is not None else {"quant_model": self._given_quant_model}),
            **(
                {} if self.hosted is None else {"backbone": f"{self.hosted.name} of {type(self.hosted.model).__name__}"}
            ),
            "seed": self.seed,
            "model": type(self.float_model).__name__,
            "weights": fingerprint(self.float_model),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "device": self.device.type,
            "versions": installed_versions(),
        }

    def save(self, path: str | Path | None = None) -> None:
        """Write images and quant model to a run directory (default: that of this run).

        Raises:
            RunDirectoryError: if there is no directory to write to, or it holds another run.
        """
        own = self.run is not None and (path is None or Path(path).resolve() == self.run.path.resolve())
        run = self.run if own or path is None else RunDirectory(path, self.identity(), "resume")
        if run is None:
            raise RunDirectoryError("save() needs a path: this calibrator was made without run_dir.")
        if self.pool.version > 0:
            self.maker.save(run)
        if self.allocated:
            run.write_json(_WIDTHS, self.allocated)
        run.write_tensors("quant_model.safetensors", self._quant_model.state_dict())

    @own_modes()
    def load(self, path: str | Path | None = None) -> None:
        """Take images and quant model from a run directory that :meth:`save` wrote with the same configuration.

        Raises:
            RunDirectoryError: if the directory is missing, damaged, or of another model, scheme or number of images.
        """
        run = self.run
        if path is not None:
            found = RunDirectory.read_identity(path)
            found["scheme"] = to_mapping(scheme_of_run(found["scheme"])) if "scheme" in found else None
            for key in ("scheme", "overrides", "num_images", "held_back", "weights"):
                if found.get(key) != json.loads(json.dumps(self.identity()[key])):
                    raise RunDirectoryError(
                        f"{path} holds another run: {key} is {found.get(key)!r}, expected {self.identity()[key]!r}."
                    )
            run = RunDirectory.__new__(RunDirectory)
            run.path = Path(path)
        if run is None:
            raise RunDirectoryError("load() needs a path: this calibrator was made without run_dir.")
        if run.has("images.safetensors"):
            self.maker.load(run)
        if run.has(_WIDTHS) and self.quant_maker is not None:
            self._swap_again(self.quant_maker, run.read_json(_WIDTHS))
        if run.has("quant_model.safetensors"):
            load_quant_state(self._quant_model, run.read_tensors("quant_model.safetensors"))

    def report(self, **extra: Any) -> Report:
        """Figures of this run so far, see :func:`maskaq_brevitas.report.make_report`."""
        from maskaq_brevitas.report import make_report

        return make_report(self, **extra)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context whose seconds and peak memory are noted in :attr:`stages`, and so in the report."""
        return stage(self.stages, name)

    # -- inside -------------------------------------------------------------------------------------------------

    def _stages(self, tuning: TuningConfig | Sequence[TuningConfig] | None) -> tuple[TuningConfig, ...]:
        return tuple(with_precision(config, self.device) for config in tuning_stages(tuning))

    def _in_place(self, network: nn.Module) -> nn.Module:
        """A quant or frozen model in the larger model, if there is one."""
        return network if self.hosted is None else self.hosted.host(network)

    def _snapshot(self) -> nn.Module:
        return frozen_snapshot(self._quant_model, self.geometry.input_size)

    def _assign_widths(self) -> None:
        """Mixed precision: choose the widths of layers on the synthetic images, once, and swap by them."""
        average = self.scheme.average_bits
        if self.quant_maker is None or average is None or self.allocated:
            return
        if self.run is not None and self.run.has(_WIDTHS):
            self._swap_again(self.quant_maker, self.run.read_json(_WIDTHS))
            return
        with self.stage("choice of bit widths"):
            batches = self._calibration_batches(self.quant_maker)
            allocated = self.quant_maker.allocation(average, self.maker.float_snapshot, batches, self._bar)
        self._swap_again(self.quant_maker, allocated)
        if self.run is not None:
            self.run.write_json(_WIDTHS, self.allocated)

    def _swap_again(self, quant_maker: QuantModelMaker, allocated: Mapping[str, str]) -> None:
        """Give the quant model other widths; it stays the same object for whoever holds it."""
        quant_maker.allocated = dict(allocated)
        self._quant_model._modules = quant_maker.make()._modules

    def _calibration_batches(self, quant_maker: QuantModelMaker) -> list[Tensor]:
        """Normalised images of the pool on the device, some of them if it is a large one."""
        chosen = quant_maker.chosen(self.pool.pixels)
        return [self.pool.images(part).to(self.device) for part in chosen.split(self.batch_size or 16)]

    def _coupled_snapshot(self) -> nn.Module | None:
        """Q for the alignment term. Uncalibrated, it gets provisional scales from one batch made without that term."""
        if self.synthesis.align_weight == 0:
            return None
        if is_calibrated(self._quant_model):
            return self._snapshot()
        return self._provisional_snapshot([self.maker.warm_up()])

    def _provisional_snapshot(self, batches: list[Tensor]) -> nn.Module:
        """A snapshot calibrated on ``batches``, with the quant model left as it was.

        Brevitas ignores a second calibration, so a model that was given must stay uncalibrated; and a resumed run,
        which skips this, must start its calibration from the same bytes.
        """
        if self.quant_maker is not None:
            return frozen_snapshot(self.quant_maker.provisional(batches), self.geometry.input_size)
        with provisional_calibration(self._quant_model, batches, self._returned) as quant_model:
            return frozen_snapshot(quant_model, self.geometry.input_size)

    def _tuning_stage(
        self, index: int, config: TuningConfig, optimizer: OptimizerFactory | None
    ) -> DistillStage | ReconstructStage:
        common: dict[str, Any] = dict(history=self.history, run=self.run, stage=index, bar=self._bar)
        if isinstance(config, ReconstructConfig):
            return ReconstructStage(self._quant_model, self.maker, config, **common)

        def refresh() -> None:
            self.refresh(share=config.refresh_share, steps=config.refresh_steps, start=config.refresh_start)

        return DistillStage(
            self._quant_model, self.maker, config, refresh=refresh, optimizer=optimizer, **common
        )


_WIDTHS = "bits.json"
