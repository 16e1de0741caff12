"""One picture of a sweep over lengths: time per entry, forward and backward."""

from pathlib import Path


def write(rows: list[dict], title: str, path: Path) -> None:
    """Panels by case: seconds of forward+backward against L, a line per form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["kind"] == "forward+backward"]
    cases = list(dict.fromkeys((row["op"], row["case"]) for row in rows))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, (op, name) in zip(axes.flat, cases, strict=False):
        panel = [row for row in rows if (row["op"], row["case"]) == (op, name)]
        for form in dict.fromkeys(row["form"] for row in panel):
            points = [r for r in panel if r["form"] == form and "median_s" in r]
            axis.plot(
                [row["size"]["L"] for row in points],
                [1e3 * row["median_s"] for row in points],
                marker="o",
                markersize=3,
                linewidth=2 if points and points[0]["subject"] else 1,
                label=form,
            )
        subject = [row for row in panel if row["subject"]]
        axis.plot(
            [row["size"]["L"] for row in subject],
            [1e3 * row["floor_s"] for row in subject],
            linestyle=":",
            color="black",
            label="floor",
        )
        axis.set(xscale="log", yscale="log", xlabel="L", ylabel="ms")
        axis.set_title(f"{op}: {name}", fontsize=10)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
