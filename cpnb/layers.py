"""CP layers."""

from cpnb.base import CPLayer
from cpnb.conv import CPConv1d, CPConv2d, CPConv3d
from cpnb.linear import CPLinear
from cpnb.surgery import from_layer

__all__ = ["CPConv1d", "CPConv2d", "CPConv3d", "CPLayer", "CPLinear", "from_layer"]
