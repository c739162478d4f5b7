"""What tests look at to see that a model was only borrowed."""


def hooks(model) -> int:
    """Number of hooks on all modules of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
