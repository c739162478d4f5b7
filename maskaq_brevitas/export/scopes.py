"""Which module of the PyTorch model a node of the ONNX graph came from.

torch's dynamo exporter leaves the module path on every node as metadata, and the TorchScript exporter leaves it in the
node name, which qonnx' cleanup then overwrites. Both are brought to one form here, before the cleanup.
"""

import ast
from collections.abc import Iterable
from typing import Any

__all__ = ["SCOPES_KEY", "module_scopes", "record_scopes"]

#: Key under which torch.onnx (dynamo) stores the module path of a node, outermost module first.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def record_scopes(model_proto: Any, module_names: Iterable[str]) -> None:
    """Leave the module path as the only metadata on every node of an ``onnx.ModelProto``, in place.

    The other metadata of torch's exporter goes: it holds stack traces with paths of the user's machine, and it is most
    of the graph's size.

    Args:
        module_names: names of the exported model's modules, as ``named_modules()`` gives them.
    """
    known = frozenset(module_names)
    for node in model_proto.graph.node:
        scopes = module_scopes(node) or _scopes_from_name(node.name, known)
        del node.metadata_props[:]
        if scopes:
            node.metadata_props.add(key=SCOPES_KEY, value=repr(list(scopes)))
    # Parameters and graph outputs carry metadata too, under repeated fields of the same name.
    for value in (*model_proto.graph.initializer, *model_proto.graph.value_info, *model_proto.graph.input,
                  *model_proto.graph.output):
        del value.metadata_props[:]
    del model_proto.graph.metadata_props[:]


def module_scopes(node: Any) -> tuple[str, ...]:
    """Module path of an ``onnx.NodeProto``, outermost first, for example ``("blocks", "blocks.0", "blocks.0.norm1")``.

    Empty where the node carries none. The path may end in names that are no modules (the traced call).
    """
    for entry in node.metadata_props:
        if entry.key == SCOPES_KEY:
            return tuple(name for name in ast.literal_eval(entry.value) if name)
    return ()


def _scopes_from_name(node_name: str, known: frozenset[str]) -> tuple[str, ...]:
    """Module path from a TorchScript node name such as ``/blocks/blocks.0/norm1/LayerNormalization``."""
    scopes: list[str] = []
    for part in node_name.strip("/").split("/")[:-1]:
        parent = scopes[-1] if scopes else ""
        # Children of containers are written with their full path, all others with their own name only.
        candidates = (f"{parent}.{part}" if parent else part, part)
        name = next((name for name in candidates if name in known), None)
        if name is None:
            break
        scopes.append(name)
    return tuple(scopes)
