"""The networks that can be loaded and saved, one file a family."""

from . import autoencoder_kl, classifier, clip_text, unet2d, unet2d_condition

FAMILIES = (unet2d.FAMILY, unet2d_condition.FAMILY, classifier.FAMILY, autoencoder_kl.FAMILY, *clip_text.FAMILIES)
