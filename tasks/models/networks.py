"""The official networks, taken from the packages that define them without what those packages drag in.

`import realesrgan` imports its training code, and with it torchvision (a module of which was removed in 0.17),
scipy, lmdb, gfpgan and more; beside a current torch it fails. `import spandrel`, the best kept home of SwinIR and
Swin2SR, imports forty more networks, and torchvision, whose builds on PyPI want CUDA libraries. The definitions need
none of that, and copies of them would be a thousand lines to keep equal to what the weights were trained with. So their
modules are imported alone: while `_only_leaf_modules()` is active, the packages around them are empty namespaces that
only know where their folders are, and the few names the definitions import but never use are stand-ins. Afterwards
`sys.modules` is as it was: where the complete packages are installed in working order, `import basicsr` elsewhere in
the process still gets the real thing.

Needs the distributions `realesrgan`, `basicsr` and `spandrel` installed (`pip install --no-deps`), and nothing they
depend on.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.errors import ModelError
from tasks.media.colour import convolve
from tasks.models.cards import ModelCard

_import_lock = threading.Lock()

#: Packages within the distributions whose own `__init__` must not run.
_NAMESPACES: Final = {
    "basicsr": ("utils", "archs", "ops", "ops.dcn"),
    "realesrgan": ("archs",),
    "spandrel": ("architectures", "architectures.SwinIR", "architectures.Swin2SR"),
}


#: Slope of every LeakyReLU and factor of every residual in an RRDBNet.
RRDB_SLOPE: Final = 0.2
RRDB_RESIDUAL: Final = 0.2


def build(card: ModelCard) -> nn.Module:
    """The network of `card` with its initial, untrained weights, in evaluation mode on the current default device.

    It maps float `[n, 3, h, w]` in 0..1 to float `[n, 3, h * scale, w * scale]`, not clamped. Height and width must be
    multiples of `card.size_multiple`.

    Raises:
        ModelError: The package that defines it is not installed.
    """
    if card.architecture == "srvgg":
        srvgg = official("realesrgan.archs.srvgg_arch", "SRVGGNetCompact")
        network = srvgg(num_feat=card.num_feat, num_conv=card.num_conv, upscale=card.scale, act_type="prelu")
    elif card.architecture == "rrdb":
        rrdb = official("basicsr.archs.rrdbnet_arch", "RRDBNet")
        network = rrdb(3, 3, card.scale, num_feat=card.num_feat, num_block=card.num_block, num_grow_ch=card.num_grow)
    else:
        network = _transformer(card)
    return network.eval().requires_grad_(False)


def _transformer(card: ModelCard) -> nn.Module:
    name = {"swinir": "SwinIR", "swin2sr": "Swin2SR"}[card.architecture]
    definition = official(f"spandrel.architectures.{name}.__arch.{name}", name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        # What it computes does not depend on the size it was trained for, as long as that is more than a window.
        network: nn.Module = definition(
            img_size=2 * card.window_size,
            upscale=card.scale,
            embed_dim=card.embed_dim,
            depths=card.depths,
            num_heads=card.num_heads,
            window_size=card.window_size,
            mlp_ratio=card.mlp_ratio,
            upsampler=card.upsampler,
            resi_connection=card.resi_connection,
        )
    for module in network.modules():
        for table, values in list(module.named_buffers(recurse=False)):
            module.register_buffer(table, values, persistent=False)  # It follows from the window size: no weight.
    _share_masks(network, card.window_size)
    return network


def _share_masks(network: nn.Module, window: int) -> None:
    """Let all blocks use one attention mask per size of picture.

    The definition makes the mask of any size but the one it was built for anew in every block, on the CPU and in fp32:
    more work than the network itself is for a GPU, and an error in half precision.
    """
    blocks: list[Any] = [module for module in network.modules() if hasattr(module, "calculate_mask")]
    make = type(blocks[0]).calculate_mask
    shifted = next((block for block in blocks if block.shift_size), None)

    @lru_cache(maxsize=4)  # Tiles at the right and the bottom are smaller than the others.
    def mask(size: tuple[int, int], like: tuple[torch.device, torch.dtype]) -> Tensor:
        with torch.device("cpu"):
            return make(shifted, size).to(*like)

    @lru_cache(maxsize=2)
    def no_mask(like: tuple[torch.device, torch.dtype]) -> Tensor:
        return torch.zeros((1, window**2, window**2)).to(*like)

    def share(block: Any) -> None:
        def calculate_mask(size: tuple[int, int]) -> Tensor:
            like = (block.norm1.weight.device, block.norm1.weight.dtype)
            return mask(size, like) if block.shift_size else no_mask(like)

        # Without a size of its own, a block asks for the mask of every one it is given.
        block.input_resolution, block.attn_mask, block.calculate_mask = None, None, calculate_mask

    for block in blocks:
        share(block)


@lru_cache(maxsize=8)
def parameter_shapes(card: ModelCard) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every weight the network of `card` has."""
    # Transformers read a number off a tensor while they are built, which is not possible on `meta`.
    with torch.device("cpu" if card.window_size else "meta"):
        return {name: tuple(weight.shape) for name, weight in build(card).state_dict().items()}


def is_table(name: str) -> bool:
    """Whether an entry of a state dict is one of the tables that transformers make from their window size."""
    return name.endswith((".attn_mask", ".attn.relative_position_index", ".attn.relative_coords_table"))


def low_resolution_output(network: nn.Module, x: Tensor, rows: int | None = None) -> Tensor:
    """An SRVGGNetCompact without its last step, the pixel shuffle.

    Everything after the network that works pixel by pixel is cheaper before the shuffle, and the residual (the
    nearest neighbour of the input) is a broadcast there instead of an enlarged copy.

    Args:
        network: A network of architecture `srvgg`.
        x: float `[n, 3, h, w]`.
        rows: Take the image through all layers in strips of that many rows, each layer keeping the two rows it needs
            again. No row is computed twice and the result is the same bit for bit, but an activation is as large as
            a strip: it stays in the processor's cache, and its memory is reused instead of mapped anew by the kernel.

    Returns:
        float `[n, 3 * scale**2, h, w]`; `F.pixel_shuffle(result, scale)` is what `network(x)` is.
    """
    layers: list[Any] = list(network.body)  # type: ignore[arg-type]
    steps = list(itertools.zip_longest(layers[0::2], layers[1::2]))  # a convolution and its PReLU; none after the last
    n, _, h, w = x.shape
    if rows is None or rows >= h:
        value = x
        for convolution, activation in steps:
            value = convolve(value, convolution.weight, convolution.bias, (1, 1))
            value = activation(value) if activation is not None else value
        return _add_residual(value, x)
    channels = steps[-1][0].out_channels
    result = torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    kept: list[Tensor | None] = [None] * len(steps)
    done = 0
    for top in range(0, h, rows):
        value = x[:, :, top : top + rows]
        at_bottom = top + rows >= h
        for i, (convolution, activation) in enumerate(steps):
            above = kept[i]
            value = F.pad(value, (0, 0, 1, 0)) if above is None else torch.cat((above, value), dim=2)
            if at_bottom:
                value = F.pad(value, (0, 0, 0, 1))
            else:
                # A copy, or the whole strip would stay in memory with the view.
                kept[i] = value[:, :, -2:].clone(memory_format=torch.channels_last)
            if value.shape[2] < 3:  # only near the top: this layer waits for the next strip
                break
            value = convolve(value, convolution.weight, convolution.bias, (0, 1))
            value = activation(value) if activation is not None else value
        else:
            finished = slice(done, done + value.shape[2])
            result[:, :, finished] = _add_residual(value, x[:, :, finished])
            done = finished.stop
    return result


def _add_residual(output: Tensor, x: Tensor) -> Tensor:
    """Add the input to `output` in place: channel `c * scale**2 + i` becomes pixel `i` of each cell of colour `c`."""
    n, channels, h, w = output.shape
    output.view(n, 3, channels // 3, h, w).add_(x.unsqueeze(2))
    return output


@lru_cache(maxsize=8)
def official(module: str, name: str) -> Any:
    """The object `name` of the official package's `module`, imported without the rest of the package.

    Args:
        module: A module of `realesrgan`, `basicsr` or `spandrel`, such as `realesrgan.archs.srvgg_arch`.
        name: A class or function in it.

    Raises:
        ModelError: The package is not installed.
    """
    with _import_lock:
        if module in sys.modules:  # the complete package is here already, and works
            return getattr(sys.modules[module], name)
        with _only_leaf_modules(module.partition(".")[0]):
            return getattr(importlib.import_module(module), name)


@contextmanager
def _only_leaf_modules(package: str) -> Iterator[None]:
    """Let modules of a package be imported without running the package's own `__init__`."""
    stand_ins = _namespace("spandrel") if package == "spandrel" else _stand_ins_of_realesrgan()

    def ours(module: str) -> bool:
        return module.partition(".")[0] in {*_NAMESPACES, "torchvision", "distutils"}

    before = {name: module for name, module in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _stand_ins_of_realesrgan() -> dict[str, types.ModuleType]:
    """`realesrgan` and `basicsr`, which its modules import, with the names the definitions import but never use."""

    def not_needed(*_: object, **__: object) -> None:
        """Stand in for a function that inference never calls."""

    stand_ins = {**_namespace("basicsr"), **_namespace("realesrgan")}
    stand_ins["basicsr.utils"].__dict__["get_root_logger"] = not_needed
    # Used only by networks for video restoration with deformable convolutions, which this project does not run.
    stand_ins["basicsr.ops.dcn"].__dict__.update(ModulatedDeformConvPack=object, modulated_deform_conv=not_needed)
    stand_ins["torchvision"] = types.ModuleType("torchvision")
    stand_ins["torchvision"].__dict__["__version__"] = "0"
    # Left the standard library in Python 3.12.
    stand_ins["distutils"] = types.ModuleType("distutils")
    stand_ins["distutils.version"] = types.ModuleType("distutils.version")
    stand_ins["distutils.version"].__dict__["LooseVersion"] = str
    return stand_ins


def _namespace(package: str) -> dict[str, types.ModuleType]:
    """Empty modules for a package and its subpackages that find their submodules on disk.

    Raises:
        ModelError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The Python package {package} is not installed", f"pip install --no-deps {package}")
    root = list(spec.submodule_search_locations)
    modules = {package: types.ModuleType(package)}
    modules[package].__path__ = root
    for name in _NAMESPACES[package]:
        module = types.ModuleType(f"{package}.{name}")
        module.__path__ = [f"{folder}/{name.replace('.', '/')}" for folder in root]
        modules[module.__name__] = module
    return modules
