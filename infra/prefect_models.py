"""Prefect's models, finished before several threads use them."""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel


@cache
def complete_models() -> None:
    """Have pydantic finish the models of Prefect here, in one thread and once, instead of in whichever uses one first.

    It parses signatures for that, which is not safe in several threads of Python 3.11 (gh-106905): a run then ends in
    "AST constructor recursion depth mismatch".
    """
    waiting = [BaseModel]
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if not model.__pydantic_complete__ and model.model_config.get("defer_build"):
            model.model_rebuild(raise_errors=False)
