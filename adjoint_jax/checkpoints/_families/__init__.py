"""The networks that can be loaded and saved, one file a family."""

from . import classifier, dit, unet2d

FAMILIES = (unet2d.FAMILY, classifier.FAMILY, dit.FAMILY, dit.OLD)
