"""The smallest world of shapes, as fixtures."""

from tests.stages.little_world import checkpoint, made, small

__all__ = ["checkpoint", "made", "small"]
