"""Running the original PyTorch network beside ours: weights from one rule on both sides, numbers compared, gradients too.

The originals are those of the extra `parity` (torch, diffusers, transformers). Without it a test that asks for them is skipped with the reason.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_unet2d import weight

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # each program runs once


def original(name):
    """A module of the extra `parity`, or a skip."""
    module = pytest.importorskip(name, reason=f"{name} is not installed: pip install 'adjoint-jax[parity]'")
    pytest.importorskip("torch").set_num_threads(1)  # more would wait for each other longer than these networks run
    return module


def randomise(module):
    """Gives a torch module the weights of the rule, zero-initialised layers among them, in evaluation mode. Returns it."""
    torch = original("torch")
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            tensor.copy_(torch.from_numpy(np.asarray(weight(name, tuple(tensor.shape)))))
    return module.eval()


def tensors(module):
    """The state dict of a torch module as (name, array) pairs."""
    return [(name, tensor.detach().float().numpy()) for name, tensor in module.state_dict().items()]


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative(ours, theirs):
    """|ours - theirs| / |theirs| in the 2-norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def nhwc(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def value_and_gradient(function, x, cotangent):
    """f(x) and J(x)^T cotangent of a JAX function of one array."""

    def both(x, cotangent):
        y, back = jax.vjp(function, x)
        return y, back(cotangent)[0]

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(both, compiler_options=QUICK)(jnp.asarray(x), jnp.asarray(cotangent))


def torch_value_and_gradient(function, x, cotangent):
    """The same of a torch function, in torch's layout, as numpy arrays."""
    torch = original("torch")
    x = torch.from_numpy(np.ascontiguousarray(x)).requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad(y, x, torch.from_numpy(np.ascontiguousarray(cotangent)))
    return y.detach().numpy(), gradient.numpy()
