"""The lint for FINN: rules as data, one small graph per rule, and what it says."""

import onnx
import pytest
from onnx import TensorProto
from onnx import helper

from integration.finn.variants import VARIANTS
from integration.finn.variants import write_variant
from maskaq_brevitas import cli
from maskaq_brevitas.errors import ExportError
from maskaq_brevitas.export import finn_lint
from maskaq_brevitas.export import lint_finn
from maskaq_brevitas.export.finn_lint import lint_text
from maskaq_brevitas.export.finn_rules import FINN_VERSION
from maskaq_brevitas.export.finn_rules import RULES

#: What each variant breaks: operator, effect, and how many nodes. FINN's own verdict: integration/finn/README.md.
BROKEN = {
    "profile": {},
    "encoder": {},
    "unsigned": {},
    "zero-point": {("Quant", "refused"): 1},
    "channel-scales": {("MatMul", "unmapped"): 1},
    "norm-scale": {("LayerNormalization", "unmapped"): 1},
    "fork-scale": {("MatMul", "unmapped"): 3},
    "float-operand": {("MatMul", "unmapped"): 1},
    "erf": {("Erf", "unmapped"): 1},
    "generic": {("Concat", "unmapped"): 1, ("LayerNormalization", "unmapped"): 3, ("Slice", "unmapped"): 3,
                ("Squeeze", "unmapped"): 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each variant's file, written once."""
    folder, written = tmp_path_factory.mktemp("lint"), {}

    def path_of(name):
        if name not in written:
            written[name] = folder / f"{name}.onnx"
            write_variant(VARIANTS[name], written[name])
        return written[name]

    return path_of


@pytest.mark.parametrize("name", BROKEN)
def test_verdict_on(name, files):
    lint = lint_finn(files(name))
    found = {}
    for node in lint.nodes:
        if node.effect != "hardware":
            found[node.operator, node.effect] = found.get((node.operator, node.effect), 0) + 1
            assert node.reason and node.remedy and not node.hardware
    assert found == BROKEN[name]
    assert lint.lands == (not found) and lint.version == FINN_VERSION
    assert lint.node_share == 1 - sum(found.values()) / len(lint.nodes)


def test_macs_are_those_of_the_model(files):
    lint = lint_finn(files("profile"))
    tokens, dim, hidden = 5, 32, 128
    attention = tokens * dim * 3 * dim + 2 * tokens * tokens * dim + tokens * dim * dim
    expected = 4 * 3 * 64 * dim + attention + 2 * tokens * dim * hidden + dim * 10
    assert sum(node.macs for node in lint.nodes) == expected and lint.mac_share == 1
    broken = lint_finn(files("fork-scale"))
    assert broken.mac_share == pytest.approx(1 - tokens * dim * 3 * dim / expected)


def test_nodes_between_hardware_are_told_from_those_at_an_end(files):
    assert len(lint_finn(files("erf")).between) == 1
    path = files("profile").with_name("end.onnx")
    model = onnx.load(files("profile"))
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node("Erf", [output.name], ["last"], name="last"))
    shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, shape))
    onnx.save(model, path)
    lint = lint_finn(path)
    assert not lint.lands and lint.between == ()


def small(node, *constants, shape=(1, 4, 8)):
    """A graph of one node behind its input ``x``."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "small", [given], [output], initializer=list(constants))
    versions = {"": 20, "qonnx.custom_op.general": 2}
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*entry) for entry in versions.items()])


def constant(name, value, dims=()):
    return helper.make_tensor(name, TensorProto.FLOAT, dims, value if dims else [value])


@pytest.mark.parametrize(("node", "constants", "effect", "reason"), (
    (helper.make_node("Softmax", ["x"], ["y"], axis=1), (), "wrong", "last axis whatever its axis"),
    (helper.make_node("Gelu", ["x"], ["y"], approximate="tanh"), (), "wrong", "its approximation is ignored"),
    (helper.make_node("LayerNormalization", ["x", "s"], ["y"]), (constant("s", [1.0] * 8, [8]),),
     "unmapped", "no bias input"),
    (helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"]),
     (constant("s", [1.0] * 8, [8]), constant("b", [0.5] * 8, [8])), "wrong", "dropped without a word"),
    (helper.make_node("Quant", ["x", "s", "z", "w"], ["y"], domain="qonnx.custom_op.general", signed=1, narrow=0,
                      rounding_mode="FLOOR"),
     (constant("s", 1.0), constant("z", 0.0), constant("w", 4.0)), "wrong", "rounding mode FLOOR is ignored"),
    (helper.make_node("Quant", ["x", "s", "z", "w"], ["y"], domain="qonnx.custom_op.general", signed=1, narrow=0,
                      rounding_mode="ROUND"),
     (constant("s", 1.0), constant("z", 0.0), constant("w", 9.0)), "unmapped", "more than 8 bits"),
    (helper.make_node("Cos", ["x"], ["y"]), (), "unmapped", "no rule knows it"),
    (helper.make_node("Relu", ["x"], ["y"]), (), "unmapped", "no quantizer follows it"),
))  # fmt: skip
def test_single_nodes(node, constants, effect, reason, tmp_path):
    path = tmp_path / "small.onnx"
    onnx.save(small(node, *constants), path)
    (verdict,) = lint_finn(path).nodes
    assert verdict.effect == effect and reason in verdict.reason


def test_a_batch_other_than_1_is_a_problem_of_the_graph(tmp_path):
    path = tmp_path / "batch.onnx"
    onnx.save(small(helper.make_node("Gelu", ["x"], ["y"]), shape=(2, 4, 8)), path)
    lint = lint_finn(path)
    assert not lint.lands and lint.node_share == 1
    assert "the batch of" in lint.graph[0] and "is 2, and has to be 1" in lint.graph[0]


def test_every_rule_names_checks_that_exist_and_none_is_left_over():
    named = {need.check for rule in RULES for need in rule.needs}
    assert named == set(finn_lint._CHECKS)
    operators = [name for rule in RULES for name in rule.operators]
    assert len(operators) == len(set(operators))


def test_text(files):
    text = lint_text(lint_finn(files("fork-scale")))
    assert "unmapped: 3 x MatMul (encoder.blocks.0.attn.q, encoder.blocks.0.attn.k, encoder.blocks.0.attn.v): " in text
    assert "What changes that: a quantizer of scale 1 in front of a fork" in text
    assert "3 of them between hardware operators" in text and text.endswith("it does not land")
    everything = lint_text(lint_finn(files("profile")), every_node=True)
    assert everything.count("\nhardware") + 1 == len(lint_finn(files("profile")).nodes)


def test_the_command_and_its_exit_status(files, tmp_path, capsys):
    assert cli.main(["lint-finn", str(files("profile")), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith(f"{FINN_VERSION}: 100.0% of 58 nodes and 100.0% of ")
    assert cli.main(["lint-finn", str(files("generic"))]) == 1
    assert "Slice" in capsys.readouterr().out
    (tmp_path / "x.onnx").write_text("no graph")
    assert cli.main(["lint-finn", str(tmp_path / "x.onnx")]) == 2
    assert "Expected a QONNX file at" in capsys.readouterr().err
    with pytest.raises(ExportError, match="Write it with 'maskaq export --target finn'"):
        lint_finn(tmp_path / "missing.onnx")
