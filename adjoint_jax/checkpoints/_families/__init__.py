"""The networks that can be loaded and saved, one file a family."""

from . import classifier, unet2d, unet2d_condition

FAMILIES = (unet2d.FAMILY, unet2d_condition.FAMILY, classifier.FAMILY)
