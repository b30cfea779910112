"""The networks that can be loaded and saved, one file a family."""

from . import classifier, dit, sd3, unet2d

FAMILIES = (unet2d.FAMILY, classifier.FAMILY, dit.FAMILY, dit.OLD, sd3.FAMILY)
