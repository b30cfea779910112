"""Every test runs in float64 by default, on four devices, with JAX's strictest promotion rules."""

import os
import zlib
from collections import defaultdict
from importlib.metadata import version
from math import ceil

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
if version("jaxlib").startswith("0.10."):  # which compiles small programs twice as fast by these; an unknown flag is fatal elsewhere
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)  # programs run once: most of LLVM's work on them is wasted

install_import_hook("adjoint_jax", "typechecker.check")

THINNED = (
    "test_adaptive.py::test_the_error_is_the_difference_to_the_order_below",
    "test_adaptive.py::test_the_grid_found_is_a_grid",
    "test_adaptive.py::test_under_diffrax_controllers",
    "test_adjoint_dpm.py::test_order_in_every_input",
    "test_adjoint_dpm.py::test_order_on_a_gaussian",
    "test_adm.py::test_equals_the_reference",
    "test_deis.py::test_every_stochastic_solver",
    "test_deis.py::test_gaussians_are_exact",
    "test_deis.py::test_orders",
    "test_deis.py::test_the_factor_of_the_sde",
    "test_deis.py::test_the_intervals_sum_to_the_whole",
    "test_diffae.py::test_equals_the_reference",
    "test_discrete.py::test_every_option_gives_the_gradient_of_autodiff",
    "test_discrete.py::test_hessian_vector_products",
    "test_discrete.py::test_options_under_vmap_and_shard_map",
    "test_dit.py::test_equals_diffusers",
    "test_edm.py::test_equals_the_reference",
    "test_export.py::test_float32_stays_float32_where_x64_is_on",
    "test_fitted.py::test_what_was_fitted_serves_other_samples",
    "test_gaussian.py::test_every_adjoint_is_exact",
    "test_gaussian.py::test_every_process_and_prediction_is_exact",
    "test_gaussian.py::test_every_solver_is_exact",
    "test_gms.py::test_exact_gradients_keys_and_one_trace",
    "test_gms.py::test_three_moments_of_the_transition",
    "test_guidance.py::test_exact_gradients_are_those_of_plain_autodiff",
    "test_guidance.py::test_export_for_tpu_holds_no_float64",
    "test_guidance.py::test_the_gradient_in_the_scale_by_differences",
    "test_guidance.py::test_vmap_over_scales_and_samples_and_one_trace",
    "test_guide.py::test_evaluations_are_those_that_happen",
    "test_interpolated.py::test_all_nodes_are_exact",
    "test_interpolated.py::test_few_nodes_converge",
    "test_ldm.py::test_published_architectures",
    "test_memory_and_work.py::test_discrete_adjoint_stores_one_state_a_step",
    "test_memory_and_work.py::test_work_of_the_continuous_adjoint",
    "test_orders.py::test_continuous_adjoints_have_their_order",
    "test_orders.py::test_convergence",
    "test_orders.py::test_samples_and_exact_gradients_have_the_solvers_order",
    "test_overhead.py::test_a_step_costs_next_to_nothing_beside_its_network",
    "test_plan.py::test_bytes_are_those_of_the_compiled_gradient",
    "test_plan.py::test_the_plan_counts_segments",
    "test_reversible.py::test_a_pair_is_the_same_sample",
    "test_reversible.py::test_every_process_on_a_traced_grid",
    "test_reversible.py::test_gradients_through_pairs_are_exact",
    "test_reversible.py::test_recovered_noises_make_the_image",
    "test_reversible.py::test_round_trips",
    "test_reversible.py::test_the_stochastic_rex_is_undone_along_its_path",
    "test_reversible_adjoint.py::test_any_number_of_segments",
    "test_reversible_adjoint.py::test_it_is_the_discrete_adjoint",
    "test_reversible_adjoint.py::test_memory_is_flat",
    "test_reversible_adjoint.py::test_under_transformations",
    "test_schedules_and_statistics.py::test_float32",
    "test_schedules_and_statistics.py::test_gradient_in_the_grid",
    "test_schedules_and_statistics.py::test_gradients_are_exact",
    "test_sd3.py::test_equals_diffusers",
    "test_sde.py::test_exact_gradients_and_keys",
    "test_sde.py::test_gddim_is_its_own_quadrature",
    "test_sde.py::test_marginals_of_a_gaussian",
    "test_sde.py::test_strong_order",
    "test_sde_terms.py::test_marginal_variance_of_a_gaussian",
    "test_sde_terms.py::test_strong_order_on_one_path",
    "test_traced.py::test_every_convolution_of_a_gradient_compiles_in_one_layout",
    "test_transforms.py::test_a_bfloat16_network_under_a_float32_state",
    "test_transforms.py::test_a_network_may_close_over_parameters_in_shard_map",
    "test_transforms.py::test_a_network_may_close_over_what_is_differentiated",
    "test_transforms.py::test_integers_and_keys_get_no_gradient",
    "test_transforms.py::test_pmap",
    "test_transforms.py::test_the_same_objects_in_diffeqsolve",
    "test_transforms.py::test_transforms_agree_with_a_loop_over_samples",
    "test_truncated.py::test_last_k_is_autodiff_from_a_constant_carry",
    "test_unet2d.py::test_equals_diffusers",
    "test_unet2d_condition.py::test_equals_diffusers_and_back",
    "test_unet2d_parity.py::test_equals_diffusers",
    "test_values.py::test_discrete_adjoint_is_autodiff",
    "test_values.py::test_gradient_in_the_grid",
    "test_values.py::test_no_adjoint_changes_the_sample",
    "test_values.py::test_rows_of_a_traced_grid_in_float32",
)
"""Tables of which the suite runs an eighth of the rows, drawn by their names; the others are slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    rows = defaultdict(list)
    for item in items:
        rows[f"{item.path.name}::{item.originalname}"].append(item)
    for name in THINNED:
        for item in sorted(rows[name], key=lambda item: zlib.crc32(item.name.encode()))[ceil(len(rows[name]) / 8) :]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_file_end_with_it():
    """Compiled programs are gigabytes by the end of the suite, and files share next to none."""
    yield
    jax.clear_caches()


QUICK = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}


@pytest.fixture(scope="module")
def as_the_program_runs(tmp_path_factory):
    """JAX's own types, whatever the suite sets; and programs compiled quickly, once, since such tests run the same few over and over."""
    settings = {**QUICK, "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
