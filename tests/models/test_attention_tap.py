import warnings

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from maskaq_brevitas.errors import CompilationWarning
from maskaq_brevitas.errors import ModelError
from maskaq_brevitas.models.attention_tap import attention_tap
from maskaq_brevitas.quant.snapshot import float_snapshot
from maskaq_brevitas.quant.trainable import compile_blocks

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def build(create=VisionTransformer, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(**options).eval()


def images(batch=2, size=(32, 32)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def norm(module, x):
    if isinstance(module, torch.nn.Identity):
        return x
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    return x * module.weight.detach().double().numpy() + module.bias.detach().double().numpy()


def by_hand(model, batch):
    """Logits, probabilities and context of every block in numpy, from the weights and what flows into the block."""
    inputs = []
    handles = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    with torch.no_grad():
        output = model(batch)
    for handle in handles:
        handle.remove()
    found = {"logits": [], "probabilities": [], "context": []}
    for block, x in zip(model.blocks, inputs, strict=True):
        attention = block.attn
        weight = attention.qkv.weight.detach().double().numpy()
        projected = x.double().numpy() @ weight.T
        if attention.qkv.bias is not None:
            projected = projected + attention.qkv.bias.detach().double().numpy()
        width, heads = projected.shape[-1] // 3, attention.num_heads
        size = width // heads
        logits, probabilities, context = [], [], []
        for head in range(heads):
            part = [projected[..., start + head * size : start + (head + 1) * size] for start in (0, width, 2 * width)]
            query, key = norm(attention.q_norm, part[0]), norm(attention.k_norm, part[1])
            scores = query @ key.swapaxes(-1, -2) / np.sqrt(size)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares = shares / shares.sum(-1, keepdims=True)
            logits.append(scores), probabilities.append(shares), context.append(shares @ part[2])
        for name, values in zip(found, (logits, probabilities, context), strict=True):
            found[name].append(torch.from_numpy(np.stack(values, axis=1)).float())
    return found, output


@pytest.mark.parametrize(
    ("options", "tokens"),
    (
        (SMALL, 17),
        (dict(SMALL, qk_norm=True, qkv_bias=False), 17),
        (dict(SMALL, reg_tokens=3), 20),
        (dict(SMALL, class_token=False, global_pool="avg"), 16),
        (dict(create=timm.create_model, model_name="deit_tiny_distilled_patch16_224", img_size=32, depth=2), 6),
    ),
)
def test_values(options, tokens):
    model = build(**options)
    expected, output = by_hand(model, images())
    with attention_tap(model, "logits", "probabilities", "context") as record, torch.no_grad():
        tapped = model(images())
    torch.testing.assert_close(tapped, output, rtol=1e-5, atol=1e-5)
    heads = model.blocks[0].attn.num_heads
    for name in ("logits", "probabilities", "context"):
        assert len(getattr(record, name)) == 2
        for actual, value in zip(getattr(record, name), expected[name], strict=True):
            assert actual.shape[:3] == (2, heads, tokens)
            torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)


def test_only_what_was_asked_for_and_only_the_last_pass(tiny_vit):
    with attention_tap(tiny_vit, "logits") as record, torch.no_grad():
        tiny_vit(images(2))
        tiny_vit(images(1))
        assert [logits.shape for logits in record.logits] == [(1, 2, 17, 17)] * 2
        assert record.probabilities == record.context == []
        record.clear()
        assert record.logits == []


def test_gradient_reaches_the_image(tiny_vit):
    batch = images().requires_grad_(True)
    with attention_tap(tiny_vit, "logits", "probabilities") as record:
        tiny_vit(batch)
        for maps in (record.logits, record.probabilities):
            (gradient,) = torch.autograd.grad(maps[1].square().sum(), batch, retain_graph=True)
            assert torch.isfinite(gradient).all() and gradient.any()


def snapshot(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, id(module), module.training, getattr(module, "fused_attn", None), getattr(module, "is_open", None),
         len(getattr(module, "listeners", ())), [len(getattr(module, k)) for k in kinds])
        for name, module in model.named_modules()
    ]


def test_model_is_put_back(tiny_vit):
    tiny_vit.blocks[0].attn.fused_attn = False
    before, flags = snapshot(tiny_vit), [block.attn.fused_attn for block in tiny_vit.blocks]
    with attention_tap(tiny_vit, "logits"):
        tiny_vit(images())
        assert snapshot(tiny_vit) != before
    assert snapshot(tiny_vit) == before and [block.attn.fused_attn for block in tiny_vit.blocks] == flags


def test_model_is_put_back_after_an_error(tiny_vit):
    before = snapshot(tiny_vit)
    with pytest.raises(RuntimeError, match="size"):
        with attention_tap(tiny_vit, "logits"):
            tiny_vit.blocks[1](torch.zeros(1, 17, 3))
    assert snapshot(tiny_vit) == before
    with pytest.raises(KeyError):
        with attention_tap(tiny_vit, "logits", "values"):
            pass
    assert snapshot(tiny_vit) == before


def test_nested_taps(tiny_vit):
    before = snapshot(tiny_vit)
    with attention_tap(tiny_vit, "logits") as outer, torch.no_grad():
        with attention_tap(tiny_vit, "probabilities") as inner:
            tiny_vit(images())
            for logits, probabilities in zip(outer.logits, inner.probabilities, strict=True):
                torch.testing.assert_close(logits.softmax(-1), probabilities)
        inside = [maps.clone() for maps in outer.logits]
        tiny_vit(images(1))
        assert len(outer.logits) == 2 and len(outer.logits[0]) == 1 and len(inner.probabilities[0]) == 2
        assert len(inside[0]) == 2
    assert snapshot(tiny_vit) == before


def test_train_and_eval_inside_reach_the_attention(tiny_vit):
    with attention_tap(tiny_vit, "logits"):
        tiny_vit.train()
    assert all(module.training for module in tiny_vit.modules())


def test_no_attention():
    with pytest.raises(ModelError, match="ResNet cannot be quantized: it has no attention"):
        with attention_tap(timm.create_model("resnet10t"), "logits"):
            pass


@pytest.mark.heavy
def test_compiled_blocks_keep_their_taps(tiny_vit):
    with attention_tap(tiny_vit, "logits", "context") as record, torch.no_grad():
        tiny_vit(images())
        expected = [[maps.clone() for maps in found] for found in (record.logits, record.context)]
    model = float_snapshot(tiny_vit)
    compile_blocks(model)
    for _ in range(2):  # taps that are opened anew are told too
        with attention_tap(model, "logits", "context") as record, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", CompilationWarning)
            model(images())
            for found, wanted in zip((record.logits, record.context), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
