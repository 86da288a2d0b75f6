"""SwinIR and Swin2SR in figures: what their hyper-parameters cost, and how they are read off a weight file.

Both are a convolution, groups of transformer blocks, and an upsampler. A block attends within square windows; every
other block has its windows shifted by half. Formulas count what the official definitions compute; nothing here loads
torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tasks.models.cards import ModelCard

Shapes = Mapping[str, tuple[int, ...]]

#: Channels of the upsamplers, fixed in the official definitions.
NUM_FEAT: Final = 64

#: Hidden units of the perceptron with which a Swin2SR block makes its position bias.
_BIAS_UNITS: Final = 512

_BLOCK: Final = "layers.{}.residual_group.blocks.{}"


class NotSwinError(Exception):
    """A state dict of this family that cannot be run; says why."""


def is_swin(shapes: Shapes) -> bool:
    """Whether a state dict has the blocks of this family."""
    return any(name.startswith("layers.0.residual_group.blocks.0.attn.") for name in shapes)


def parameters(card: ModelCard) -> int:
    """Number of weights; tables that follow from the window size are not weights."""
    d, w, heads = card.embed_dim, card.window_size, card.num_heads
    hidden = int(d * card.mlp_ratio)
    block = 4 * d + (d * hidden + hidden) + (hidden * d + d) + (d * d + d)  # two norms, the perceptron, proj
    count = sum(depth * block for depth in card.depths) + 4 * d  # the norms before and after all blocks
    for depth, h in zip(card.depths, heads, strict=True):
        if card.architecture == "swinir":
            attention = 3 * d * d + 3 * d + (2 * w - 1) ** 2 * h
        else:  # No bias for keys; a scale per head; a perceptron from coordinates to position bias.
            attention = 3 * d * d + 2 * d + h + (2 * _BIAS_UNITS + _BIAS_UNITS) + _BIAS_UNITS * h
        count += depth * attention
    if card.architecture == "swin2sr":  # 1x1 convolutions before the first and after each group
        count += (1 + len(card.depths)) * (d * d + d)
    return count + sum(k * k * i * o + o for k, i, o, _ in _convolutions(card))


def flop_per_input_pixel(card: ModelCard) -> int:
    """Floating point operations of convolutions and matrix products, a multiply and an add counted as two.

    The position bias of Swin2SR is left out: it is computed once per block and frame, whatever the size.
    """
    d = card.embed_dim
    block = 4 * d * d + 2 * d * int(d * card.mlp_ratio) + 2 * card.window_size**2 * d
    work = sum(card.depths) * block
    if card.architecture == "swin2sr":
        work += (1 + len(card.depths)) * d * d
    return round(2 * (work + sum(k * k * i * o * area for k, i, o, area in _convolutions(card))))


def receptive_field(card: ModelCard) -> int:
    """Radius in input pixels: an output pixel depends on no input pixel farther away, pictures' borders left aside.

    The windows are followed backwards from each place an output pixel can have in them; convolutions add a pixel each,
    at their own resolution. It is no measure of what matters: attention reaches a whole window wherever it is, but with
    weights that fade. At borders blocks with shifted windows see the opposite border too, masked by a summand of -100
    before the softmax; what is left of it is below what 32-bit floats resolve unless logits differ by as much.
    """
    window, farthest = card.window_size, 0
    for place in range(window):
        low = place - math.ceil(sum(1 / edge for k, _, _, edge in _tail(card) if k == 3))
        high = 2 * place - low
        for depth in reversed(card.depths):
            convolved = 2 if card.resi_connection == "3conv" else 1
            low, high = low - convolved, high + convolved
            for block in reversed(range(depth)):
                shift = block % 2 * (window // 2)
                low = (low - shift) // window * window + shift
                high = (high - shift) // window * window + shift + window - 1
        farthest = max(farthest, place - low, high - place)
    return farthest + 1  # the first convolution


def values_per_pixel(card: ModelCard) -> int:
    """Most values a network holds at a time, per input pixel: a little more than was measured.

    In a block, queries, keys and values with the copies that windows and heads make of them, and attention before and
    after mask and softmax; while the picture is enlarged, three activations at the output's resolution. Beside either
    the residual stream, and the mask that all blocks share.
    """
    d, window = card.embed_dim, card.window_size
    block = 12 * d + 6 * max(card.num_heads) * window**2
    channels = 3 if card.upsampler == "pixelshuffledirect" else NUM_FEAT
    return 2 * d + window**2 + max(block, 3 * channels * card.scale**2)


def _convolutions(card: ModelCard) -> Iterator[tuple[int, int, int, float]]:
    """Kernel, inputs, outputs, and output pixels per input pixel of each convolution outside the blocks."""
    d = card.embed_dim
    yield 3, 3, d, 1
    for _ in card.depths:
        yield from ((k, i, o, 1) for k, i, o in _residual(card))
    yield from ((k, i, o, edge * edge) for k, i, o, edge in _tail(card))


def _residual(card: ModelCard) -> list[tuple[int, int, int]]:
    """The convolutions at the end of a group."""
    d = card.embed_dim
    if card.resi_connection == "1conv":
        return [(3, d, d)]
    return [(3, d, d // 4), (1, d // 4, d // 4), (3, d // 4, d)]


def _tail(card: ModelCard) -> Iterator[tuple[int, int, int, int]]:
    """Kernel, inputs, outputs and enlargement along an edge of each convolution after all groups."""
    d, f, scale = card.embed_dim, NUM_FEAT, card.scale
    yield from ((k, i, o, 1) for k, i, o in _residual(card))
    if card.upsampler == "pixelshuffledirect":
        yield 3, d, 3 * scale**2, 1
        return
    yield 3, d, f, 1
    if card.upsampler == "nearest+conv":
        yield from ((3, f, f, 2**step) for step in range(1, scale.bit_length()))
        yield 3, f, f, scale
    elif scale == 3:
        yield 3, f, 9 * f, 1
    else:
        yield from ((3, f, 4 * f, 2**step) for step in range(scale.bit_length() - 1))
    yield 3, f, 3, scale


def hyper_parameters(shapes: Shapes) -> dict[str, Any]:
    """The fields of a `ModelCard` that describe a network of this family.

    Args:
        shapes: Of its state dict, for which `is_swin` holds.

    Raises:
        NotSwinError: It is no network that enlarges RGB pictures, is of a kind that is not supported, or lacks what
            would tell.
    """
    try:
        return _read(shapes)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise NotSwinError("its weights have shapes that no such network has") from error


def _read(shapes: Shapes) -> dict[str, Any]:
    attention = _BLOCK.format(0, 0) + ".attn."
    if attention + "logit_scale" in shapes:
        architecture = "swin2sr"
    elif attention + "relative_position_bias_table" in shapes:
        architecture = "swinir"
    else:
        raise NotSwinError("its attention is neither SwinIR's nor Swin2SR's")
    first = shapes.get("conv_first.weight", ())
    if len(first) != 4 or first[1] != 3:
        raise NotSwinError("it does not start with a convolution of an RGB picture")
    embed_dim = first[0]
    depths = _depths(shapes)
    scale, upsampler = _upsampler(shapes, architecture)
    per_head = "logit_scale" if architecture == "swin2sr" else "relative_position_bias_table"
    num_heads = []
    for layer in range(len(depths)):
        shape = shapes.get(f"{_BLOCK.format(layer, 0)}.attn.{per_head}", ())
        heads = (shape[0] if architecture == "swin2sr" else shape[-1]) if shape else 0
        if not heads or embed_dim % heads:
            raise NotSwinError(f"the heads of layer {layer} do not share its {embed_dim} channels evenly")
        num_heads.append(heads)
    hidden = shapes.get(_BLOCK.format(0, 0) + ".mlp.fc1.weight", (0,))[0]
    if not hidden or int(embed_dim * (hidden / embed_dim)) != hidden:
        raise NotSwinError("the width of its perceptrons cannot be told")
    return {
        "architecture": architecture,
        "scale": scale,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(num_heads),
        "window_size": _window_size(shapes, architecture, depths),
        "mlp_ratio": hidden / embed_dim,
        "upsampler": upsampler,
        "resi_connection": "3conv" if "conv_after_body.0.weight" in shapes else "1conv",
    }


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks per group."""
    matches = (re.match(r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.", name) for name in shapes)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    per_layer = Counter(layer for layer, _ in blocks)
    depths = tuple(per_layer[layer] for layer in range(len(per_layer)))
    if blocks != {(layer, block) for layer, depth in enumerate(depths) for block in range(depth)}:
        raise NotSwinError("blocks are missing among its layers")
    return depths


def _window_size(shapes: Shapes, architecture: str, depths: tuple[int, ...]) -> int:
    """Edge of a window, from every table that tells it."""
    attention = _BLOCK.format(0, 0) + ".attn."
    told = set()
    if architecture == "swinir":
        told.add((math.isqrt(shapes[attention + "relative_position_bias_table"][0]) + 1) / 2)
    elif (table := shapes.get(attention + "relative_coords_table")) is not None:
        told.add((table[1] + 1) / 2 if len(table) == 4 else 0)
    if (index := shapes.get(attention + "relative_position_index")) is not None:
        told.add(math.sqrt(index[0]))
    window = told.pop() if len(told) == 1 else 0
    if window < 2 or window != int(window):
        raise NotSwinError("its window size cannot be told")
    for layer, depth in enumerate(depths):
        # The official definition does not shift the windows of networks made for pictures of a single one.
        if depth > 1 and _BLOCK.format(layer, 1) + ".attn_mask" not in shapes:
            raise NotSwinError("without attention masks it cannot be told whether its windows are shifted")
    return int(window)


def _upsampler(shapes: Shapes, architecture: str) -> tuple[int, str]:
    """Scale, and how it is reached."""
    for name, word in (("conv_bicubic", "pixelshuffle_aux"), ("conv_after_body_hf", "pixelshuffle_hf")):
        if f"{name}.weight" in shapes:
            raise NotSwinError(f"its upsampler {word} is not supported")
    before, last = shapes.get("conv_before_upsample.0.weight"), shapes.get("conv_last.weight", (0,))
    if before is None and "upsample.0.weight" in shapes:
        outputs = shapes["upsample.0.weight"][0]
        scale = math.isqrt(outputs // 3)
        if 3 * scale**2 != outputs or scale < 2:
            raise NotSwinError("it does not end with an RGB picture of more pixels")
        return scale, "pixelshuffledirect"
    if before is None:
        raise NotSwinError("it has no upsampler: it repairs pictures and does not enlarge them")
    if last[0] != 3:
        raise NotSwinError("it does not end with an RGB picture")
    if before[0] != NUM_FEAT:
        raise NotSwinError(f"its upsampler has {before[0]} channels instead of {NUM_FEAT}")
    if "conv_up1.weight" in shapes:
        scale = 2 ** sum(f"conv_up{step}.weight" in shapes for step in range(1, 10))
        if scale not in ((4,) if architecture == "swin2sr" else (2, 4, 8)):
            raise NotSwinError(f"{architecture} with nearest+conv is not defined for scale {scale}")
        return scale, "nearest+conv"
    steps = [shapes[name] for step in range(0, 20, 2) if (name := f"upsample.{step}.weight") in shapes]
    factors = [math.isqrt(outputs // inputs) for outputs, inputs, *_ in steps]
    if factors != [3] and (not factors or set(factors) != {2}):
        raise NotSwinError("the steps of its upsampler cannot be told")
    return math.prod(factors), "pixelshuffle"
