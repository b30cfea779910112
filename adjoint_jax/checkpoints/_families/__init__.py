"""The networks that can be loaded and saved, one file a family."""

from . import adm, classifier, diffae, unet2d

FAMILIES = (unet2d.FAMILY, classifier.FAMILY, adm.UNET, adm.CLASSIFIER, diffae.FAMILY)
