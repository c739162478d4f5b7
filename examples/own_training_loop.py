"""A training loop of one's own over synthetic images that follow the quantized model.

The optimiser, the loss and the loop are plain torch; ``calibrator.epochs`` refreshes the images when it is due.

    python examples/own_training_loop.py
"""

import torch
from torch.nn import functional as F

from maskaq_brevitas import DataFreeCalibrator
from maskaq_brevitas import load_model

torch.manual_seed(0)  # of the shuffling
float_model = load_model("digits_vit")
calibrator = DataFreeCalibrator(float_model, scheme="w4a4", num_images=32, batch_size=16, steps=40, shuffle=True)
quant_model = calibrator.calibrate()

optimizer = torch.optim.Adam(quant_model.parameters(), lr=1e-4)
for epoch in calibrator.epochs(6, refresh_every=2):
    for images, _labels in calibrator:
        with torch.no_grad():
            target = float_model(images).softmax(dim=-1)
        loss = F.cross_entropy(quant_model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: images of version {calibrator.version}, loss {loss.item():.4f}")

for refresh in calibrator.refreshes:
    print("masked alignment before {alignment_before:.4f}, after {alignment_after:.4f}".format(**refresh))
