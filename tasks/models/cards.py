"""Model cards: what each network is, where its weights are, and what it costs per pixel.

A card is one TOML file in `card_files/`; its file name is the model's name. A path to a `.pth` or `.safetensors` file
is as good as a name: the card is then read off the shapes of the weights.

    card = find_model("compact-x2")
    card = find_model("realesr-general-x4v3@0.5")
    card = find_model("weights/my-own-training.pth")

A number after `@` is a denoise strength, for models that come in two: 1 is the model itself, 0 its weaker partner, and
between them the weights of both are blended.

After the bundled weights change, `python -m tasks.models.cards refresh-bundled` writes their sizes and hashes into the
cards. This module does not load torch, except to look into a weight file given by path.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from tasks.errors import ModelError, SettingsError
from tasks.models import swin

Architecture = Literal["srvgg", "rrdb", "swinir", "swin2sr"]
Upsampler = Literal["nearest+conv", "pixelshuffle", "pixelshuffledirect"]

CARD_FOLDER: Final = Path(__file__).parent / "card_files"
BUNDLED_FOLDER: Final = Path(__file__).parent / "bundled"

#: Suffixes of weight files that can be given by path.
WEIGHT_SUFFIXES: Final = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One network and its weight file."""

    name: str
    """What users call it."""
    architecture: Architecture
    """`srvgg`: SRVGGNetCompact with PReLU. `rrdb`: RRDBNet (ESRGAN). `swinir`, `swin2sr`: transformers on windows."""
    scale: int
    """Output pixels per input pixel along each axis."""
    num_feat: int = 64
    """`srvgg`, `rrdb`: channels between layers."""
    num_conv: int = 0
    """`srvgg`: 3x3 convolutions between the first and the last one."""
    num_block: int = 0
    """`rrdb`: residual-in-residual dense blocks."""
    num_grow: int = 32
    """`rrdb`: channels each convolution of a dense block adds."""
    embed_dim: int = 0
    """`swinir`, `swin2sr`: channels of the transformer; so for all below."""
    depths: tuple[int, ...] = ()
    """Blocks in each group."""
    num_heads: tuple[int, ...] = ()
    """Attention heads in each group."""
    window_size: int = 0
    """Edge in pixels of the windows that attention looks at."""
    mlp_ratio: float = 2.0
    """Hidden units of a block's perceptron per channel."""
    upsampler: Upsampler = "nearest+conv"
    """How the picture is enlarged at the end."""
    resi_connection: Literal["1conv", "3conv"] = "1conv"
    """Convolutions at the end of a group."""
    bytes: int
    """Size of the weight file."""
    sha256: str
    """Hash of the weight file, 64 hex digits."""
    url: str | None = None
    """Where the weight file can be downloaded, `None` for bundled and own models."""
    bundled: bool = False
    """The weight file is in this repository, in safetensors format, named after the card."""
    path: str | None = None
    """Absolute path of the weight file of a model that was given by path."""
    licence: str
    """SPDX identifier, or where to look."""
    source: str
    """Who trained it."""
    best_for: str
    """When to choose it, one line."""
    description: str
    """What it is, one line."""
    denoise_partner: str | None = None
    """Name of the model with the same network that removes less noise."""
    denoise: float | None = None
    """Share of the model's own weights in a blend with those of its partner, between 0 and 1; `None` for no blend."""

    def __post_init__(self) -> None:
        # TOML has lists only; cards are keys of caches.
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))

    @property
    def files(self) -> tuple[ModelCard, ...]:
        """The cards whose weight files the model is made of: its own, or both of a blend."""
        if self.denoise is None:
            return (self,)
        own, partner = (all_cards()[name] for name in (self.name.rpartition("@")[0], str(self.denoise_partner)))
        return own, partner

    @property
    def file_name(self) -> str:
        """Name of the weight file, the same in every folder it may lie in."""
        if self.path is not None:
            return Path(self.path).name
        return self.url.rpartition("/")[2] if self.url else f"{self.name}.safetensors"

    @property
    def size_multiple(self) -> int:
        """Width and height the network takes must be multiples of this.

        `rrdb` below x4 starts by a pixel unshuffle; transformers divide the picture into windows.
        """
        if self.window_size:
            return self.window_size
        return max(1, 4 // self.scale) if self.architecture == "rrdb" else 1

    @property
    def receptive_field(self) -> int:
        """Radius in input pixels: an output pixel depends on no input pixel farther away than this.

        Every 3x3 convolution adds one pixel at its own resolution. `srvgg` has `num_conv + 2`. `rrdb` has 15 per
        block, one before and one after them, and four after the upsampling at 2, 4, 4 and 4 times the resolution
        of the blocks (1.25 together), all of it counted in unshuffled pixels. Of such a pixel's own input pixels the
        farthest is one less than `size_multiple` away. For the others see `swin.receptive_field`.
        """
        if self.window_size:
            return swin.receptive_field(self)
        if self.architecture == "srvgg":
            return self.num_conv + 2
        return math.ceil(self.size_multiple * (15 * self.num_block + 2 + 1.25) + self.size_multiple - 1)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        if self.window_size:
            return swin.parameters(self)
        f = self.num_feat
        if self.architecture == "srvgg":
            convolutions = _conv(3, f) + self.num_conv * _conv(f, f) + _conv(f, 3 * self.scale**2)
            return convolutions + (self.num_conv + 1) * f
        dense = sum(_conv(f + i * self.num_grow, self.num_grow) for i in range(4)) + _conv(f + 4 * self.num_grow, f)
        return _conv(3 * self.size_multiple**2, f) + 3 * self.num_block * dense + 4 * _conv(f, f) + _conv(f, 3)

    @property
    def flop_per_input_pixel(self) -> int:
        """Floating point operations of convolutions and matrix products, a multiply and an add counted as two."""
        if self.window_size:
            return swin.flop_per_input_pixel(self)
        f = self.num_feat
        if self.architecture == "srvgg":
            return 18 * (3 * f + self.num_conv * f * f + f * 3 * self.scale**2)
        dense = sum((f + i * self.num_grow) * self.num_grow for i in range(4)) + (f + 4 * self.num_grow) * f
        body = 3 * self.size_multiple**2 * f + 3 * self.num_block * dense + f * f
        upsampling = 4 * f * f + 16 * (f * f + f * f + 3 * f)
        return 18 * (body + upsampling) // self.size_multiple**2


def _conv(inputs: int, outputs: int) -> int:
    """Weights and biases of a 3x3 convolution."""
    return 9 * inputs * outputs + outputs


@lru_cache(maxsize=1)
def all_cards() -> Mapping[str, ModelCard]:
    """Every known model by name, the bundled ones first."""
    cards = [ModelCard(**tomllib.loads(file.read_text())) for file in CARD_FOLDER.glob("*.toml")]
    return {card.name: card for card in sorted(cards, key=lambda card: (not card.bundled, card.name.lower()))}


def find_model(name_or_path: str | Path) -> ModelCard:
    """The card of a model given by name or by the path of its weight file.

    Args:
        name_or_path: A name from `all_cards()` (case does not matter), with `@` and a denoise strength if wanted, or a
            `.pth`, `.pt` or `.safetensors` file.

    Raises:
        ModelError: No such model or file, or the file holds no network that can be run.
        SettingsError: A denoise strength that is no number from 0 to 1, or for a model that does not come in two.
    """
    text = str(name_or_path)
    by_lower_name = {name.lower(): card for name, card in all_cards().items()}
    if (card := by_lower_name.get(text.lower())) is not None:
        return card
    name, at, strength = text.rpartition("@")
    if at and "/" not in strength and not text.lower().endswith(WEIGHT_SUFFIXES):
        return _blend(find_model(name), strength)
    if text.lower().endswith(WEIGHT_SUFFIXES) or "/" in text:
        return _card_of_file(Path(text))
    near = difflib.get_close_matches(text.lower(), by_lower_name, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(by_lower_name[name].name for name in near)}? " if near else ""
    raise ModelError(
        f'No model is called "{text}"',
        f"{hint}Known models: {', '.join(all_cards())}; or give the path of a .pth or .safetensors file",
    )


def _blend(card: ModelCard, strength: str) -> ModelCard:
    """A model at a denoise strength, as the option `-dn` of Real-ESRGAN's scripts means it."""
    if card.denoise is not None:
        raise SettingsError(f"{card.name} has a denoise strength already", "Give one")
    if card.denoise_partner is None:
        able = ", ".join(other.name for other in all_cards().values() if other.denoise_partner)
        raise SettingsError(
            f"model {card.name} has no denoise strength: there is no other one to blend it with", f"Choose {able}"
        )
    try:
        share = float(strength)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise SettingsError(
            f"{strength!r} is no denoise strength", "Give a number from 0 (keep noise) to 1 (remove it)"
        )
    if share in (0, 1):
        return card if share else all_cards()[card.denoise_partner]
    partner = all_cards()[card.denoise_partner]
    return replace(
        card,
        name=f"{card.name}@{share}",
        denoise=share,
        bytes=card.bytes + partner.bytes,
        sha256=hashlib.sha256(f"{card.sha256} {partner.sha256} {share}".encode()).hexdigest(),
        description=f"{share} parts of {card.name} and {1 - share:g} of {partner.name}.",
    )


def _card_of_file(path: Path) -> ModelCard:
    # Here: torch loads only when a weight file has to be looked into.
    from tasks.models.state import fitted, parse_state
    from tasks.models.weights import read_bytes

    path = path.expanduser().resolve()
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ModelError(f"{path} is not a weight file", f"Give a file ending in {', '.join(WEIGHT_SUFFIXES)}")
    if not path.is_file():
        raise ModelError(f"The weight file {path} does not exist", "Check the path")
    data = read_bytes(path)
    state = parse_state(data, path)
    card = ModelCard(
        name=path.stem,
        **_architecture_of({key: tuple(tensor.shape) for key, tensor in state.items()}, path),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        path=str(path),
        licence="unknown",
        source=str(path),
        best_for="what it was trained for",
        description=f"Own weights from {path.name}.",
    )
    fitted(state, card, path)  # What no worker could load is refused at once.
    return card


def _architecture_of(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """Architecture and hyper-parameters from the names and shapes of a state dict.

    Raises:
        ModelError: None of the architectures has such weights.
    """
    if swin.is_swin(shapes):
        try:
            return swin.hyper_parameters(shapes)
        except swin.NotSwinError as error:
            raise ModelError(
                f"{path} looks like SwinIR or Swin2SR, but {error}", "Use a super-resolution network of their releases"
            ) from error
    unknown = ModelError(
        f"{path} holds neither an SRVGGNetCompact (PReLU) nor an RRDBNet, SwinIR or Swin2SR for RGB images",
        "Use weights in the layout of the official releases",
    )
    first, grow = shapes.get("conv_first.weight"), shapes.get("body.0.rdb1.conv1.weight")
    if first is not None and grow is not None:
        scale = {3: 4, 12: 2, 48: 1}.get(first[1] if len(first) == 4 else 0)
        blocks = {key.split(".")[1] for key in shapes if key.startswith("body.")}
        if scale is None or shapes.get("conv_last.weight", (0,))[0] != 3:
            raise unknown
        return {
            "architecture": "rrdb",
            "scale": scale,
            "num_feat": first[0],
            "num_block": len(blocks),
            "num_grow": grow[0],
        }
    numbered = ((re.fullmatch(r"body\.(\d+)\.weight", key), shape) for key, shape in shapes.items())
    layers = sorted((int(match[1]), shape) for match, shape in numbered if match)
    convolutions = [shape for _, shape in layers if len(shape) == 4]
    if len(convolutions) < 2 or len(layers) != 2 * len(convolutions) - 1 or convolutions[0][1:] != (3, 3, 3):
        raise unknown
    scale = math.isqrt(convolutions[-1][0] // 3)
    if scale < 1 or 3 * scale**2 != convolutions[-1][0]:
        raise unknown
    return {
        "architecture": "srvgg",
        "scale": scale,
        "num_feat": convolutions[0][0],
        "num_conv": len(convolutions) - 2,
    }


def refresh_bundled(card_folder: Path = CARD_FOLDER, bundled_folder: Path = BUNDLED_FOLDER) -> list[str]:
    """Write size and hash of each bundled weight file into its card.

    Returns:
        Names of the cards that changed.

    Raises:
        ModelError: A bundled weight file is missing; the cards of the others are written all the same.
    """
    changed, missing = [], []
    for card_file in sorted(card_folder.glob("*.toml")):
        text = card_file.read_text()
        card = ModelCard(**tomllib.loads(text))
        if not card.bundled:
            continue
        weight_file = bundled_folder / card.file_name
        if not weight_file.is_file():
            missing.append(card.file_name)
            continue
        data = weight_file.read_bytes()
        new = re.sub(r"^bytes = .*$", f"bytes = {len(data)}", text, flags=re.MULTILINE)
        new = re.sub(r"^sha256 = .*$", f'sha256 = "{hashlib.sha256(data).hexdigest()}"', new, flags=re.MULTILINE)
        if new != text:
            card_file.write_text(new)
            changed.append(card.name)
    all_cards.cache_clear()
    if missing:
        raise ModelError(f"{bundled_folder} lacks {', '.join(missing)}", "Train them, or remove their cards")
    return changed


if __name__ == "__main__":
    if sys.argv[1:] != ["refresh-bundled"]:
        sys.exit("usage: python -m tasks.models.cards refresh-bundled")
    try:
        print("refreshed:", ", ".join(refresh_bundled()) or "nothing, all cards are up to date")
    except ModelError as error:
        sys.exit(str(error))
