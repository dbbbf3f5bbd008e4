"""The joint mixer: attention of text and image together, at a cost linear in the image's tokens."""

from .module import JointMixer
from .place import JointLayout
from .spec import JointSpec

__all__ = ["JointLayout", "JointMixer", "JointSpec"]
