"""Float model -> quant model: Brevitas quantizers, attention twins, layer swap."""

from maskaq_brevitas.quant.snapshot import frozen_snapshot
from maskaq_brevitas.quant.swap import swap_layers

__all__ = ["frozen_snapshot", "swap_layers"]
