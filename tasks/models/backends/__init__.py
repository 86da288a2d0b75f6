"""What runs a network: one interface, and the libraries behind it.

`torch` runs every network, on a GPU and on a CPU. `openvino` runs convolutional ones on a CPU, there close to the
fastest matrix product of the machine, and several frames side by side. `winograd` does so with fewer multiplications,
in fp32, and `cuda` runs convolutional networks in fp16 on a GPU: both by kernels of this project.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from tasks.errors import SettingsError
from tasks.models.backends import cuda_network, winograd_program
from tasks.models.cards import ModelCard

if TYPE_CHECKING:
    from tasks.media.colour import RgbToPlanes
    from tasks.models.quantisation import Quantised

#: What a backend may be, besides `auto`.
BACKENDS: Final = ("torch", "openvino", "winograd", "cuda")

#: What `openvino_network` builds.
OPENVINO_ARCHITECTURES: Final = ("srvgg", "rrdb")

#: What `winograd_network` and `winograd_dense_network` compute.
WINOGRAD_ARCHITECTURES: Final = ("srvgg", "rrdb")

#: Backends on a CPU that compute frames side by side.
SIDE_BY_SIDE: Final = ("openvino", "winograd")


class Backend(Protocol):
    """A network with its weights on a device, in one precision."""

    name: str
    """A word of `BACKENDS`."""
    dtype: torch.dtype
    """Type of what goes in."""

    def run(self, x: Tensor) -> Tensor:
        """Run the network. Several threads may do so at a time on a CPU.

        Args:
            x: `[n, 3, h, w]` in 0..1, of the type and on the device of the backend.

        Returns:
            For `srvgg` the result before the pixel shuffle, `[n, 3 * scale**2, h, w]`, else `[n, 3, h * scale,
            w * scale]`; not clamped. Valid until the next call in the same thread.
        """
        ...

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Run an `srvgg` network and make code values of the target of its result.

        Args:
            x: As for `run`.
            gains: See `RgbToPlanes.codes`.

        Returns:
            What `RgbToPlanes.codes` gives, and bool `[n]`: whether all that the network gave was finite. Valid until
            the next call in the same thread.
        """
        ...


def choose_backend(name: str, device: torch.device, card: ModelCard, precision: str = "fp32") -> str:
    """The backend that `name` means for a model on a device.

    Args:
        name: `auto` or a word of `BACKENDS`.
        device: Where it is to run.
        card: The model.
        precision: In which it is to compute, a key of `PRECISIONS`.

    Raises:
        SettingsError: There is no such backend, not here, not on this device, not for this model, or not this precise.
    """
    if name not in ("auto", *BACKENDS):
        raise SettingsError(f'There is no backend called "{name}"', f"Use auto, {', '.join(BACKENDS)}")
    if name == "auto":
        return _best(device, card, precision)
    if name == "cuda":
        _check_cuda(device, card, precision)
    elif name != "torch":
        _check_on_cpu(name, device, card, precision)
    return name


def _best(device: torch.device, card: ModelCard, precision: str) -> str:
    if device.type == "cuda":
        runs = precision == "fp16" and cuda_network.runs(card) and cuda_network.is_available(device)
        return "cuda" if runs else "torch"
    if precision == "fp32" and card.architecture in WINOGRAD_ARCHITECTURES and winograd_program.is_available():
        return "winograd"
    return "openvino" if card.architecture in OPENVINO_ARCHITECTURES and _has_openvino() else "torch"


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _check_on_cpu(name: str, device: torch.device, card: ModelCard, precision: str) -> None:
    is_winograd = name == "winograd"
    if device.type != "cpu":
        raise SettingsError(f"the backend {name} runs on a CPU only", "Use auto or torch")
    if card.architecture not in (WINOGRAD_ARCHITECTURES if is_winograd else OPENVINO_ARCHITECTURES):
        raise SettingsError(
            f"the backend {name} does not run {card.name}, a network of architecture {card.architecture}",
            "Use auto or torch",
        )
    if name == "openvino" and not _has_openvino():
        raise SettingsError("the Python package openvino is not installed", "Run make setup, or use auto or torch")
    if is_winograd and precision != "fp32":
        raise SettingsError(f"the backend winograd computes in fp32, not in {precision}", "Use auto or openvino")
    if is_winograd and not winograd_program.is_available():
        raise SettingsError(
            "the backend winograd needs the Python package llvmlite and a processor with AVX2 and FMA, or AVX-512",
            "Use auto or openvino",
        )


def _check_cuda(device: torch.device, card: ModelCard, precision: str) -> None:
    if not cuda_network.is_available(device):
        raise SettingsError(
            "the backend cuda needs a GPU of compute capability 8.0 or later and NVRTC", "Use auto or torch"
        )
    if not cuda_network.runs(card):
        raise SettingsError(
            f"the backend cuda does not run {card.name}: it runs `srvgg` networks of scale 2 or 4 and `rrdb` networks,"
            " of 16, 32, 48 or 64 channels",
            "Use auto or torch",
        )
    if precision != "fp16":
        raise SettingsError(f"the backend cuda computes in fp16, not in {precision}", "Use auto or torch")


def make_backend(
    name: str,
    card: ModelCard,
    state: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    threads: int,
    streams: int,
    to_planes: RgbToPlanes,
    quantised: Quantised | None = None,
) -> Backend:
    """Build the network of `card` with its weights.

    Args:
        name: A word of `BACKENDS`.
        card: The model.
        state: Its weights, on the CPU.
        device: Where it is to run.
        dtype: In which precision; `openvino` computes in float32 or bfloat16, `winograd` in float32, `cuda` in float16.
        threads: CPU threads to use.
        streams: Calls of `run` that come at the same time, on a CPU.
        to_planes: What makes code values of its result.
        quantised: The network in bytes, to run instead; `openvino` and `srvgg` only.
    """
    if name == "openvino":
        from tasks.models.backends.openvino_network import OpenVinoNetwork

        return OpenVinoNetwork(card, state, threads, streams, to_planes, quantised, in_bf16=dtype is torch.bfloat16)
    if name == "winograd" and card.architecture == "rrdb":
        from tasks.models.backends.winograd_dense_network import WinogradDenseNetwork

        return WinogradDenseNetwork(card, state, threads, streams)
    if name == "winograd":
        from tasks.models.backends.winograd_network import WinogradNetwork

        return WinogradNetwork(card, state, threads, streams, to_planes)
    if name == "cuda":
        return cuda_network.CudaNetwork(card, state, device, to_planes)
    from tasks.models.backends.torch_network import TorchNetwork

    return TorchNetwork(card, state, device, dtype, to_planes)
