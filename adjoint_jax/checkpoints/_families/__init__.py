"""The networks that can be loaded and saved, one file a family."""

from . import adm, autoencoder_kl, classifier, clip_text, clip_vision, diffae, dit, edm, sd3, unet2d, unet2d_condition

FAMILIES = (
    unet2d.FAMILY,
    classifier.FAMILY,
    autoencoder_kl.FAMILY,
    *clip_text.FAMILIES,
    *clip_vision.FAMILIES,
    clip_vision.WHOLE,
    dit.FAMILY,
    dit.OLD,
    sd3.FAMILY,
    *edm.FAMILIES,
    unet2d_condition.FAMILY,
    adm.UNET,
    adm.CLASSIFIER,
    diffae.FAMILY,
)
