"""Classifiers of digits that read samples: the embedded one, or one in a folder, and LeNet-5, which has another origin, where its weights are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from own_network.lenet import load_lenet

from adjoint_jax import _scoring
from adjoint_jax.experiments.metrics import margin

LENET = "LeNet"


class Judge(NamedTuple):
    """`logits(params, images)` `[B, classes]` of images `[B, H, W, C]` in [-1, 1], a jitted function."""

    name: str
    logits: Callable[[Any, Any], Any]
    params: Any

    def margins(self, labels: Any) -> Any:
        """How far each image is misread, `metrics.margin`, as a metric of images."""
        return jax.tree_util.Partial(margin, jax.tree_util.Partial(self.logits, self.params), labels)

    def classes(self, shape: tuple[int, ...]) -> int:
        """How many it knows, of images of `shape` `[H, W, C]`."""
        return jax.eval_shape(self.logits, self.params, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1]

    def read(self, images: Any) -> np.ndarray:
        """The class that is read, `[B]`. Raises ValueError for a classifier that answers with probabilities."""
        logits = np.asarray(self.logits(self.params, jnp.asarray(images)), np.float64)
        if logits.min() >= 0 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise ValueError(f"The classifier {self.name} answers with probabilities where logits are expected: leave its softmax out.")
        return np.argmax(logits, axis=1)


def judges(classifier: str | None, lenet: str, shape: tuple[int, ...], classes: int) -> tuple[dict[str, Judge], str]:
    """Those at hand for images of `shape` `[H, W, C]`, the first being `classifier` (None: the embedded one), and a sentence about LeNet.

    Raises ValueError for a classifier of another kind, or of another number of channels or classes.
    """
    module, params = _scoring.classifier(classifier, shape)
    name = "embedded" if classifier is None else Path(classifier).name
    if module.classes != classes:
        raise ValueError(f"The classifier {name} knows {module.classes} classes where the sampler draws {classes}: give one for them.")
    found = {name: Judge(name, jax.jit(lambda params, images: module.apply({"params": params}, images)), params)}
    second, note = lenet_judge(lenet, shape, classes)
    return found if second is None else {**found, LENET: second}, note


def lenet_judge(path: str, shape: tuple[int, ...], classes: int = 10) -> tuple[Judge | None, str]:
    """LeNet-5 with the weights at `path` for images of `shape` `[H, W, C]`, None where it cannot read them or is absent; and a sentence about it."""
    if (shape, classes) != ((28, 28, 1), 10):
        return None, f"{LENET}, which reads digits of 28 x 28 pixels, is left out: images are {' x '.join(map(str, shape))}."
    if not Path(path).is_file():
        return None, f"There is no second reader: the weights of {LENET} are not at {path}."
    network = load_lenet(path)
    return Judge(LENET, jax.jit(lambda _, images: network(images)), ()), f"The second reader is {LENET}, weights {Path(path).name}."
