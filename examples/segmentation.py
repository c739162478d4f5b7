"""A segmentation model whose Vision Transformer backbone is quantized without data.

The model is a small timm ViT (``features_only``, 64 x 64 pixels, patch 8) under a head of two convolutions. It learns
here to say of each pixel which of six materials it shows, on mosaics of photographs that scikit-image ships: the left
half of each photograph is for training, the right half for testing. Then its backbone is quantized, with ranges from
Gaussian noise, from synthetic images and from training images, and once more tuned on synthetic images; the table gives
the mean intersection over union on the test mosaics.

    pip install scikit-image
    python examples/segmentation.py --output runs/segmentation

Training takes about four minutes on one core; ``--weights runs/segmentation/segmentation.safetensors`` leaves it out.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import skimage
import timm
import torch
from PIL import Image
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas.config import DistillConfig
from maskaq_brevitas.errors import SkippedLayerWarning

MATERIALS = ("brick", "grass", "gravel", "coins", "page", "hubble_deep_field")
SIDE, PATCH = 64, 8
#: Of the labels in pictures, one colour for each material.
COLOURS = torch.tensor([
    [180, 70, 50], [60, 160, 60], [120, 120, 120], [210, 180, 60], [230, 230, 230], [20, 30, 90],
])  # fmt: skip


class Segmenter(nn.Module):
    """A timm ViT as encoder, and a head that turns the tokens of three of its blocks into classes of pixels.

    Images ``(batch, 3, 64, 64)``, normalised, to logits ``(batch, materials, 64, 64)``.
    """

    def __init__(self, width: int = 96):
        super().__init__()
        self.encoder = timm.create_model(
            "vit_tiny_patch16_224", features_only=True, out_indices=(1, 3, 5), img_size=SIDE, patch_size=PATCH,
            embed_dim=width,
            depth=6, num_heads=3, mlp_ratio=3.0,
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Conv2d(3 * width, width, 1), nn.GELU(),
            nn.Conv2d(width, len(MATERIALS) * PATCH**2, 3, padding=1), nn.PixelShuffle(PATCH),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat(self.encoder(images), dim=1))


def photographs(train: bool) -> list[Tensor]:
    """One half of each photograph, grey, at half of its size: ``(height, width)`` in [0, 1] each."""
    halves = []
    for name in MATERIALS:
        pixels = torch.from_numpy(np.array(getattr(skimage.data, name)())).float() / 255
        grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(dim=-1)
        grey = F.interpolate(grey[None, None], scale_factor=0.5, mode="area")[0, 0]
        middle = grey.shape[1] // 2
        halves.append(grey[:, :middle] if train else grey[:, middle:])
    return halves


def mosaics(count: int, photos: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mosaics of materials with wavy borders, each piece a crop that is turned, mirrored and tinted at random.

    Returns:
        Images ``(count, 3, 64, 64)`` in [0, 1] and labels ``(count, 64, 64)``.
    """
    images, labels = torch.empty(count, 3, SIDE, SIDE), torch.empty(count, SIDE, SIDE, dtype=torch.long)
    places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).float()  # (2, 64, 64)
    for index in range(count):
        pieces = int(torch.randint(2, 5, (), generator=generator))
        seeds = torch.rand(pieces, 2, 1, 1, generator=generator) * SIDE
        waves = F.interpolate(torch.randn(1, 2, 6, 6, generator=generator) * 4, size=SIDE, mode="bicubic")[0]
        nearest = (places + waves - seeds).square().sum(dim=1).argmin(dim=0)  # (64, 64), number of the piece
        for piece in range(pieces):
            material = int(torch.randint(len(photos), (), generator=generator))
            inside = nearest == piece
            images[index, :, inside] = _crop(photos[material], generator)[:, inside]
            labels[index, inside] = material
    return images, labels


def _crop(photo: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of a photograph, ``(3, 64, 64)``, turned, mirrored, and in a random tint, brightness and contrast."""
    top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in photo.shape)
    crop = photo[top : top + SIDE, left : left + SIDE]
    crop = torch.rot90(crop, int(torch.randint(4, (), generator=generator)), (0, 1))
    crop = crop.flip(0) if torch.rand((), generator=generator) < 0.5 else crop
    contrast, *tint = (0.8 + 0.4 * torch.rand(4, generator=generator)).tolist()
    grey = (crop - crop.mean()) * contrast + crop.mean()
    return (grey * torch.tensor(tint).view(3, 1, 1)).clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] -> model input, as timm's configuration of this ViT says."""
    return (images - 0.5) / 0.5


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """Materials ``(images, 64, 64)`` that a model sees in images in [0, 1]."""
    return torch.cat([model(normalise(part)).argmax(dim=1) for part in images.split(32)])


def mean_iou(found: Tensor, labels: Tensor) -> float:
    """Intersection over union over all pixels of all images, mean over the materials in either, percent."""
    count = len(MATERIALS)
    confusion = torch.bincount((labels * count + found).flatten(), minlength=count**2).view(count, count).double()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float(100 * (hits / union)[union > 0].mean())


def train(steps: int, mosaics_count: int, seed: int, batch: int = 32) -> tuple[nn.Module, float]:
    """A trained model in evaluation mode, and the minutes that it took."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = mosaics(mosaics_count, photographs(train=True), generator)
    model = Segmenter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = F.cross_entropy(model(normalise(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1:4d}/{steps}  loss {loss.item():.3f}  {(time.perf_counter() - start) / 60:.1f} min",
                flush=True,
            )
    return model.eval(), (time.perf_counter() - start) / 60


def quantized_models(
    model: nn.Module, scheme: str, seed: int, args: argparse.Namespace
) -> tuple[dict[str, nn.Module], Tensor]:
    """Frozen models by the images that they were quantized on, and the synthetic images in [0, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayerWarning)  # the head stays in float, as the table says
        calibrator = DataFreeCalibrator(
            model, backbone="encoder", scheme=scheme, num_images=args.images, steps=args.steps, seed=seed,
            progress=False,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1000 + seed)
    real, _ = mosaics(args.images, photographs(train=True), generator)
    found = {
        "Gaussian noise": calibrator.calibrated_on(torch.randn(args.images, 3, SIDE, SIDE, generator=generator)),
        "Training images": calibrator.calibrated_on(normalise(real)),
    }
    calibrator.calibrate()
    found["Synthetic images"] = calibrator.freeze()
    if args.tune_steps:
        epochs = max(1, args.tune_steps // 50)
        calibrator.quantize(DistillConfig(
            epochs=epochs, steps_per_epoch=min(50, args.tune_steps), refresh_every=None, distance_weight=0.0,
            feature_weight=1.0,
            augment="light", learning_rate=4e-5, final_learning_rate=4e-7, weight_learning_rate=2e-3,
            scale_learning_rate=5e-3,
        ))  # fmt: skip
        found["Synthetic images, tuned"] = calibrator.freeze()
    return found, calibrator.pool.pixels.float() / 255


def picture(path: Path, images: Tensor, labels: dict[str, Tensor], synthetic: Tensor) -> None:
    """A PNG of rows of eight: images, the labels and predictions given, synthetic images; enlarged twice."""
    rows = [images, *(COLOURS[label].permute(0, 3, 1, 2).float() / 255 for label in labels.values()), synthetic[:8]]
    lines = [torch.cat([F.pad(image, (1, 1, 1, 1), value=1.0) for image in row], dim=2) for row in rows]
    pixels = torch.cat(lines, dim=1).clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    grid = Image.fromarray(pixels.numpy())
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(path)


def parser() -> argparse.ArgumentParser:
    """The command line; every option with its unit and default."""
    result = argparse.ArgumentParser(
        description="Quantizes the backbone of a segmentation model without data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument(
        "--output", type=Path, default=Path("runs/segmentation"), help="folder for weights, figures, pictures"
    )
    result.add_argument("--weights", type=Path, help="safetensors file of a model trained before")
    result.add_argument("--train-steps", type=int, default=900, help="training steps of 32 mosaics")
    result.add_argument("--mosaics", type=int, default=2048, help="different mosaics to train on")
    result.add_argument("--train-seed", type=int, default=0, help="seed of the training")
    result.add_argument("--test-mosaics", type=int, default=256, help="mosaics to evaluate on")
    result.add_argument("--schemes", nargs="+", default=["w4a4", "w3a3"], help="bit widths of the backbone")
    result.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the images to quantize on")
    result.add_argument("--images", type=int, default=32, help="images to quantize on, of each kind")
    result.add_argument("--steps", type=int, default=60, help="iterations of synthesis")
    result.add_argument("--tune-steps", type=int, default=100, help="steps of tuning on synthetic images; 0: none")
    result.add_argument("--threads", type=int, default=1, help="CPU threads")
    return result


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.weights is None:
        model, minutes = train(args.train_steps, args.mosaics, args.train_seed)
        print(f"trained in {minutes:.1f} minutes")
        safetensors.torch.save_file(model.state_dict(), args.output / "segmentation.safetensors")
    else:
        model = Segmenter().eval()
        model.load_state_dict(safetensors.torch.load_file(args.weights))
    images, labels = mosaics(args.test_mosaics, photographs(train=False), torch.Generator().manual_seed(77))
    reference = predicted(model, images)
    table: dict[str, dict[str, list[float]]] = {
        "Float model": {scheme: [mean_iou(reference, labels)] for scheme in args.schemes}
    }
    for scheme in args.schemes:
        for seed in args.seeds:
            start = time.perf_counter()
            models, synthetic = quantized_models(model, scheme, seed, args)
            seen = {name: predicted(network, images) for name, network in models.items()}
            for name, found in seen.items():
                table.setdefault(name, {}).setdefault(scheme, []).append(mean_iou(found, labels))
            shown = ", ".join(f"{name} {table[name][scheme][-1]:.1f}" for name in seen)
            print(f"{scheme}, seed {seed}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
            if seed == args.seeds[0]:
                rows = {"truth": labels, "float": reference, **seen}
                picture(
                    args.output / f"{scheme}.png", images[:8], {name: row[:8] for name, row in rows.items()}, synthetic
                )
    (args.output / "figures.json").write_text(
        json.dumps({"mIoU": table, "arguments": vars(args)}, indent=2, default=str) + "\n"
    )
    print(f"\nmIoU [%] on {args.test_mosaics} test mosaics; backbone quantized, head in float; seeds {args.seeds}")
    print("\n".join(lines_of(table, args.schemes)))


def lines_of(table: dict[str, dict[str, list[float]]], schemes: list[str]) -> list[str]:
    """The table in Markdown: mean over seeds, and their standard deviation where there are several."""
    lines = ["| images | " + " | ".join(schemes) + " |", "|---|" + "---:|" * len(schemes)]
    for name, cells in table.items():
        values = [torch.tensor(cells[scheme], dtype=torch.float64) for scheme in schemes]
        texts = [f"{float(v.mean()):.1f}" + (f" ± {float(v.std()):.1f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return lines


if __name__ == "__main__":
    main()
