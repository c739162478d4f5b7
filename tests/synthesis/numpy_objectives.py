"""METHOD.md, section 2, in plain numpy with explicit loops over one image: the reference of the tests here.

Attention is ``(heads, tokens, tokens)`` per layer.
"""

import math

import numpy as np


def class_loss(logits, label):
    return math.log(sum(math.exp(value - logits.max()) for value in logits)) + logits.max() - logits[label]


def total_variation(image):
    channels, height, width = image.shape
    squares = dict.fromkeys(("right", "down", "falling", "rising"), 0.0)
    steps = {"right": (0, 1), "down": (1, 0), "falling": (1, 1), "rising": (1, -1)}
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                for name, (down, right) in steps.items():
                    if 0 <= row + down < height and 0 <= column + right < width:
                        difference = image[channel, row + down, column + right] - image[channel, row, column]
                        squares[name] += difference**2
    norms = {name: math.sqrt(value) for name, value in squares.items()}
    return norms["right"] + norms["down"] + (norms["falling"] + norms["rising"]) / math.sqrt(2)


def total_variation_l1(image):
    channels, height, width = image.shape
    right = [abs(image[c, y, x + 1] - image[c, y, x])
             for c in range(channels) for y in range(height) for x in range(width - 1)]  # fmt: skip
    down = [abs(image[c, y + 1, x] - image[c, y, x])
            for c in range(channels) for y in range(height - 1) for x in range(width)]  # fmt: skip
    return sum(right) / len(right) + sum(down) / len(down)


def ssim(a, b):
    c1, c2 = 0.01**2, 0.03**2
    covariance = np.mean((a - a.mean()) * (b - b.mean()))
    luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
    return luminance * (2 * covariance + c2) / (a.var() + b.var() + c2)


def head_coherence(attention, prefix):
    losses = []
    for layer in attention:
        heads, tokens, _ = layer.shape
        for query in range(prefix, tokens):
            maps = []
            for head in range(heads):
                row = layer[head, query, prefix:]
                maps.append((row - row.min()) / (row.max() - row.min()))
            for first in range(heads):
                for second in range(first + 1, heads):
                    losses.append(1 - ssim(maps[first], maps[second]) ** 2)
    return sum(losses) / len(losses)


def similarity_entropy(layer, prefix, rows=None):
    maps = layer.mean(axis=0)[prefix:, prefix:]
    maps = maps if rows is None else maps[rows]
    unit = [row / math.sqrt(sum(value**2 for value in row)) for row in maps]
    similarity = [sum(p * q for p, q in zip(a, b, strict=True)) for a in unit for b in unit]
    mean = sum(similarity) / len(similarity)
    variance = sum((value - mean) ** 2 for value in similarity) / len(similarity)
    return 0.5 * math.log(2 * math.pi * math.e * (variance + 1e-8))


def entropy_loss(attention, prefix, rows=None):
    return -sum(similarity_entropy(layer, prefix, rows) for layer in attention) / len(attention)


def received(layer, prefix, class_token):
    """Head-mean row of the class token; without one, the column mean over the patches."""
    mean = layer.mean(axis=0)
    return mean[0, prefix:] if class_token else mean[prefix:, prefix:].mean(axis=0)


def top_patches(values, share):
    count = max(1, round(share * len(values)))
    return set(sorted(range(len(values)), key=lambda patch: -values[patch])[:count])


def masked_alignment(float_rows, quant_rows, chosen):
    """``float_rows``, ``quant_rows``: one vector per layer; ``chosen``: one set of patches per layer."""
    losses = [sum(abs(ours[patch] - theirs[patch]) for patch in patches) / len(patches)
              for ours, theirs, patches in zip(float_rows, quant_rows, chosen, strict=True)]  # fmt: skip
    return sum(losses) / len(losses)
