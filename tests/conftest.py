"""Every test runs in float64 by default, on four devices, with JAX's strictest promotion rules."""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
if version("jaxlib").startswith("0.10."):  # which compiles small programs twice as fast by these; an unknown flag is fatal elsewhere
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook("adjoint_jax", "typechecker.check")

OPTIMISED = ("test_readme", "test_guide", "test_unet2d", "test_published_weights", "test_own_network")
"""Files whose networks take longer to run than to compile."""


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    """Small programs run once: most of LLVM's work on them is wasted."""
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ not in OPTIMISED)
