"""The networks that can be loaded and saved, one file a family."""

from . import classifier, edm, unet2d

FAMILIES = (unet2d.FAMILY, classifier.FAMILY, *edm.FAMILIES)
