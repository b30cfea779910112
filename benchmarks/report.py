"""`samplers.md` and `samplers.png` from the entries of `samplers`."""

from pathlib import Path
from typing import Any

TITLES = {
    "digits": "The embedded digits (v)",
    "flow": "Flow ViT (x0)",
    "unet64": "64x64 UNet (eps)",
    "unet64, finals": "64x64 UNet, other images, a float32 reference",
}


def write(entries: dict[str, Any], out: Path) -> None:
    """A table a network, all rows sorted by their error at 10 evaluations, and one plot."""
    parts = []
    for network, by_count in entries.items():
        counts = sorted(by_count, key=int)
        rows = {row for count in counts for row, value in by_count[count].items() if value}
        middle = "10" if "10" in counts else counts[-1]
        ranked = sorted(rows, key=lambda row: ((by_count[middle].get(row) or (9e9,))[0], row))
        lines = [f"| sampler | c | {' | '.join(counts)} |", f"|---|---|{'---|' * len(counts)}"]
        for row in ranked:
            sampler, splitting = row.split(" | ")
            lines.append(f"| {sampler} | {splitting} | {' | '.join(_entry(by_count[count].get(row)) for count in counts)} |")
        parts.append(f"## {TITLES[network]}\n\n" + "\n".join(lines) + "\n")
    (out / "samplers.md").write_text("\n".join(parts))
    _plot(entries, out / "samplers.png")


def _entry(value: Any) -> str:
    return f"{value[0]:.2e} {'' if value[1] == 'own' else value[1]}".strip() if value else ""


def _plot(entries: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(entries), figsize=(5 * len(entries), 4.5), squeeze=False)
    for ax, (network, by_count) in zip(axes[0], entries.items(), strict=True):
        counts = sorted(by_count, key=int)
        for kind, colour, label in (("ours", "tab:blue", "ours, fixed"), ("peer", "tab:red", "diffusers"), ("searched", "black", "S^3, fresh noise")):
            rows = {row for count in counts for row in by_count[count] if _kind(row) == kind}
            lines = {row: [(int(n), by_count[n][row][0]) for n in counts if by_count[n].get(row)] for row in rows}
            for points in lines.values():
                ax.plot(*zip(*points, strict=True), color=colour, alpha=0.15 if kind != "searched" else 1, lw=0.8) if points else None
            best = [(int(n), min((by_count[n][row][0] for row in rows if by_count[n].get(row)), default=None)) for n in counts]
            best = [point for point in best if point[1] is not None]
            if best:
                ax.plot(*zip(*best, strict=True), color=colour, lw=2, marker="o", label=f"best of {label}" if kind != "searched" else label)
        ax.set(xscale="log", yscale="log", xlabel="network evaluations", title=TITLES[network], xticks=[int(n) for n in counts], xticklabels=counts)
        ax.set_ylim(top=2)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("relative error of x_0")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _kind(row: str) -> str:
    return row.split(" | ")[1] if row.split(" | ")[1] in ("peer", "searched") else "ours"
