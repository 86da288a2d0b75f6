"""Who takes part in an evaluation: models, and the classical kernels that they have to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tasks.errors import SettingsError
from tasks.models.cards import find_model
from tasks.models.weights import content_hash, locate

#: Always in the table, so that gains can be seen.
BASELINES: Final = ("bicubic", "lanczos")


@dataclass(frozen=True)
class Contender:
    """One way to enlarge a picture."""

    label: str
    """What it is called in tables."""
    model: str = ""
    """Name of a model card, or absolute path of a weight file; empty for a classical kernel."""
    model_hash: str = ""

    @property
    def is_model(self) -> bool:
        return bool(self.model)


def find_contender(model: str, scale: int) -> Contender:
    """A model that is known, complete and enlarges enough.

    Args:
        model: Name of a model card, or path of a weight file.
        scale: How many times it has to enlarge.

    Raises:
        ModelError: It is unknown, or its weights are missing or not the right ones.
        SettingsError: It enlarges less.
    """
    card = find_model(model)
    if card.scale < scale:
        raise SettingsError(
            f"model {card.name} enlarges {card.scale} times, {scale} times was asked for", "Choose a smaller scale"
        )
    locate(card)
    return Contender(card.name, card.path or card.name, content_hash(card))


def with_baselines(models: list[Contender]) -> list[Contender]:
    """The baselines and these models.

    Raises:
        SettingsError: Two of them have the same name.
    """
    contenders = [*(Contender(kernel) for kernel in BASELINES), *models]
    names = [contender.label for contender in contenders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(
            f"two contenders are called {', '.join(twice)}",
            f"Name each model once; {' and '.join(BASELINES)} take part anyhow",
        )
    return contenders
