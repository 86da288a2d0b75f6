"""What is in a weight file, read without trusting it.

    state = load_state(find_model("realesr-animevideov3"))

What is parsed are the very bytes whose hash was compared with the model card; no code in a file is ever run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tasks.errors import ModelError
from tasks.models import networks
from tasks.models.cards import ModelCard
from tasks.models.weights import read_checked

_OTHER_FILE: Final = "Use the file that belongs to this model"


def load_state(card: ModelCard) -> dict[str, Tensor]:
    """The weights of `card` on the CPU, float32, exactly those its network needs.

    Raises:
        ModelError: A file is missing, is not the one the card describes, holds code, lacks weights, has weights too
            many or of other shapes, or has some that are not finite.
    """
    if card.denoise is None:
        return _load_file(card)
    own, partner = (_load_file(part) for part in card.files)
    return {name: card.denoise * tensor + (1 - card.denoise) * partner[name] for name, tensor in own.items()}


def _load_file(card: ModelCard) -> dict[str, Tensor]:
    path, data = read_checked(card)
    return fitted(parse_state(data, path), card, path)


def fitted(state: Mapping[str, Tensor], card: ModelCard, path: Path) -> dict[str, Tensor]:
    """Weights as the network of `card` needs them.

    Args:
        state: What is in the file, in its own types.
        card: The model.
        path: The file, for errors.

    Raises:
        ModelError: Weights are missing, too many, of other shapes, or not finite.
    """
    state = {name: tensor for name, tensor in state.items() if not networks.is_table(name)}
    expected = networks.parameter_shapes(card)
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"{path} lacks {len(missing)} weights of {card.name}, {missing[0]} first", _OTHER_FILE)
    if extra := sorted(state.keys() - expected.keys()):
        raise ModelError(
            f"{path} has {len(extra)} weights that {card.name} has no use for, {extra[0]} first", _OTHER_FILE
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"Weight {name} in {path} has shape {tuple(tensor.shape)}, {card.name} needs {expected[name]}",
                _OTHER_FILE,
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"Weight {name} in {path} holds values that are not finite", "Train or export the model again"
            )
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def parse_state(data: bytes, path: Path) -> dict[str, Tensor]:
    """Name and value of every weight in a `.safetensors` or `torch.save` file, on the CPU, in the file's own types.

    Of a training checkpoint the smoothed weights (`params_ema`) are taken, else `params`, else the file's top level.

    Args:
        data: The file's content.
        path: Its name, which decides the format and appears in errors.

    Raises:
        ModelError: The file is damaged, or is a pickle that holds more than tensors and plain values.
    """
    damaged = ModelError(f"The weight file {path} is damaged or is not one", "Download or copy it again")
    if path.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise damaged from error
    try:
        # Tensors saved on a GPU (the official realesr-animevideov3 is one) must load where there is none.
        content = torch.load(BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise damaged from error
        raise ModelError(
            f"{path} is a pickle that wants to run code while it loads; it was not loaded",
            "Use weights from a source you trust, saved as plain tensors or as .safetensors",
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, IndexError, AttributeError, TypeError) as error:
        raise damaged from error
    for key in ("params_ema", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ModelError(f"{path} holds no state dict (names with tensors)", "Save network.state_dict()")
    return dict(content)
