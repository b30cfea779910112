"""`gradients.md` and `gradients.png` from the entries of `gradients`."""

from pathlib import Path
from typing import Any

TITLES = {"mixture": "Gaussian mixture, d = 16", "digits": "The embedded digits", "flow": "Flow ViT", "unet64": "64x64 UNet"}
COLOURS = {
    "AdjointDEIS-2M, published": "tab:red",
    "AdjointDEIS, c = 1": "tab:orange",
    "AdjointDEIS, c = 1, kept": "tab:olive",
    "AdjointDPM (Heun)": "tab:brown",
    "last M steps (DRaFT-K)": "tab:gray",
    "interpolated": "tab:cyan",
    "fitted": "tab:blue",
    "fitted, kept": "tab:green",
}


def cost(entry: Any, steps: int, ratio: float) -> float:
    """In units of C = 2N F + N B."""
    forward, backward = entry["F B"]
    return (forward + ratio * backward) / (steps * (2 + ratio))


def write(networks: dict[str, Any], out: Path) -> None:
    """What each method reaches at 0.6 C and 0.5 C, a table for each network, kind and N in the order of cost, and all curves in one picture."""
    parts = [_summary(networks, kind, limit) for kind in ("ode", "sde") for limit in (0.6, 0.5)]
    for network, found in networks.items():
        for kind in ("ode", "sde"):
            for steps, rows in sorted(found.get(kind, {}).items(), key=lambda pair: int(pair[0])):
                head = ["method", "M", "cost / C", "F", "B", "x_T: median", "worst", "cosine", "cond: median", "worst", "cosine", "MiB", "ms"]
                lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
                for label, entry in sorted(rows.items(), key=lambda row: cost(row[1], int(steps), found["ratio"])):
                    lines.append(_line(label, entry, int(steps), found["ratio"]))
                parts.append(f"## {TITLES[network]}, {kind.upper()}, N = {steps} (B/F = {found['ratio']:.2f})\n\n" + "\n".join(lines) + "\n")
        if found.get("peers"):
            parts.append(_peers(TITLES[network], found["peers"]))
    (out / "gradients.md").write_text("\n".join(parts))
    _plot(networks, out / "gradients.png")


def _summary(networks: dict[str, Any], kind: str, limit: float) -> str:
    """Of each method the entry of least median error in x_T whose cost is within the limit."""
    columns = [(network, steps) for network, found in networks.items() for steps in sorted(found.get(kind, {}), key=int)]
    head = ["method", *(f"{network}, N = {steps}" for network, steps in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in COLOURS:
        cells = []
        for network, steps in columns:
            rows, ratio = networks[network][kind][steps], networks[network]["ratio"]
            found = [(label, entry) for label, entry in rows.items() if label.split(" | ")[0] == method]
            found = [(label, entry) for label, entry in found if cost(entry, int(steps), ratio) <= limit and entry["x_T"][0] == entry["x_T"][0]]
            cells.append(_cell(*min(found, key=lambda pair: pair[1]["x_T"][0])) if found else "")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return f"## {kind.upper()}, at most {limit} C: median / worst in x_T, then in the condition (M)\n\n" + "\n".join(lines) + "\n"


def _cell(label: str, entry: Any) -> str:
    pairs = [f"{entry[name][0]:.1e} / {entry[name][1]:.1e}" for name in ("x_T", "cond") if name in entry]
    return "; ".join(pairs) + f" ({label.split(' | ')[1]})"


def _line(label: str, entry: Any, steps: int, ratio: float) -> str:
    name, m = label.split(" | ")
    numbers = [f"{value:.1e}" if i < 2 else f"{value:.4f}" for kind in ("x_T", "cond") for i, value in enumerate(entry.get(kind, []))]
    numbers += [""] * (6 - len(numbers))
    cells = [name, m, f"{cost(entry, steps, ratio):.2f}", *map(str, entry["F B"]), *numbers, f"{entry['bytes'] / 2**20:.3g}"]
    return "| " + " | ".join([*cells, f"{1e3 * entry['seconds']:.3g}"]) + " |"


def _peers(title: str, peers: dict[str, Any]) -> str:
    lines = ["| peer | N | x_T: median | worst | cosine | MiB | ms |", "|---|---|---|---|---|---|---|"]
    for label, entry in peers.items():
        name, steps = label.split(" | ")
        memory = f"{entry['bytes'] / 2**20:.3g}" if "bytes" in entry else ""
        lines.append(
            f"| {name} | {steps} | {entry['x_T'][0]:.1e} | {entry['x_T'][1]:.1e} | {entry['x_T'][2]:.4f} | {memory} | {1e3 * entry['seconds']:.3g} |"
        )
    return f"## {title}: other packages, each against the exact gradient of its own solve\n\n" + "\n".join(lines) + "\n"


def _plot(networks: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        (network, kind, steps) for network, found in networks.items() for kind in ("ode", "sde") for steps in sorted(found.get(kind, {}), key=int)
    ]
    lines, columns = sorted({panel[:2] for panel in panels}, key=[panel[:2] for panel in panels].index), sorted({int(panel[2]) for panel in panels})
    figure, axes = plt.subplots(len(lines), len(columns), figsize=(4.2 * len(columns), 3.2 * len(lines)), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for network, kind, steps in panels:
        ax = axes[lines.index((network, kind))][columns.index(int(steps))]
        ax.set_visible(True)
        rows, ratio = networks[network][kind][steps], networks[network]["ratio"]
        for name, colour in COLOURS.items():
            points = sorted((cost(e, int(steps), ratio), e["x_T"][0]) for label, e in rows.items() if label.split(" | ")[0] == name)
            points = [(c, max(e, 1e-7)) for c, e in points if e == e]
            if points:
                ax.plot(*zip(*points, strict=True), ".-", color=colour, label=name, lw=1)
        for share, label in ((1.0, "exact"), ((1 + ratio) / (2 + ratio), "exact, kept")):
            ax.axvline(share, color="black", ls=":", lw=0.8, label=label if share == 1 else None)
        ax.axhline(5e-3 if kind == "ode" else 1e-1, color="black", lw=0.4)
        ax.set(yscale="log", ylim=(1e-7, 1e2), xlim=(0.3, 1.3), title=f"{TITLES[network]}, {kind.upper()}, N = {steps}")
        ax.title.set_fontsize(9)
    for ax in axes[-1]:
        ax.set_xlabel("cost / C")
    for row in axes:
        row[0].set_ylabel("median error of dL/dx_T")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
