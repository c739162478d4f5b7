"""Loads a float model by name: ``digits_vit``, the small one that is shipped, any of timm, or a ViT or Swin of
torchvision.
"""

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any
from typing import cast

import safetensors
import safetensors.torch
import timm
import torch
import torchvision.models
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch import nn

from maskaq_brevitas.errors import CheckpointError
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.files import tensors_on_meta

__all__ = ["available_models", "load_model"]

SHIPPED_MODEL = "digits_vit"
_TORCHVISION = "torchvision:"


def available_models() -> list[str]:
    """Names that :func:`load_model` takes: ``digits_vit`` first, then every architecture of timm, then torchvision's.

    Loading is not quantizing: timm's convolutional networks load too, and are refused later.
    """
    return [SHIPPED_MODEL, *timm.list_models(), *_torchvision_models()]


def _torchvision_models() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [_TORCHVISION + name for name in names if name.startswith(("vit_", "swin_"))]


def load_model(name: str, *, checkpoint: str | Path | None = None, num_classes: int | None = None) -> nn.Module:
    """Gives the float model of that name, with trained weights, in eval mode, on the CPU.

    The model carries timm's ``pretrained_cfg``, so that ``timm.data.resolve_model_data_config(model)`` gives its input
    size, mean and standard deviation. The caller's random state is left as it was.

    Args:
        name: ``digits_vit``; a timm name with or without a tag (``deit_tiny_patch16_224.fb_in1k``); or a Vision
            Transformer of torchvision (``torchvision:vit_b_16``).
        checkpoint: a ``.safetensors`` file with the weights, in the library's own key names. ``None`` takes the weights
            shipped with the package for ``digits_vit``, and the library's pretrained download for everything else.
        num_classes: classes of the head. ``None`` takes the number in the checkpoint.

    Raises:
        ModelError: when no model has that name; the message lists close ones.
        CheckpointError: when the weights cannot be read or downloaded, or do not fit the model and ``num_classes``.
    """
    _check_name(name)
    with torch.random.fork_rng(devices=[]):  # building a model draws random weights
        if name == SHIPPED_MODEL:
            model = _digits_vit(checkpoint, num_classes)
        elif name.startswith(_TORCHVISION):
            model = _torchvision_model(name, checkpoint, num_classes)
        elif checkpoint is None:
            model = _timm_pretrained(name, num_classes)
        else:
            model = _timm_from_file(name, Path(checkpoint), num_classes)
    return model.eval()


def _check_name(name: str) -> None:
    """Raises ModelError, with close matches, unless the shipped model or timm has that name and tag."""
    if name in (SHIPPED_MODEL, *_torchvision_models()):
        return
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, available_models(), n=5)
        advice = f"Close matches: {', '.join(close)}." if close else "available_models() lists them all."
        raise ModelError(
            f"Expected '{SHIPPED_MODEL}', the name of a timm model, or '{_TORCHVISION}' and that of a Vision "
            f"Transformer of torchvision, got '{name}'. {advice}"
        )
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        known = ", ".join(tagged) if tagged else "none"
        raise ModelError(f"Expected a tag that timm has for '{architecture}' ({known}), got '{tag}'.")


def _digits_vit(checkpoint: str | Path | None, num_classes: int | None) -> nn.Module:
    """Builds the shipped model, with its own weights or those of a file."""
    folder = resources.files("maskaq_brevitas.models").joinpath("checkpoints")
    config = json.loads(folder.joinpath("digits_vit.json").read_text(encoding="utf-8"))
    if checkpoint is None:
        source = f"the weights of '{SHIPPED_MODEL}' in the package"
        weights = safetensors.torch.load(folder.joinpath("digits_vit.safetensors").read_bytes())
    else:
        source = str(checkpoint)
        weights = _header(Path(checkpoint))
    pretrained_cfg = {
        "architecture": SHIPPED_MODEL,
        **{key: tuple(value) if isinstance(value, list) else value for key, value in config["pretrained_cfg"].items()},
    }
    in_file = _head_classes(weights, pretrained_cfg)
    pretrained_cfg["num_classes"] = num_classes or in_file or pretrained_cfg["num_classes"]
    model: Any = VisionTransformer(**{**config["model_args"], "num_classes": pretrained_cfg["num_classes"]})
    model.pretrained_cfg = model.default_cfg = pretrained_cfg
    misfits = _misfits(model.state_dict(), weights)
    if misfits:
        raise _does_not_fit(source, SHIPPED_MODEL, misfits)
    model.load_state_dict(weights if checkpoint is None else safetensors.torch.load_file(checkpoint))
    return model


def _timm_pretrained(name: str, num_classes: int | None) -> nn.Module:
    """Builds a timm model with the weights that timm downloads (or finds in its cache)."""
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the download raises errors of huggingface_hub, requests, urllib, OSError, RuntimeError
        raise _no_download("timm", name, error) from error
    if num_classes not in (None, model.num_classes):
        # timm would give a head with random weights here.
        raise _other_classes(name, cast(int, model.num_classes), num_classes)
    return model


def _no_download(library: str, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected {library} to download the pretrained weights of '{name}', got {type(error).__name__}: "
        f"{str(error).rstrip('.')}. "
        f"Without network or where none exist, pass a file: checkpoint='weights.safetensors' (--checkpoint)."
    )


def _other_classes(name: str, classes: int, num_classes: int | None) -> CheckpointError:
    return CheckpointError(
        f"Expected num_classes={classes}, the classes of the pretrained weights of '{name}', got "
        f"{num_classes}. Pass a checkpoint that was trained with {num_classes} classes, or leave num_classes out."
    )


def _timm_from_file(name: str, checkpoint: Path, num_classes: int | None) -> nn.Module:
    """Builds a timm model with the weights of a file, through timm's own loading and key conversion."""
    weights = _header(checkpoint)
    template: Any = timm.create_model(name, pretrained=False, num_classes=num_classes)  # with its pretrained_cfg
    in_file = _head_classes(weights, template.pretrained_cfg)
    if num_classes is None and in_file not in (None, template.num_classes):
        num_classes = in_file
        template = timm.create_model(name, pretrained=False, num_classes=num_classes)
    expected = template.state_dict()
    misfits = _misfits(expected, weights)
    # timm would resample weights of another input or patch size without a word; its key conversions are welcome.
    if any(text.startswith(("shape", "dtype")) for text in misfits):
        raise _does_not_fit(str(checkpoint), name, misfits)
    original_cfg = template.pretrained_cfg
    try:
        model: Any = timm.create_model(
            name,
            pretrained=True,
            num_classes=num_classes,
            # num_classes: timm drops the head of the file where it differs from this. custom_load: else read as .npz.
            pretrained_cfg_overlay=dict(file=str(checkpoint), custom_load=False, num_classes=template.num_classes),
        )
    except (RuntimeError, KeyError) as error:
        raise _does_not_fit(str(checkpoint), name, misfits or [str(error)]) from error
    model.pretrained_cfg = model.default_cfg = {**original_cfg, "num_classes": template.num_classes}
    return model


def _torchvision_model(name: str, checkpoint: str | Path | None, num_classes: int | None) -> nn.Module:
    """Builds a model of torchvision, with the weights that torchvision downloads (or finds in its cache) or of a file.

    Its ``pretrained_cfg`` is that of timm for the transforms of torchvision's best weights.
    """
    architecture = name.removeprefix(_TORCHVISION)
    best = torchvision.models.get_model_weights(architecture).DEFAULT
    classes = len(best.meta["categories"])
    if checkpoint is None:
        if num_classes not in (None, classes):
            raise _other_classes(name, classes, num_classes)
        try:
            model = torchvision.models.get_model(architecture, weights=best)
        except Exception as error:  # the download raises errors of urllib, OSError, RuntimeError
            raise _no_download("torchvision", name, error) from error
    else:
        weights = _header(Path(checkpoint))
        head = weights.get("heads.head.weight", weights.get("head.weight"))
        classes = num_classes or (classes if head is None else head.shape[0])
        model = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
        misfits = _misfits(model.state_dict(), weights)
        if misfits:
            raise _does_not_fit(str(checkpoint), name, misfits)
        model.load_state_dict(safetensors.torch.load_file(checkpoint))
    transform = best.transforms()
    size = getattr(model, "image_size", transform.crop_size[0])
    model.pretrained_cfg = dict(
        architecture=name, input_size=(3, size, size), num_classes=classes, mean=tuple(transform.mean),
        std=tuple(transform.std), interpolation=transform.interpolation.value,
        crop_pct=transform.crop_size[0] / transform.resize_size[0],
    )  # fmt: skip
    return model


def _header(checkpoint: Path) -> dict[str, Tensor]:
    """Shapes and dtypes in a safetensors file, as tensors on the device ``meta``: a file too large is refused unread.

    Raises CheckpointError when it is missing, of another kind or damaged.
    """
    if checkpoint.suffix != ".safetensors":
        raise CheckpointError(
            f"Expected a '.safetensors' file, got '{checkpoint}'. Other formats can run code when they are read; "
            f"convert the weights with: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
        )
    if not checkpoint.is_file():
        raise CheckpointError(f"Expected a file with weights, found none at '{checkpoint}'. Check the path.")
    try:
        return tensors_on_meta(checkpoint)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Expected a whole safetensors file, cannot read '{checkpoint}': {error}. Copy or download it again."
        ) from error


def _head_classes(weights: dict[str, Tensor], pretrained_cfg: dict[str, Any]) -> int | None:
    """Number of classes of the head in the file, or None where the file has no head under the model's name for it."""
    classifier = pretrained_cfg.get("classifier")
    first = classifier[0] if isinstance(classifier, (tuple, list)) else classifier  # DeiT distilled has two heads
    weight = weights.get(f"{first}.weight")
    return None if weight is None else weight.shape[0]


def _misfits(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Texts that name keys of another shape or kind of dtype, keys that the file lacks and keys that the model lacks,
    in this order.
    """
    return [
        *(f"shape of '{key}': expected {tuple(value.shape)}, got {tuple(weights[key].shape)}"
          for key, value in expected.items() if key in weights and weights[key].shape != value.shape),
        *(f"dtype of '{key}': expected floating point, got {weights[key].dtype}"
          for key, value in expected.items()
          if key in weights and value.is_floating_point() and not weights[key].is_floating_point()),
        *(f"missing '{key}'" for key in expected if key not in weights),
        *(f"unexpected '{key}'" for key in weights if key not in expected),
    ]


def _does_not_fit(source: str, name: str, misfits: list[str]) -> CheckpointError:
    """The error for weights of another model; names the first five differences."""
    more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
    return CheckpointError(
        f"Expected weights that fit '{name}', got others in {source}: {'; '.join(misfits[:5])}{more}. "
        f"Pass the model name that the weights were trained with, and its number of classes."
    )
