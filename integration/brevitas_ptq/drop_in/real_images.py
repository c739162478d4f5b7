"""W4A8 of a timm model with Brevitas: MODEL CHECKPOINT FOLDER (images in FOLDER/calibration, FOLDER/validation)."""

import copy
import sys

import timm
import torch
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_bias_correction
from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq
from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate
from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model
from brevitas_examples.imagenet_classification.utils import validate
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

name, checkpoint, folder = sys.argv[1:]
model = timm.create_model(name, checkpoint_path=checkpoint).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
quant_model = quantize_model(
    copy.deepcopy(model), "layerwise", weight_bit_width=4, act_bit_width=8, bias_bit_width=None,
    weight_quant_granularity="per_channel", act_quant_percentile=99.999, act_quant_type="sym",
    scale_factor_type="float_scale", quant_format="int",
)
calib_loader = DataLoader(ImageFolder(f"{folder}/calibration", transform), batch_size=16)
calibrate(calib_loader, quant_model)
with torch.no_grad():
    quant_model(next(iter(calib_loader))[0])  # sets the scales of weights
apply_gptq(calib_loader, quant_model)
apply_bias_correction(calib_loader, quant_model)
val_loader = DataLoader(ImageFolder(f"{folder}/validation", transform), batch_size=50)
print(f"top-1: {validate(val_loader, quant_model):.1f}")
