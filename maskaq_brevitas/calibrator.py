"""``DataFreeCalibrator``: a calibration DataLoader for a model without data, and the facade over the stages of a run."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from maskaq_brevitas.config import DistillConfig, Scheme, SynthesisConfig, resolve_scheme, to_mapping
from maskaq_brevitas.errors import ConfigurationError, InputError, RunDirectoryError, SkippedLayerWarning
from maskaq_brevitas.models.geometry import Geometry, read_geometry
from maskaq_brevitas.quant.equalize import EqualizedPlace, equalize
from maskaq_brevitas.quant.snapshot import float_snapshot, frozen_snapshot
from maskaq_brevitas.quant.swap import SwapRecord, swap_layers
from maskaq_brevitas.run_directory import RunDirectory, fingerprint, installed_versions
from maskaq_brevitas.synthesis.pool import SyntheticImages, balanced_labels
from maskaq_brevitas.synthesis.synthesizer import masked_alignment, synthesize
from maskaq_brevitas.tuning.calibrate import calibrate, is_calibrated, provisional_calibration
from maskaq_brevitas.tuning.checkpoint import TuningProgress, load_progress, save_progress
from maskaq_brevitas.tuning.distill import Distiller, Losses, OptimizerFactory
from maskaq_brevitas.tuning.ranges import search_ranges

__all__ = ["DataFreeCalibrator"]


class DataFreeCalibrator(DataLoader):
    """Synthetic calibration batches for a Vision Transformer, made from the model itself.

    A ``torch.utils.data.DataLoader``: iterating yields ``(images, labels)``, images normalised float32
    ``(batch, channels, height, width)`` on the CPU, labels int64 ``(batch,)``. The images are made at first use and stay
    the same on every pass, until :meth:`refresh` replaces them in place.

    Args:
        float_model: trained float model of a registered family (timm ViT, DeiT ...). It is not changed.
        quant_model: a Brevitas model of it that exists already; ``None`` swaps the layers by ``scheme``.
        scheme: name (``"w4a8"``, ``"strict-w4a4"`` ...) or :class:`~maskaq_brevitas.config.Scheme`.
        overrides: shell pattern of layer names -> ``wXaY``.
        num_images: images in the pool.
        batch_size: images per batch of the loader.
        steps: iterations of synthesis per batch; overrides ``synthesis.steps``.
        held_back: images that only measure and select, never calibrate; ``None`` means an eighth of
            ``num_images``, at least 8.
        synthesis: everything else about how images are made.
        tuning: how :meth:`quantize` tunes the quant model; ``None`` only calibrates it.
        seed: of all randomness. Same seed, machine and thread count: the same bytes.
        device: where the networks run; ``None`` means where ``float_model`` is.
        run_dir: folder in which finished batches and results are kept, so that an interrupted run can continue.
        run_mode: ``"new"``, ``"resume"`` or ``"overwrite"``, see :class:`~maskaq_brevitas.run_directory.RunDirectory`.
        progress: show progress bars; they are silent when the output is no terminal.
        **loader: further arguments of ``DataLoader`` (``num_workers``, ``pin_memory``, ``shuffle`` ...).

    Raises:
        ConfigurationError: unknown scheme or pattern, or a loader argument that would break the contract.
        InputError: if ``num_images`` is below 1.
        ModelError: if the model has no known attention.

    Example:
        >>> from maskaq_brevitas import DataFreeCalibrator, load_model
        >>> model = load_model("digits_vit")
        >>> calibrator = DataFreeCalibrator(model, scheme="w4a4", num_images=4, steps=2, progress=False)
        >>> images, labels = next(iter(calibrator))
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        float_model: nn.Module,
        quant_model: nn.Module | None = None,
        *,
        scheme: str | Scheme = "w4a8",
        overrides: Mapping[str, str] | None = None,
        num_images: int = 64,
        batch_size: int = 16,
        steps: int | None = None,
        held_back: int | None = None,
        synthesis: SynthesisConfig | None = None,
        tuning: DistillConfig | None = None,
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
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise InputError(f"num_images: expected a whole number >= 1, got {num_images!r}.")
        self.float_model = float_model
        self.geometry: Geometry = read_geometry(float_model)
        self.scheme = resolve_scheme(scheme)
        self.overrides = dict(overrides or {})
        self.synthesis = synthesis or SynthesisConfig()
        if steps is not None:
            self.synthesis = replace(self.synthesis, steps=steps)
        self.tuning = tuning
        self.seed = seed
        self.device = torch.device(device) if device is not None else next(float_model.parameters()).device
        self.progress = progress
        self.swap_record: SwapRecord | None = None
        self._owns_quant_model = quant_model is None
        self._given_quant_model = None if quant_model is None else fingerprint(quant_model)
        if quant_model is None:
            quant_model, self.swap_record = swap_layers(float_model, self.scheme, self.overrides)
        self._quant_model = quant_model.to(self.device)
        self.equalized: list[EqualizedPlace] = []
        self.range_factors: dict[str, float] = {}
        self.stages: list[dict[str, Any]] = []
        self.refreshes: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.redrawn = 0
        self.traces: list[dict[str, tuple[float, float]]] = []
        count = max(8, num_images // 8) if held_back is None else held_back
        self.held_back = SyntheticImages(count, self.geometry) if count else None
        self.run: RunDirectory | None = None
        if run_dir is not None:
            self.run = RunDirectory(run_dir, self.identity(num_images), run_mode)
        super().__init__(SyntheticImages(num_images, self.geometry), batch_size=batch_size, **loader)

    # -- the loader ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.ensure_images()
        return super().__iter__()

    @property
    def pool(self) -> SyntheticImages:
        """The synthetic images (empty until first use, see :meth:`ensure_images`)."""
        return self.dataset  # type: ignore[return-value]

    @property
    def quant_model(self) -> nn.Module:
        """The quant model: ours, or the one that was given."""
        return self._quant_model

    @property
    def version(self) -> int:
        """How often the pool was made or replaced."""
        return self.pool.version

    # -- the stages ---------------------------------------------------------------------------------------------

    def ensure_images(self) -> SyntheticImages:
        """Make the images if there are none yet; return the pool.

        Raises:
            SynthesisError: if an image stays non-finite after the configured number of draws.
        """
        if self.pool.version > 0:
            return self.pool
        if self.run is not None and self.run.has("images.safetensors"):
            self._load_pools()
            self._drop_batches(self.pool.version)
            return self.pool
        # Calibration loops iterate under no_grad or in inference mode, whose tensors could not be differentiated.
        with torch.inference_mode(False), torch.no_grad(), self._stage("synthesis"):
            quant_snapshot = self._coupled_snapshot()
            self._make_images(1, quant_snapshot, self.synthesis.steps, None, "Synthesising images")
        return self.pool

    def calibrate(self) -> nn.Module:
        """Set all scales of the quant model on the finished images; return the quant model.

        With our own swap this equalises channels, calibrates through Brevitas' ``calibration_mode`` and refines ranges,
        as the scheme says. A model that was given is calibrated as it is.
        """
        self.ensure_images()
        with self._stage("calibration"):
            self._calibrate_on(list(self._images_of(self.pool)))
        return self._quant_model

    def quantize(
        self, tuning: DistillConfig | None = None, *, optimizer: OptimizerFactory | None = None
    ) -> nn.Module:
        """Synthesise, calibrate and, with a tuning, distil; return the quant model, ready for export.

        With a run directory every epoch is kept, and an interrupted run goes on where it was. The state that is kept in
        the end is the one with the lowest loss on the held-back images, the calibrated one included (without held-back
        images: the last). :attr:`history` tells the losses and refreshes.

        Args:
            tuning: ``None`` means that of the constructor; if that is ``None`` too, nothing is tuned.
            optimizer: builds another optimiser than ``tuning.optimizer``, for example ``torch.optim.RMSprop``.

        Raises:
            ConfigurationError: if the constructor was given another tuning.
            RunDirectoryError: if the run directory holds a run with another tuning.
            TuningError: if the loss stays non-finite for a whole epoch.
        """
        if tuning is not None and self.tuning not in (None, tuning):
            raise ConfigurationError(
                "quantize() got another tuning than the constructor. Give it to one of them, or make a new calibrator."
            )
        tuning = self.tuning if tuning is None else tuning
        if tuning is None:
            return self.calibrate()
        if self.run is not None:
            self.run.claim("tuning.json", to_mapping(tuning))
        self.ensure_images()
        found = load_progress(self.run) if self.run is not None else None
        if found is None:
            self.calibrate()
        else:
            load_quant_state(self._quant_model, found[1])
        with self._stage("tuning, its refreshes included"):
            steps = math.ceil(len(self.pool) / tuning.batch_size)
            distiller = Distiller(
                self._quant_model, self._float_snapshot(), tuning, prefix=self.geometry.prefix_tokens,
                total_steps=tuning.epochs * steps, optimizer=optimizer,
            )  # fmt: skip
            if found is None:
                progress = self._start_tuning(distiller)
            else:
                progress = found[0]
                distiller.load_state(*found[2:])
                self.history = progress.history
                self.refreshes = [entry for entry in self.history if entry["event"] == "refresh"]
            self._tune(distiller, tuning, progress, steps)
        if self.run is not None:
            self.save()
        return self._quant_model

    def refresh(
        self, *, share: float = 1.0, steps: int | None = None, start: Literal["images", "noise"] = "images"
    ) -> dict[str, Any]:
        """Synthesise again against the quant model as it is now, and replace images of the pool in place.

        Args:
            share: of the pool to replace, in (0, 1]; the images replaced longest ago come first.
            steps: iterations; ``None`` means a quarter of ``synthesis.steps`` from images, all of them from noise.
            start: ``"images"`` continues from the present images, at a quarter of the learning rate; ``"noise"``
                begins anew. The labels of the images replaced stay the same set, in a new order for ``"noise"``.

        Returns:
            What changed: pool version, images replaced, and the masked alignment distance to the quant model
            before and after (lower is closer).

        Raises:
            InputError: if ``share`` is outside (0, 1].
        """
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number in (0, 1], got {share}.")
        self.ensure_images()
        if not is_calibrated(self._quant_model):
            self.calibrate()
        if steps is None:
            steps = self.synthesis.steps if start == "noise" else max(1, self.synthesis.steps // 4)
        count = max(1, round(share * len(self.pool)))
        version = self.pool.version + 1
        with torch.inference_mode(False), torch.no_grad(), self._stage(f"refresh {version}"):
            snapshot = frozen_snapshot(self._quant_model)
            entry = dict(event="refresh", version=version, images=count, steps=steps, start=start)
            entry = self._begin_refresh(entry, snapshot)
            first = (version - 2) * count % len(self.pool)
            indices = (torch.arange(count) + first) % len(self.pool)
            title = f"Refreshing images ({version})"
            self._make_images(version, snapshot, steps, indices, title, warm=start == "images")
            return self._end_refresh(entry, snapshot)

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
            if _refresh_is_due(epoch, refresh_every):
                self.refresh(**refresh)
            yield epoch

    def calibrated_on(self, images: Tensor) -> nn.Module:
        """A fresh quant model with the same quantizers, calibrated in the same way on other images, and frozen.

        This is the row to compare with: noise, or real images where there are some.

        Args:
            images: normalised, ``(images, channels, height, width)``.

        Raises:
            ConfigurationError: if the quant model was given: it cannot be made afresh.
        """
        if not self._owns_quant_model:
            raise ConfigurationError("calibrated_on() needs a scheme to swap layers by; this quant model was given.")
        quant_model = swap_layers(self.float_model, self.scheme, self.overrides)[0].to(self.device)
        self._calibrated(quant_model, list(images.to(self.device).split(self.batch_size or 16)))
        return frozen_snapshot(quant_model)

    def freeze(self) -> nn.Module:
        """A copy of the quant model for fast inference: weights quantized once, scales fixed, no gradients.

        Its outputs equal the quant model's bit for bit; it holds no Brevitas quantizers, so export the quant model.
        """
        return frozen_snapshot(self._quant_model)

    # -- persistence --------------------------------------------------------------------------------------------

    def identity(self, num_images: int | None = None) -> dict[str, Any]:
        """All that affects the numbers of this run, as plain values."""
        return {
            "scheme": to_mapping(self.scheme),
            "overrides": self.overrides,
            "num_images": len(self.pool) if num_images is None else num_images,
            "held_back": len(self.held_back) if self.held_back is not None else 0,
            "synthesis": to_mapping(self.synthesis),
            **({} if self.tuning is None else {"tuning": to_mapping(self.tuning)}),
            **({} if self._owns_quant_model else {"quant_model": self._given_quant_model}),
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
            self._save_pools(run)
        run.write_tensors("quant_model.safetensors", self._quant_model.state_dict())

    def load(self, path: str | Path | None = None) -> None:
        """Take images and quant model from a run directory that :meth:`save` wrote with the same configuration.

        Raises:
            RunDirectoryError: if the directory is missing, damaged, or of another model, scheme or number of images.
        """
        run = self.run
        if path is not None:
            found = RunDirectory.read_identity(path)
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
            self._load_pools(run)
        if run.has("quant_model.safetensors"):
            load_quant_state(self._quant_model, run.read_tensors("quant_model.safetensors"))

    def report(self, **extra: Any):
        """Figures of this run so far, see :func:`maskaq_brevitas.report.make_report`."""
        from maskaq_brevitas.report import make_report

        return make_report(self, **extra)

    # -- inside -------------------------------------------------------------------------------------------------

    def _images_of(self, pool: SyntheticImages) -> Iterator[Tensor]:
        size = self.batch_size or 16
        for start in range(0, len(pool), size):
            yield pool.images(pool.pixels[start : start + size]).to(self.device)

    def _calibrate_on(self, batches: list[Tensor]) -> None:
        self.equalized, self.range_factors = self._calibrated(self._quant_model, batches)

    def _calibrated(
        self, quant_model: nn.Module, batches: list[Tensor]
    ) -> tuple[list[EqualizedPlace], dict[str, float]]:
        """Calibrate a quant model in place; what equalisation and range search found."""
        places: list[EqualizedPlace] = []
        factors: dict[str, float] = {}
        if self._owns_quant_model and self.scheme.equalize:
            places = equalize(quant_model, batches)
        calibrate(quant_model, batches)
        if self._owns_quant_model and self.scheme.activation_range == "search":
            factors = search_ranges(quant_model, batches)
        return places, factors

    def _coupled_snapshot(self) -> nn.Module | None:
        """Q for the alignment term. Uncalibrated, it gets provisional scales from one batch made without that term."""
        if self.synthesis.align_weight == 0:
            return None
        if is_calibrated(self._quant_model):
            return frozen_snapshot(self._quant_model)
        generator = self._generator(0, 0)
        labels = balanced_labels(min(len(self.pool), self.synthesis.batch_size), self.geometry.num_classes, generator)
        steps = self.synthesis.resolved_warmup_steps
        with self._bar(steps, "Warming up") as bar:
            batch = synthesize(
                self._float_snapshot(), None, self.geometry, labels, self.synthesis, generator=generator,
                steps=steps, on_step=lambda *_: bar.update(),
            )  # fmt: skip
        return self._provisional_snapshot([batch.images.to(self.device)])

    def _provisional_snapshot(self, batches: list[Tensor]) -> nn.Module:
        """A snapshot calibrated on ``batches``, with the quant model left as it was.

        Brevitas ignores a second calibration, so a model that was given must stay uncalibrated; and a resumed run, which
        skips this, must start its calibration from the same bytes.
        """
        if self._owns_quant_model:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SkippedLayerWarning)  # given once, by the constructor
                quant_model = swap_layers(self.float_model, self.scheme, self.overrides)[0].to(self.device)
            self._calibrated(quant_model, batches)
            return frozen_snapshot(quant_model)
        with provisional_calibration(self._quant_model, batches) as quant_model:
            return frozen_snapshot(quant_model)

    def _float_snapshot(self) -> nn.Module:
        return float_snapshot(self.float_model).to(self.device)

    def _generator(self, version: int, batch: int) -> torch.Generator:
        """Each batch of each version has a stream of its own, so that batches can be made in any order or resumed."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + version) * 100_003 + batch) % 2**63)

    def _make_images(
        self,
        version: int,
        quant_snapshot: nn.Module | None,
        steps: int,
        indices: Tensor | None,
        title: str,
        *,
        warm: bool = False,
    ) -> None:
        """Synthesise pool (``indices`` of it) and, at version 1, the held-back images; batch by batch on disk."""
        order = self._generator(version, 99_999)
        labels = self.pool.labels.clone()
        if indices is None:
            labels = balanced_labels(len(self.pool), self.geometry.num_classes, order)
        elif not warm:
            labels[indices] = labels[indices][torch.randperm(len(indices), generator=order)]
        jobs = [(self.pool, chunk) for chunk in (torch.arange(len(self.pool)) if indices is None else indices).split(
            self.synthesis.batch_size)]  # fmt: skip
        held_labels = None
        if version == 1 and self.held_back is not None:
            held_labels = balanced_labels(len(self.held_back), self.geometry.num_classes, self._generator(version, 99_998))
            jobs += [(self.held_back, chunk) for chunk in torch.arange(len(self.held_back)).split(self.synthesis.batch_size)]
        ours = self._float_snapshot()
        names: list[str] = []
        done: list[tuple] = []
        rate = self.synthesis.learning_rate * (0.25 if warm else 1.0)
        with self._bar(len(jobs) * steps, title) as bar:
            for number, (pool, chunk) in enumerate(jobs):
                name = f"state/images-{version}-{number:04d}.safetensors"
                names.append(name)
                chunk_labels = (labels if pool is self.pool else held_labels)[chunk]
                if self.run is not None and self.run.has(name):
                    found = self.run.read_tensors(name)
                    bar.update(steps)
                else:
                    batch = synthesize(
                        ours, quant_snapshot, self.geometry, chunk_labels, self.synthesis,
                        generator=self._generator(version, number), steps=steps, learning_rate=rate,
                        start=pool.images(pool.pixels[chunk]) if warm else None,
                        on_step=lambda _step, objective: (bar.update(), bar.set_postfix(objective=f"{objective:.3f}")),
                    )  # fmt: skip
                    found = {"images": batch.images, "informative": batch.informative}
                    found["redrawn"] = torch.tensor(batch.redrawn)
                    found["trace"] = torch.tensor([batch.trace["objective"]])
                    if self.run is not None:
                        self.run.write_tensors(name, found)
                    self.traces.append(batch.trace)
                self.redrawn += int(found["redrawn"])
                done.append((pool, chunk, found["images"], chunk_labels, found["informative"]))
        # All at once: an interruption must not leave a pool that is half replaced.
        for pool, *batch in done:
            pool.put(*batch)
        self.pool.version = version
        if self.held_back is not None:
            self.held_back.version = max(1, self.held_back.version)
        if self.run is not None:
            self._save_pools(self.run)
            self.run.remove(*names)

    def _begin_refresh(self, entry: dict[str, Any], snapshot: nn.Module) -> dict[str, Any]:
        """Measure the alignment before a refresh, and note it on disk: the images will be replaced."""
        name = f"state/refresh-{entry['version']}.json"
        plan = {**entry, "quant_model": fingerprint(self._quant_model)}
        if self.run is not None and self.run.has(name):
            found = self.run.read_json(name)
            if all(found.get(key) == value for key, value in plan.items()):
                return {**entry, "alignment_before": found["alignment_before"]}
            self._drop_batches(entry["version"])  # of a refresh against another quant model
        entry = {**entry, "alignment_before": self._alignment(snapshot)}
        if self.run is not None:
            self.run.write_json(name, {**plan, **entry})
        return entry

    def _end_refresh(self, entry: dict[str, Any], snapshot: nn.Module) -> dict[str, Any]:
        entry = {**entry, "alignment_after": self._alignment(snapshot)}
        self.refreshes.append(entry)
        self.history.append(entry)
        return entry

    def _start_tuning(self, distiller: Distiller) -> TuningProgress:
        """Measure the calibrated model, the first candidate, and keep it: a resumed run must not calibrate again."""
        loss = self._held_back_loss(distiller)
        self.history.append(dict(event="calibration", epoch=0, held_back_loss=loss, pool_version=self.pool.version))
        progress = TuningProgress(
            epochs=0, pool_version=self.pool.version, best_epoch=0, best_loss=math.inf if loss is None else loss,
            best=_copied(self._quant_model), history=self.history,
        )  # fmt: skip
        if self.run is not None:
            save_progress(self.run, progress, self._quant_model.state_dict(), distiller)
        return progress

    def _tune(self, distiller: Distiller, tuning: DistillConfig, progress: TuningProgress, steps: int) -> None:
        """The epochs that are left; then the best state goes into the quant model."""
        with self._bar(tuning.epochs * steps, "Tuning") as bar:
            bar.update(progress.epochs * steps)
            for epoch in range(progress.epochs, tuning.epochs):
                if _refresh_is_due(epoch, tuning.refresh_every):
                    self._refresh_for(tuning, progress)
                start = time.perf_counter()
                generator = self._generator(1_000_000 + epoch, 0)
                trained = distiller.train_epoch(
                    self._shuffled(tuning.batch_size, generator), generator,
                    on_step=lambda loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}")),
                )  # fmt: skip
                loss = self._held_back_loss(distiller)
                progress.epochs, progress.pool_version = epoch + 1, self.pool.version
                self.history.append(dict(
                    event="epoch", epoch=epoch + 1, train_loss=trained.total, train_divergence=trained.divergence,
                    train_distance=trained.distance, skipped_steps=trained.skipped, held_back_loss=loss,
                    pool_version=self.pool.version, seconds=round(time.perf_counter() - start, 2),
                ))  # fmt: skip
                if loss is None or loss < progress.best_loss:
                    progress.best_epoch, progress.best = epoch + 1, _copied(self._quant_model)
                    progress.best_loss = math.inf if loss is None else loss
                if self.run is not None:
                    save_progress(self.run, progress, self._quant_model.state_dict(), distiller)
        load_quant_state(self._quant_model, progress.best)
        self.best_epoch = progress.best_epoch

    def _refresh_for(self, tuning: DistillConfig, progress: TuningProgress) -> None:
        """Refresh the images, unless the run died between a finished refresh and the checkpoint after it."""
        if self.pool.version == progress.pool_version:
            self.refresh(share=tuning.refresh_share, steps=tuning.refresh_steps, start=tuning.refresh_start)
        elif self.pool.version == progress.pool_version + 1 and self.run is not None:
            entry = self.run.read_json(f"state/refresh-{self.pool.version}.json")
            del entry["quant_model"]
            self._end_refresh(entry, frozen_snapshot(self._quant_model))
        else:
            raise RunDirectoryError(
                f"The images are of version {self.pool.version}, but the checkpoint of the tuning is of version "
                f"{progress.pool_version}: one of them was replaced by hand. Start the run again with --overwrite."
            )

    def _held_back_loss(self, distiller: Distiller) -> float | None:
        """The objective on the held-back images; infinite if it is not finite, None without such images."""
        if self.held_back is None:
            return None
        losses: Losses = distiller.validation_loss(self._images_of(self.held_back))
        return losses.total if math.isfinite(losses.total) else math.inf

    def _shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        for chunk in torch.randperm(len(self.pool), generator=generator).split(batch_size):
            yield self.pool.images(self.pool.pixels[chunk]).to(self.device)

    def _drop_batches(self, version: int) -> None:
        """Remove what is left on disk of the single batches of versions up to this one."""
        if self.run is not None:
            for path in self.run.path.glob("state/images-*.safetensors"):
                if int(path.name.split("-")[1]) <= version:
                    path.unlink()

    @torch.no_grad()
    def _alignment(self, quant_snapshot: nn.Module) -> float:
        """Mean masked attention distance between float and quant model over the pool."""
        ours = self._float_snapshot()
        values = [
            masked_alignment(ours, quant_snapshot, self.geometry, images, self.synthesis)
            for images in self._images_of(self.pool)
        ]
        return float(torch.cat(values).mean())

    def _save_pools(self, run: RunDirectory) -> None:
        if self.held_back is not None:
            self.held_back.save(run.file("held_back.safetensors"))
        self.pool.save(run.file("images.safetensors"))

    def _load_pools(self, run: RunDirectory | None = None) -> None:
        run = run or self.run
        assert run is not None  # callers have checked
        if self.held_back is not None:
            self.held_back.load(run.file("held_back.safetensors"))
        self.pool.load(run.file("images.safetensors"))

    def _bar(self, total: int, title: str) -> tqdm:
        return tqdm(total=total, desc=title, unit="it", disable=None if self.progress else True, file=sys.stderr)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Note seconds and peak memory of a stage."""
        start = time.perf_counter()
        yield
        self.stages.append(
            {"stage": name, "seconds": round(time.perf_counter() - start, 2), "peak_memory_mib": peak_memory_mib()}
        )


def _refresh_is_due(epoch: int, refresh_every: int | None) -> bool:
    return refresh_every is not None and epoch > 0 and epoch % refresh_every == 0


def _copied(quant_model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in quant_model.state_dict().items()}


def load_quant_state(quant_model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a saved state into a freshly swapped quant model.

    Raises:
        RunDirectoryError: if names or shapes differ.
    """
    try:
        quant_model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise RunDirectoryError(f"The saved quant model does not fit this model and scheme: {error}") from error


def peak_memory_mib() -> int:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))
