"""Writes tests/fixtures/goldens.npz: one golden case a method, so that a clone without the shared data proves every method.

    python tests/goldens/subset.py        # AJ_SHARED or ../shared holds the goldens

A method is a sampler with its order, variant and kind of prediction; the smallest of its cases is taken, if that is a two-dimensional one.
A sampler (whatever its order) of which no two-dimensional case exists is represented by the smallest of the others. Equal arrays are stored
once, all arrays in one; of the larger models the first of two samples is kept (they do not see each other), unless its weights' gradient
is. DPM-Solver-v3 is left out: its model statistics alone fill half a megabyte.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
KEPT = ("xT", "x0", "target", "grad_xT", "grad_theta", "noise", "timesteps", "sigmas", "rev_ts", "ab_coef", "t_steps", "coeff_list")
KEPT += ("lam_eval", "seq", "second", "y0")
BATCHED = ("xT", "x0", "target", "grad_xT", "noise", "second", "y0")
LIMIT = 300 * 1024


def method(name: str, meta: dict[str, Any], fine: bool) -> str:
    """What tells one published sampler from another; `fine` adds its orders and options."""
    config = {**meta, **meta.get("cfg", {})} if isinstance(meta.get("cfg"), dict) else meta
    keys = ("scheduler", "sampler", "method", "algorithm_type", "rk_method", "inverse", "variant")
    if fine:
        keys += ("solver_type", "solver", "deis_mode", "predict_x0", "few", "gamma", "churn", "S_churn", "pred", "tau", "variant")
        keys += ("order", "solver_order", "ab_order", "max_order", "po", "co", "predictor_order", "corrector_order")
    stochastic = any(config.get(key) for key in ("eta", "churn", "S_churn"))
    return "|".join([name.split("/")[0], str(stochastic), *(str(config.get(key)) for key in keys)])


def size(entry: dict[str, Any]) -> int:
    return sum(int(np.prod(shape)) for key, shape in entry["arrays"].items() if key in KEPT)


def chosen(index: dict[str, Any]) -> list[str]:
    """The smallest two-dimensional case of every method, then the smallest of every sampler that has none."""
    names = sorted((name for name in index if "dpm-solver-v3" not in name), key=lambda name: size(index[name]))
    best: dict[str, str] = {}
    for name in names:
        if index[name]["model"] == "gmm2":
            best.setdefault(method(name, index[name]["meta"], fine=True), name)
    seen = {method(name, index[name]["meta"], fine=False) for name in best.values()}
    for name in names:
        key = method(name, index[name]["meta"], fine=False)
        if key not in seen:
            seen.add(key)
            best[key] = name
    return sorted(best.values())


def main() -> None:
    folder = Path(os.environ.get("AJ_SHARED", ROOT.parent / "shared")) / "golden"
    index = json.loads((folder / "index.json").read_text())["cases"]
    archive, parameters = np.load(folder / "golden_main.npz"), np.load(folder / "golden_params.npz")
    arrays: dict[bytes, np.ndarray] = {}
    places: dict[bytes, list[Any]] = {}
    end = 0

    def place(array: np.ndarray) -> list[Any]:
        """[offset, shape] of the array in the one that holds all."""
        nonlocal end
        key = array.tobytes() + str(array.shape).encode()
        if key not in places:
            arrays[key], places[key] = np.asarray(array, np.float64), [end, list(array.shape)]
            end += array.size
        return places[key]

    small: dict[str, Any] = {"cases": {}}
    small["params"] = {key: place(parameters[key]) for key in parameters.files if not key.startswith("inputs/")}
    for name in chosen(index):
        entry = index[name]
        whole = entry["model"] == "gmm2" or (entry["model"] == "net" and "noise" not in entry["arrays"])
        kept = {}
        for key in entry["arrays"]:
            if key in KEPT and not (key == "grad_theta" and not whole) and not (key == "noise" and entry["meta"].get("eta", 1) == 0):
                array = archive[f"{name}/{key}"]
                if not whole and key in BATCHED:
                    array = array[:, :1] if key == "noise" else array[:1]
                kept[key] = place(array)
        small["cases"][name] = {"model": entry["model"], "meta": entry["meta"], "arrays": kept}
    data = np.concatenate([array.ravel() for array in arrays.values()])
    path = ROOT / "tests" / "fixtures" / "goldens.npz"
    np.savez_compressed(path, data=data, index=np.frombuffer(json.dumps(small).encode(), np.uint8))
    print(f"{len(small['cases'])} cases, {path.stat().st_size / 1024:.0f} KiB of {LIMIT / 1024:.0f}")


if __name__ == "__main__":
    main()
