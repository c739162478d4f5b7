"""Fills and refreshes pools of synthetic images, batch by batch, so that an interrupted run can go on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any
from typing import Literal

import torch
from torch import Tensor
from torch import nn

from maskaq_brevitas.config import SynthesisConfig
from maskaq_brevitas.models.geometry import Geometry
from maskaq_brevitas.progress import BarFactory
from maskaq_brevitas.progress import random_stream
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.run_directory import RunDirectory
from maskaq_brevitas.run_directory import fingerprint
from maskaq_brevitas.synthesis.pool import SyntheticImages
from maskaq_brevitas.synthesis.pool import balanced_labels
from maskaq_brevitas.synthesis.procedural import procedural_places
from maskaq_brevitas.synthesis.scenes import scene_images
from maskaq_brevitas.synthesis.synthesizer import masked_alignment
from maskaq_brevitas.synthesis.synthesizer import seen_by
from maskaq_brevitas.synthesis.synthesizer import synthesize

__all__ = ["PoolMaker", "RefreshStart", "device_batches", "drop_batches"]

RefreshStart = Literal["images", "noise"]

# Numbers of random streams that belong to no batch.
_LABELS, _HELD_BACK_LABELS, _DRAWN, _HELD_BACK_DRAWN = 99_999, 99_998, 99_997, 99_996
_WARM_RATE = 0.25
_DRAWN_AT_ONCE = 64


def device_batches(pool: SyntheticImages, size: int, device: torch.device) -> Iterator[Tensor]:
    """The pool's images in order, normalised, ``(size, channels, height, width)`` each, on ``device``."""
    for start in range(0, len(pool), size):
        yield pool.images(pool.pixels[start : start + size]).to(device)


class PoolMaker:
    """Makes the images of a pool and, at its first version, of the held-back pool.

    Args:
        float_model: the float model P; not changed.
        geometry: of the model.
        pool: the images to fill.
        held_back: images that only measure, or None.
        config: how images are made.
        seed: of all randomness.
        device: where the networks run.
        bar: makes progress bars.

    Attributes:
        redrawn: images drawn again so far because their objective was not finite.
        traces: of each batch made by this process: mean of objective and terms at the first and last iteration.
    """

    def __init__(
        self,
        float_model: nn.Module,
        geometry: Geometry,
        pool: SyntheticImages,
        held_back: SyntheticImages | None,
        config: SynthesisConfig,
        *,
        seed: int,
        device: torch.device,
        bar: BarFactory,
    ):
        self.float_model = float_model
        self.geometry = geometry
        self.pool = pool
        self.held_back = held_back
        self.config = config
        self.seed = seed
        self.device = device
        self.bar = bar
        self.redrawn = 0
        self.traces: list[dict[str, tuple[float, float]]] = []

    @cached_property
    def float_snapshot(self) -> nn.Module:
        """The float model with its attention written out, frozen, on the device. One copy serves all stages."""
        return float_snapshot(self.float_model).to(self.device)

    def warm_up(self) -> Tensor:
        """One batch made without the alignment term, for provisional scales; on the device."""
        generator = random_stream(self.seed, 0)
        count = min(len(self.pool), self.config.batch_size)
        labels = balanced_labels(count, self.geometry.num_classes, generator)
        steps = self.config.resolved_warmup_steps
        with self.bar(steps, "Warming up") as bar:
            batch = synthesize(
                self.float_snapshot, None, self.geometry, labels, self.config, generator=generator, steps=steps,
                on_step=lambda *_: bar.update(),
            )  # fmt: skip
        return batch.images.to(self.device)

    def fill(self, quant_snapshot: nn.Module | None, run: RunDirectory | None) -> None:
        """Make version 1 of the pool, and the held-back images.

        Raises:
            SynthesisError: if an image stays non-finite after the configured number of draws.
        """
        jobs: list[tuple[SyntheticImages, Tensor, Tensor]] = []
        for pool, label_stream, drawn_stream in (
            (self.pool, _LABELS, _DRAWN), (self.held_back, _HELD_BACK_LABELS, _HELD_BACK_DRAWN)
        ):  # fmt: skip
            if pool is not None:
                self._draw(pool, random_stream(self.seed, 1, drawn_stream))
                places = self._synthesised(pool)
                labels = self._labels(len(places), 1, label_stream)
                jobs += [(pool, places[part], labels[part]) for part in self._chunks(torch.arange(len(places)))]
        self._make(1, jobs, quant_snapshot, self.config.steps, "Synthesising images", run)

    def refresh(
        self, quant_model: nn.Module, run: RunDirectory | None, *, count: int, steps: int, start: RefreshStart
    ) -> dict[str, Any]:
        """Make the ``count`` oldest images again, against a calibrated quant model, as the pool's next version.

        Images that were drawn and not optimised stay.

        Args:
            count: at most :attr:`refreshable`.
            steps: iterations.
            start: ``"images"`` continues from the present images, at a quarter of the learning rate; ``"noise"`` begins
                anew, with the labels of these images in a new order.

        Returns:
            What changed, with the alignment before and after.
        """
        version = self.pool.version + 1
        snapshot = frozen_snapshot(quant_model, self.geometry.input_size)
        entry = dict(event="refresh", version=version, images=count, steps=steps, start=start)
        name = _plan_name(version)
        plan = {**entry, "quant_model": fingerprint(quant_model)}
        found = run.read_json(name) if run is not None and run.has(name) else {}
        if all(found.get(key) == value for key, value in plan.items()):
            entry["alignment_before"] = found["alignment_before"]
        else:
            if run is not None and found:
                drop_batches(run, version)  # of a refresh against another quant model
            entry["alignment_before"] = self.alignment(snapshot)
            if run is not None:  # the images that it was measured on will be gone
                run.write_json(name, {**plan, **entry})
        places = self._synthesised(self.pool)
        indices = places[self.pool.made_at[places].argsort(stable=True)[:count]].sort().values
        labels = self.pool.labels[indices].clone()
        if start == "noise":
            labels = labels[torch.randperm(count, generator=random_stream(self.seed, version, _LABELS))]
        jobs = [(self.pool, indices[part], labels[part]) for part in self._chunks(torch.arange(count))]
        self._make(version, jobs, snapshot, steps, f"Refreshing images ({version})", run, warm=start == "images")
        return {**entry, "alignment_after": self.alignment(snapshot)}

    def finished_refresh(self, quant_model: nn.Module, run: RunDirectory) -> dict[str, Any]:
        """What :meth:`refresh` would have returned, for the pool's present version, if the run had not died after it.
        """
        entry = run.read_json(_plan_name(self.pool.version))
        del entry["quant_model"]
        return {**entry, "alignment_after": self.alignment(
            frozen_snapshot(quant_model, self.geometry.input_size)
        )}

    @torch.no_grad()
    def alignment(self, quant_snapshot: nn.Module) -> float:
        """Mean masked attention distance between float and quant model over the optimised images; lower is closer."""
        values = [
            masked_alignment(self.float_snapshot, quant_snapshot, self.geometry, images.to(self.device), self.config)
            for images in map(
                self.pool.images, self.pool.pixels[self._synthesised(self.pool)].split(self.config.batch_size)
            )
        ]
        return float(torch.cat(values).mean())

    def save(self, run: RunDirectory) -> None:
        """Write both pools; the main one last, because its presence says that both are whole."""
        if self.held_back is not None:
            self.held_back.save(run.file("held_back.safetensors"))
        self.pool.save(run.file("images.safetensors"))

    def load(self, run: RunDirectory) -> None:
        """Read both pools.

        Raises:
            RunDirectoryError: if a file is missing, damaged, or of another geometry or number of images.
        """
        if self.held_back is not None:
            self.held_back.load(run.file("held_back.safetensors"))
        self.pool.load(run.file("images.safetensors"))

    @property
    def refreshable(self) -> int:
        """Number of images in the pool that are optimised, and so can follow the quant model."""
        return len(self._synthesised(self.pool))

    def _synthesised(self, pool: SyntheticImages) -> Tensor:
        """Indices of the images that are optimised; the others are drawn."""
        return (~procedural_places(len(pool), self.config.procedural_share)).nonzero().flatten()

    def drawn(self, count: int, stream: int) -> Tensor | None:
        """Scenes that belong to no pool, as uint8 pixels ``(count, channels, height, width)``; None for none."""
        if count == 0:
            return None
        pixels = torch.empty(count, *self.geometry.input_size, dtype=torch.uint8)
        with self.bar(count, "Drawing images") as bar:
            for number, chunk in enumerate(torch.arange(count).split(_DRAWN_AT_ONCE)):
                generator = random_stream(self.seed, stream, number)
                shares = scene_images((len(chunk), *self.geometry.input_size), generator)
                pixels[chunk] = shares.mul(255).round().to(torch.uint8)
                bar.update(len(chunk))
        return pixels

    def _draw(self, pool: SyntheticImages, generator: torch.Generator) -> None:
        """Put the images that no optimiser makes; their label is what the float model sees in them."""
        places = procedural_places(len(pool), self.config.procedural_share).nonzero().flatten()
        for chunk in self._chunks(places) if len(places) else ():
            shares = scene_images((len(chunk), *self.geometry.input_size), generator)
            images = self.geometry.normalize(shares)
            outputs, informative = seen_by(self.float_snapshot, self.geometry, images.to(self.device), self.config)
            labels = outputs.argmax(dim=-1) if self.geometry.num_classes else torch.zeros(len(chunk), dtype=torch.long)
            pool.put(chunk, images, labels, informative)

    def _labels(self, count: int, version: int, number: int) -> Tensor:
        return balanced_labels(count, self.geometry.num_classes, random_stream(self.seed, version, number))

    def _chunks(self, indices: Tensor) -> tuple[Tensor, ...]:
        return indices.split(self.config.batch_size)

    def _make(
        self,
        version: int,
        jobs: list[tuple[SyntheticImages, Tensor, Tensor]],
        quant_snapshot: nn.Module | None,
        steps: int,
        title: str,
        run: RunDirectory | None,
        *,
        warm: bool = False,
    ) -> None:
        """Each job (pool, indices, labels) is one batch, and with a run directory one file until all are done."""
        rate = self.config.learning_rate * (_WARM_RATE if warm else 1.0)
        names: list[str] = []
        done: list[tuple[Any, ...]] = []
        with self.bar(len(jobs) * steps, title) as bar:
            for number, (pool, chunk, labels) in enumerate(jobs):
                names.append(f"state/images-{version}-{number:04d}.safetensors")
                if run is not None and run.has(names[-1]):
                    found = run.read_tensors(names[-1])
                    bar.update(steps)
                else:
                    batch = synthesize(
                        self.float_snapshot, quant_snapshot, self.geometry, labels, self.config,
                        generator=random_stream(self.seed, version, number), steps=steps, learning_rate=rate,
                        start=pool.images(pool.pixels[chunk]) if warm else None,
                        on_step=lambda _step, objective: (bar.update(), bar.set_postfix(objective=f"{objective:.3f}")),
                    )  # fmt: skip
                    found = {"pixels": pool.to_pixels(batch.images), "informative": batch.informative}
                    found["redrawn"] = torch.tensor(batch.redrawn)
                    found["trace"] = torch.tensor([batch.trace["objective"]])
                    if run is not None:
                        run.write_tensors(names[-1], found)
                    self.traces.append(batch.trace)
                self.redrawn += int(found["redrawn"])
                done.append((pool, chunk, found["pixels"], labels, found["informative"]))
        # All at once: an interruption must not leave a pool that is half replaced.
        for pool, *batch_parts in done:
            pool.put(*batch_parts, version=version)
        self.pool.version = version
        if self.held_back is not None:
            self.held_back.version = max(1, self.held_back.version)
        if run is not None:
            self.save(run)
            run.remove(*names)


def _plan_name(version: int) -> str:
    return f"state/refresh-{version}.json"


def drop_batches(run: RunDirectory, version: int) -> None:
    """Remove what is left on disk of the single batches of versions up to this one."""
    for path in run.path.glob("state/images-*.safetensors"):
        if int(path.name.split("-")[1]) <= version:
            path.unlink()
