"""The public face: names, signatures, layers, and what importing the package brings along."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import diffrax
import pytest

import adjoint_jax as aj

PACKAGE = Path(aj.__file__).parent
MODULES = ("grids", "solvers", "adjoints", "networks", "models")
SIGNATURES = {
    "DiffusionTerm": "(network, process, prediction='eps')",
    "sde_terms": "(term, tau, path)",
    "search_schedule": (
        "(term, x_T, args=None, *, steps, grid, reference=None, evaluations=400, descents=3, "
        "splittings=('data', 'noise', 0.5, 1.0), starts=(), seed=0, callback=None)"
    ),
    "sample": "(term, x_T, args=None, *, grid, solver=None, adjoint=None, key=None, noise=None, save=False)",
    "invert": "(term, x_0, args=None, *, grid, solver=None, adjoint=None, key=None, noise=None, save=False)",
    "audit": "(loss, term, x_T, args=None, *, grid, solver=None, adjoints, wrt=('x_T', 'args'), reference='exact', key=None, noise=None)",
    "plan": "(term, x_T, args=None, *, grid, solver=None, budget_bytes, wrt=('x_T', 'args'), key=None, noise=None, tol=None)",
    "load": "(path=None, *, subfolder=None, variant=None, dtype=<class 'jax.numpy.float32'>, revision=None, local_files_only=False)",
    "from_scheduler_config": "(config, *, published=True, eta=0.0, mu=None)",
    "cfg": "(network, scale, rescale=0.0, interval=None)",
    "linen": "(module)",
    "nnx": "(module)",
    "equinox": "(module)",
    "PerStep": "(value)",
    "Trajectory": "(ts, xs)",
    "Splitting": "(sigma_data, tau=0.0)",
    "VPLinear": "(beta_min=0.1, beta_max=20.0)",
    "VPCosine": "(s=0.008)",
    "VPDiscrete": "(alphas_cumprod)",
    "VE": "(sigma_min=0.02, sigma_max=100.0)",
    "EDM": "()",
    "FlowMatching": "()",
    "Paired": "(x, aux=None)",
    "BDIA": "(gamma=1.0, solver=None)",
    "Rex": "(solver=None, zeta=0.999, sigma_data=0.0, tau=0.0)",
    "DDIM": "(eta=0.0)",
    "DEIS": "(order=3, variable='t', lower_order_final=False, published=False)",
    "DPMSolver": "(order=2, solver_type='midpoint', lower_order_final=False, published=False)",
    "DPMSolverPP": "(order=2, solver_type='midpoint', lower_order_final=False, published=False)",
    "SDEDPMSolverPP": "(order=2, tau=1.0, solver_type='midpoint', lower_order_final=False, published=False)",
    "UniPC": "(order=2, variant='bh2', sigma_data=0.0, corrector=True, lower_order_final=True, uncorrected=())",
    "EDMHeun": "(s_churn=0.0, s_min=0.0, s_max=inf, s_noise=1.0)",
    "Exponential": "(order=2, sigma_data=1.0, variable='lam', tau=0.0, lower_order_final=False)",
    "ExponentialRK": "(solver, sigma_data=inf)",
    "Schedule": "(orders, splittings='data', variables='lam', rules='exact', correctors=0, times=None)",
    "DirectAdjoint": "()",
    "DiscreteAdjoint": "(keep=0, remat='none', states='device', levels=2, clip=None, probe=None)",
    "AdjointDEIS": "(order=3, sigma_data=1.0, steps=None, nodes='lam', mode='PECE', published=False, integral_order=None, keep=False)",
    "AdjointDPM": "(solver=None, steps=None, nodes='lam', states='stored')",
    "ReversibleAdjoint": "(segments=1, tol=None)",
    "LastK": "(k)",
}
ADJOINTS = {
    "RandomK": "(key, most=None)",
    "LowVariance": "(key, samples=2)",
    "posterior_gradient": "(loss, term, x, t, args=None)",
    "look_ahead": "(loss, term, x, t, args=None, *, grid, steps, solver=None, adjoint=None)",
    "drift": "(term, x_T, args=None, *, grid, solver, segments=1, key=None, noise=None)",
    "segments_needed": "(term, x_T, args=None, *, grid, solver, tol, key=None, noise=None)",
}
GRIDS = (
    "uniform", "power", "quadratic", "log_snr", "exponential", "lu", "polyexponential", "karras", "edm", "beta", "vp", "angle", "shifted", "ays",
    "linspace", "leading", "trailing",
)  # fmt: skip
NETWORKS = {
    "classifier_guidance": "(network, log_prob, process, prediction='eps', scale=1.0)",
    "clip": "(network, process, prediction, low=-1.0, high=1.0)",
    "threshold": "(network, process, prediction, ratio=0.995, low=1.0, high=inf)",
    "time_sharing": "(network, boundaries, intervals=1)",
    "rounded_times": "(network, rule='nearest', unit=1.0)",
    "edm_precondition": "(network, sigma_data=0.5)",
}


def bare(signature):
    """A signature without its annotations."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert bare(inspect.signature(getattr(aj, name))) == SIGNATURES[name]


@pytest.mark.parametrize(("name", "signature"), [*NETWORKS.items(), *ADJOINTS.items()])
def test_signature_in_modules(name, signature):
    function = getattr(aj.networks if name in NETWORKS else aj.adjoints, name)
    assert bare(inspect.signature(function)) == signature
    assert len(inspect.getdoc(function) or "") > 60


def test_the_public_names_are_the_contract():
    source = (PACKAGE / "__init__.py").read_text()
    exported = {alias.asname for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname}
    public = {name for name in exported if not name.startswith("_")}
    assert public == set(SIGNATURES) | set(MODULES)
    assert len(public) <= 50


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_public_name_is_documented(name):
    assert len(inspect.getdoc(getattr(aj, name)) or "") > 60


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_called_alike(name):
    parameters = inspect.signature(getattr(aj.grids, name)).parameters
    assert list(parameters)[:4] == ["process", "steps", "t_start", "t_end"]
    assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in list(parameters)[2:])
    assert inspect.getdoc(getattr(aj.grids, name))


def test_they_are_diffrax_objects():
    assert aj.DirectAdjoint is diffrax.DirectAdjoint
    for name in ("DDIM", "DEIS", "DPMSolverPP", "Exponential", "ExponentialRK"):
        assert issubclass(getattr(aj, name), diffrax.AbstractSolver)
    for name in ("DiscreteAdjoint", "AdjointDEIS", "AdjointDPM", "ReversibleAdjoint", "LastK"):
        assert issubclass(getattr(aj, name), diffrax.AbstractAdjoint)
    assert issubclass(aj.DiffusionTerm, diffrax.AbstractTerm)


def test_import_is_light():
    code = "import adjoint_jax, sys; print([m for m in ('flax', 'torch', 'matplotlib', 'optax', 'tyro') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


LAYERS = (
    "_types", "_numerics", "_reflect", "_paths", "_work", "_traced", "processes", "grids", "splitting", "networks", "terms", "solvers", "schedulers",
    "adjoints", "sample", "search", "audit", "_measure", "plan",
)  # fmt: skip
APART = ("models", "checkpoints")


def imports(path):
    """Modules of this package that a file imports when it is imported itself, as top-level names of the package."""
    module = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = module[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            for target in [base] if len(base) > 1 else [(*base, alias.name) for alias in node.names]:
                yield target[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in LAYERS:
        assert all(LAYERS.index(name) <= LAYERS.index(own) for name in imports(path) if name in LAYERS)
        assert not [name for name in imports(path) if name not in LAYERS]
    elif own == "models":
        assert set(imports(path)) <= {"models", "classifier", "unet2d"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            assert node.end_lineno - node.lineno + 1 - docstring.count("\n") <= 60, node.name
