"""What the commands of ``maskaq`` do, once their options are parsed."""

from maskaq_brevitas.commands.listings import lint_finn
from maskaq_brevitas.commands.listings import models
from maskaq_brevitas.commands.quantizing import quantize
from maskaq_brevitas.commands.runs import evaluate
from maskaq_brevitas.commands.runs import export
from maskaq_brevitas.commands.runs import sensitivity

__all__ = ["evaluate", "export", "lint_finn", "models", "quantize", "sensitivity"]
