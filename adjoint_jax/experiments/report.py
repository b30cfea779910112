"""`report.md`: what was run, what came of it, how good its gradients were, and what it cost."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table. A stroke in a cell stays in it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def section(heading: str, *parts: str) -> str:
    """A heading and paragraphs, tables or pictures."""
    return "\n\n".join([f"## {heading}", *(part.rstrip("\n") for part in parts)]) + "\n"


def picture(file: str, words: str) -> str:
    return f"![{words}]({file})"


def document(title: str, lead: str, *sections: str) -> bytes:
    """The whole report."""
    return "\n".join([f"# {title}\n\n{lead}\n", *sections]).encode()


def audited(rows: Sequence[tuple[str, Any]], exact: str = "`DiscreteAdjoint`") -> str:
    """The section of the audit: `(point, AuditRow)` pairs, and what gave the exact gradient."""
    cells = [(point, r.adjoint, r.wrt, f"{r.relative_error:.2e}", f"{r.cosine:.4f}", f"{r.norm_ratio:.3g}") for point, r in rows]
    return section(
        "The gradient against the exact one",
        f"The exact gradient is that of the sampler as it ran, by {exact}. Where one gradient was used, it is the first row of each point.",
        table(("iterate", "adjoint", "input", "relative error", "cosine", "norm ratio"), cells),
    )


def cost(seconds: Sequence[float], counts: tuple[int, int] | None = None, more: Mapping[str, str] | None = None) -> str:
    """The section of the cost: seconds of each iterate, (forward, backward) evaluations of the network in one, and what else there is to say."""
    rows = {"wall time of the iterates, compilation in the first": f"{sum(seconds):.1f} s, {np.median(seconds):.2f} s for the median one"}
    if counts:
        forward, backward = counts
        rows |= {
            "network evaluations an iterate, for the whole batch": f"{forward} forward, {backward} backward",
            "network evaluations in all": f"{forward * len(seconds)} forward, {backward * len(seconds)} backward",
        }
    return section("Cost", table(("what", "how much"), list({**rows, **(more or {}), "peak memory of the process": _peak_memory()}.items())))


def options(config: Mapping[str, Any]) -> str:
    """The section of the options."""
    return section("What was run", table(("option", "value"), [(key, "default" if value is None else f"`{value}`") for key, value in config.items()]))


def _peak_memory() -> str:
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"
    return "not known here"
