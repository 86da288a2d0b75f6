"""The corpus of clips, for the tests of this folder."""

from tests.media.clips import clips

__all__ = ["clips"]
