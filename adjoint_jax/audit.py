"""How good a gradient is, and what it costs: any adjoints against the exact gradient of the sampler that ran."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._types import Args, ArrayLike, State
from ._work import flops
from .adjoints import adjoint_norms
from .sample import sample
from .terms import DiffusionTerm

DIRECTIONS = 8
"""In which directional derivatives are taken, for each input."""
REPEATS = 3


class AuditRow(NamedTuple):
    """One adjoint and one input: |g - g_exact| / |g_exact|, the cosine between the two, and |g| / |g_exact|; and, for all inputs together,
    flops of the products, bytes of temporaries, the least time of three; for x_T, (|dL/dx_T| / |dL/dx_0|)^(1/N), the growth per step."""

    adjoint: str
    wrt: str
    relative_error: float
    cosine: float
    norm_ratio: float
    flops: float = np.nan
    bytes: float = np.nan
    seconds: float = np.nan
    growth: float = np.nan


HEAD = ("adjoint", "input", "relative error", "cosine", "norm ratio", "GFLOP", "MiB", "ms", "growth per step")


class Audit(tuple[AuditRow, ...]):
    """Rows of an audit; prints as a Markdown table, with the warnings of the adjoints below it.

    `norms` are |dL/dx_i|, i = 0 .. N, of the exact gradient (None where the reference is differences); `notes` the warnings, by adjoint.
    """

    norms: Any = None
    notes: Mapping[str, str] = {}

    def __str__(self) -> str:
        lines = [HEAD, ["---"] * len(HEAD)]
        for r in self:
            cost = (f"{r.flops / 1e9:.3g}", f"{r.bytes / 2**20:.3g}", f"{1e3 * r.seconds:.3g}", f"{r.growth:.3f}")
            lines.append((r.adjoint, r.wrt, f"{r.relative_error:.2e}", f"{r.cosine:.4f}", f"{r.norm_ratio:.3g}", *cost))
        below = [f"{name}: {note}" for name, note in self.notes.items()]
        if self.norms is not None:
            rates = np.asarray(self.norms[:-1]) / np.asarray(self.norms[1:])
            worst = int(np.argmax(rates))
            below.append(f"Exact gradient: |dL/dx_i| grows by {rates[worst]:.3g} at most in one step (step {worst}), by {np.prod(rates):.3g} in all.")
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "".join("\n\n" + line for line in below)

    def plot(self, path: Any) -> None:
        """Writes a picture: relative error against flops, a point for each adjoint and input, and the exact adjoint's norm by step."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        errors, growth = figure.subplots(1, 2)
        for wrt in dict.fromkeys(r.wrt for r in self):
            rows = [r for r in self if r.wrt == wrt]
            errors.plot([r.flops / 1e9 for r in rows], [max(r.relative_error, 1e-16) for r in rows], "o", label=wrt)
        for r in self:
            errors.annotate(r.adjoint, (r.flops / 1e9, max(r.relative_error, 1e-16)), fontsize=7)
        errors.set(xlabel="GFLOP", ylabel="relative error", yscale="log")
        errors.legend(fontsize=7)
        if self.norms is not None:
            growth.plot(np.arange(len(self.norms)), self.norms, ".-")
        growth.set(xlabel="step i", ylabel="|dL/dx_i|", yscale="log", title="exact gradient")
        figure.savefig(path)


def audit(
    loss: Callable[[State], Any],
    term: DiffusionTerm,
    x_T: State,
    args: Args = None,
    *,
    grid: ArrayLike,
    solver: diffrax.AbstractSolver | None = None,
    adjoints: Mapping[str, diffrax.AbstractAdjoint],
    wrt: Sequence[str] = ("x_T", "args"),
    reference: str = "exact",
    key: Any = None,
    noise: Any = None,
) -> Audit:
    """Compares the gradient of loss(sample) by each adjoint with the exact one (`DiscreteAdjoint`), and measures what it costs.

    Args:
        loss: maps the sample, `[*x]`, to a scalar.
        term, x_T, args, grid, solver, key, noise: as in `sample`.
        adjoints: named adjoints. A published one whose steps are too long warns, and the warning stands below the table.
        wrt: "x_T", "args" (every float leaf), or one entry of a dict of args, such as "args['cond']".
        reference: "exact", or "differences" where the exact gradient does not fit into memory: 8 directional derivatives an input by central
            differences of order 4, four samples each. Errors, cosines and norms are then those of the derivatives in these directions,
            good to about 30 %, and to no better than 1e-3 in float32.

    Returns:
        One row for each adjoint and input. Flops are counted in the trace, bytes are the compiled program's temporaries, times this machine's.

    Raises:
        ValueError: where `wrt` names no float input, or for another reference.

        print(aj.audit(loss, term, x_T, args, grid=ts, adjoints={"M = 12": aj.AdjointDEIS(steps=12)}))
    """
    chosen = chosen_inputs(x_T, args, wrt)
    if reference not in ("exact", "differences"):
        raise ValueError(f'reference={reference!r} is not known: use "exact" or "differences".')
    arrays, rest = eqx.partition((term, x_T, args, key, noise), eqx.is_array)

    def value(chosen: Any, arrays: Any, adjoint: Any = None, after: Callable = loss) -> Any:
        term, x_T, args, key, noise = eqx.combine(arrays, rest)
        x_T, args = chosen.get("x_T", x_T), filled_args(chosen, args)
        return after(sample(term, x_T, args, grid=grid, solver=solver, adjoint=adjoint, key=key, noise=noise))

    steps = int(np.shape(grid)[0]) - 1
    norms = None
    if reference == "exact":
        norms = np.asarray(jax.jit(lambda c, a: adjoint_norms(lambda adjoint: value(c, a, adjoint), steps))(chosen, arrays), np.float64)
        exact, project = jax.jit(jax.grad(value))(chosen, arrays), lambda _, leaf: leaf
        start = norms[-1]
    else:
        directions, exact = _differences(jax.jit(value), chosen, arrays)
        project = lambda name, leaf: np.array([np.vdot(v, np.asarray(leaf, np.float64)) for v in directions[name]])  # noqa: E731
        start = np.linalg.norm(np.asarray(jax.grad(loss)(jax.jit(lambda c, a: value(c, a, None, lambda x: x))(chosen, arrays)), np.float64))
    rows, notes = [], {}
    for name, adjoint in adjoints.items():
        found, cost, note = _measured(jax.grad(lambda c, a, adjoint=adjoint: value(c, a, adjoint)), chosen, arrays)
        notes |= {name: note} if note else {}
        for leaf in chosen:
            growth = (np.linalg.norm(np.asarray(found[leaf], np.float64)) / start) ** (1 / steps) if leaf == "x_T" else np.nan
            error, cosine, ratio = compare(project(leaf, found[leaf]), exact[leaf])
            rows.append(AuditRow(name, leaf, error, cosine, ratio, *cost, growth=float(growth)))
    result = Audit(rows)
    result.norms, result.notes = norms, notes
    return result


def _measured(gradient: Callable, *args: Any) -> tuple[Any, tuple, str]:
    """The gradient, its (flops, bytes, seconds), and the warnings of its trace, which are given on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = jax.jit(gradient).lower(*args).compile()
        work = flops(gradient, *args)
    notes = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    for note in notes:
        warnings.warn(note, stacklevel=3)
    times, found = [], None
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found = jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - begin)
    analysis = program.memory_analysis()
    return found, (work, np.nan if analysis is None else analysis.temp_size_in_bytes, min(times)), " ".join(notes)


def _differences(value: Callable, chosen: Any, arrays: Any) -> tuple[dict, dict]:
    """For each input random directions v and the derivatives in them, (8 (L(h) - L(-h)) - (L(2h) - L(-2h))) / 12h."""
    generator, directions, derivatives = np.random.default_rng(0), {}, {}
    for name, leaf in chosen.items():
        leaf = jnp.asarray(leaf)
        size = float(jnp.sqrt(jnp.mean(leaf.astype(jnp.float32) ** 2))) or 1.0
        h = float(jnp.finfo(leaf.dtype).eps) ** 0.2 / 4 * size
        directions[name] = generator.normal(size=(DIRECTIONS, *leaf.shape))
        moved = lambda v, s, name=name, leaf=leaf: float(value({**chosen, name: leaf + jnp.asarray(s * v, leaf.dtype)}, arrays))  # noqa: E731
        central = lambda v, s, moved=moved: moved(v, s) - moved(v, -s)  # noqa: E731
        derivatives[name] = np.array([(8 * central(v, h) - central(v, 2 * h)) / (12 * h) for v in directions[name]])
    return directions, derivatives


def compare(found: Any, exact: Any) -> tuple[float, float, float]:
    """(relative error, cosine, ratio of norms) of two arrays, or trees of them, in float64. NaN where the exact one is zero."""
    g, e = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(value)]) for value in (found, exact))
    size, length = np.linalg.norm(e), np.linalg.norm(g)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.linalg.norm(g - e) / size), float(g @ e / (size * length)), float(length / size)


def chosen_inputs(x_T: State | jax.ShapeDtypeStruct, args: Args, wrt: Sequence[str]) -> dict[str, Any]:
    """The float inputs that `wrt` names."""
    named = {"x_T": x_T, **_float_leaves(args)}
    chosen = {name: leaf for name, leaf in named.items() if any(name == w or name.startswith(w + "[") for w in wrt)}
    if not chosen:
        raise ValueError(f"wrt={tuple(wrt)!r} names no float input; there are {', '.join(named)}.")
    return chosen


def filled_args(chosen: dict[str, Any], args: Args) -> Args:
    """`args` with the chosen leaves in their places."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: chosen.get(_name(path), leaf), args)


def _name(path: Any) -> str:
    return "args" + jax.tree_util.keystr(path)


def _float_leaves(args: Args) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(args)
    numbers = {_name(path): leaf for path, leaf in leaves if eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)}
    return {name: leaf for name, leaf in numbers.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}
