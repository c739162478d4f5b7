"""Trains ``digits_vit``, the small Vision Transformer that is shipped inside the package.

The model is a plain timm ``VisionTransformer`` (32 x 32 RGB input, patch 4, about 0.56 M parameters). It learns two
thirds of scikit-learn's handwritten digits; the held-out third is the test split of
:func:`maskaq_brevitas.evaluation.digits_split`. The same seed, thread count and library versions give the same weights.

    python examples/train_digits_vit.py --output runs/digits_vit

writes ``digits_vit.safetensors`` (float32 weights) and ``digits_vit.json`` (architecture, preprocessing, training).
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from maskaq_brevitas.evaluation import DIGITS_SPLIT_SEED
from maskaq_brevitas.evaluation import digits_images

MODEL_ARGS = dict(
    img_size=32, patch_size=4, in_chans=3, num_classes=10, embed_dim=96, depth=6, num_heads=3, mlp_ratio=3.0,
)
MEAN = (0.3, 0.3, 0.3)  # of the training images in [0, 1], rounded
STD = (0.35, 0.35, 0.35)


def random_affine(images: Tensor, generator: torch.Generator, degrees: float, scale: float, shift: float) -> Tensor:
    """Rotates, scales and shifts each image by its own random amount; what enters from outside is black.

    Args:
        images: (batch x channels x height x width), black is 0.
        generator: source of randomness.
        degrees: largest rotation, in degrees, either way.
        scale: largest relative change of size, either way.
        shift: largest shift, as a fraction of the image, either way.

    Returns:
        Images of the same shape.
    """
    batch = images.shape[0]
    rotation, zoom, right, down = torch.rand(4, batch, generator=generator) * 2 - 1  # four of (batch,)
    angle = rotation * math.radians(degrees)
    zoom = 1 + zoom * scale
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    # affine_grid counts positions from -1 to 1, so that an image is two units wide.
    rows = [torch.stack([cosine, -sine, 2 * shift * right], 1), torch.stack([sine, cosine, 2 * shift * down], 1)]
    matrix = torch.stack(rows, dim=1)  # (batch x 2 x 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)  # (batch x height x width x 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] -> model input; both (batch x 3 x height x width)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images, in percent, whose largest logit is that of the label. Images are in [0, 1]."""
    model.eval()
    predictions = torch.cat([model(normalise(part)).argmax(dim=1) for part in images.split(128)])
    return 100.0 * (predictions == labels).double().mean().item()


def train(args: argparse.Namespace) -> tuple[nn.Module, dict]:
    """Trains one model; gives it in eval mode, with the figures of the run (percent, minutes)."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = digits_images(train=True)
    model = VisionTransformer(**MODEL_ARGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    steps_per_epoch = math.ceil(len(labels) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, epochs=args.epochs, steps_per_epoch=steps_per_epoch, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for indices in torch.randperm(len(labels), generator=generator).split(args.batch_size):
            batch = random_affine(images[indices], generator, args.degrees, args.scale, args.shift)
            loss = F.cross_entropy(model(normalise(batch)), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(indices)
        minutes = (time.perf_counter() - start) / 60
        print(f"epoch {epoch + 1:3d}/{args.epochs}  loss {total / len(labels):.4f}  {minutes:.1f} min", flush=True)
    # The held-out third is looked at once, after the last epoch: no epoch is chosen on it.
    test_images, test_labels = digits_images(train=False)
    return model, {
        "top1_test_percent": round(top1(model, test_images, test_labels), 2),
        "top1_train_percent": round(top1(model, images, labels), 2),
        "train_images": len(labels),
        "test_images": len(test_labels),
        "minutes": round(minutes, 1),
    }


def save(model: nn.Module, args: argparse.Namespace, figures: dict) -> None:
    """Writes the weights and the JSON file; each appears under its final name only when whole."""
    args.output.mkdir(parents=True, exist_ok=True)
    config = {
        "name": "digits_vit",
        "architecture": "timm.models.vision_transformer.VisionTransformer",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "num_classes": 10, "input_size": [3, 32, 32], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": MEAN, "std": STD, "first_conv": "patch_embed.proj",
            "classifier": "head", "license": "bsd-3-clause",
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {
            "command": shlex.join(["python", *sys.argv]),
            "data": "sklearn.datasets.load_digits, stratified, one third held out",
            "split_seed": DIGITS_SPLIT_SEED,
            **{key: value for key, value in vars(args).items() if key != "output"},
            **figures,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        },
    }
    weights = safetensors.torch.save(model.state_dict(), metadata={"format": "pt"})
    for name, content in (("digits_vit.safetensors", weights),
                          ("digits_vit.json", (json.dumps(config, indent=2) + "\n").encode())):
        partial = args.output / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, args.output / name)


def parser() -> argparse.ArgumentParser:
    """The command line; every option with its unit and default."""
    result = argparse.ArgumentParser(
        description="Trains digits_vit on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--output", type=Path, default=Path("runs/digits_vit"), help="folder for the two files")
    result.add_argument("--epochs", type=int, default=80, help="passes over the training images")
    result.add_argument("--batch-size", type=int, default=64, help="images per step")
    result.add_argument("--learning-rate", type=float, default=2e-3, help="largest AdamW learning rate (cosine)")
    result.add_argument("--weight-decay", type=float, default=0.05, help="AdamW weight decay")
    result.add_argument("--degrees", type=float, default=10.0, help="largest random rotation, degrees")
    result.add_argument("--scale", type=float, default=0.1, help="largest random change of size, relative")
    result.add_argument("--shift", type=float, default=0.06, help="largest random shift, fraction of the image")
    result.add_argument("--seed", type=int, default=0, help="seed of weights, batches and augmentation")
    result.add_argument("--threads", type=int, default=2, help="CPU threads")
    return result


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    model, figures = train(args)
    save(model, args, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
