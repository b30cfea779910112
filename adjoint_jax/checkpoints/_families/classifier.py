"""Files of `ConvClassifier`."""

from ...models import ConvClassifier
from .._family import Family

FAMILY = Family(ConvClassifier, "ConvClassifier", lists=("conv", "norm"))
