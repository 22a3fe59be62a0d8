"""The tables of docs/results.md, each a function of what was measured."""

import numpy as np

from bnpatch.data.standard_corruptions import STANDARD
from tests.benchmarks.candidates import SEARCHES, TWO
from tests.benchmarks.fashion_mnist import KINDS


def markdown(header, rows):
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share):
    return f"{100 * share:.1f}"


def grouped(rows, *keys):
    """Rows by the values of keys, in the order of their first rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def candidates(results):
    rows = []
    for (network, shift), found in by_shift(results["candidates"]["rows"]).items():
        of = {row["search"]: row for row in found}
        whole = of["candidates"]
        cells = [percent(of[search]["after"]) for search in SEARCHES]
        rows.append(
            [network, shift, percent(whole["before"]), *cells, whole["chosen"], f"{whole['passes']:.0f}"]
        )
    header = ["network", "shift", "as it is", "one alpha", "alpha per layer", "candidates", "no labels"]
    return markdown([*header, "chosen (candidates)", "passes"], rows)


def by_shift(rows, *keys):
    """Rows by network, shift and other keys, in the order of the shifts."""
    groups = grouped(rows, "network", "shift", *keys)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1]), item[0][2:])))


def further_networks(results):
    rows = []
    for (network, seed), found in grouped(results["further_networks"]["rows"], "network", "seed").items():
        of = {row["search"]: row for row in found}
        name = f"{network}, another seed" if seed else network
        rows.append([name, percent(found[0]["before"]), *(percent(of[search]["after"]) for search in TWO)])
    return markdown(["network", "as it is", "candidates", "no labels"], rows)


def onnx_files(results):
    rows = [
        [row["network"], row["shift"], percent(row["before"]), percent(row["after"]), row["chosen"]]
        for row in results["onnx_files"]["rows"]
    ]
    return markdown(["network", "shift", "as it is", "candidates", "chosen"], rows)


def one_alpha(results):
    rows = []
    for row in results["one_alpha"]["rows"]:
        is_rate = row["metric"] == "accuracy"
        sizes = [
            f"{100 * row[key]:.2f}{' points' if is_rate else '%'}"
            for key in ("regret", "worst_regret", "loop_regret")
        ]
        landed = [f"{row[key]} of {row['orders']}" for key in ("lands", "quarter_lands", "half_lands")]
        rows.append(
            [f"{row['network']}, {row['shift']}", row["metric"], f"{row['passes']:.2f}", *sizes, *landed]
        )
    header = ["problem", "metric", "passes", "regret, mean", "worst", "of the loop", "lands"]
    return markdown([*header, "grid on a quarter lands", "on half"], rows)


def augment(results):
    rows = []
    for (network, metric), of in grouped(results["augment"]["rows"], "network", "metric").items():
        if metric == "accuracy":
            rows.append([network, "as it is", *(percent(row["before"]) for row in of)])
        rows.append([network, f"{metric}: {of[0]['chosen']}", *(percent(row["after"]) for row in of)])
    return markdown(["network", "tuned for", *KINDS], rows)


def group_norm(results):
    by_alpha = grouped(results["group_norm"]["rows"], "alpha")
    shifts = [row["shift"] for row in next(iter(by_alpha.values()))]
    cells = {
        alpha: [c for row in of for c in (percent(row["accuracy"]), f"{row['cross_entropy']:.4f}")]
        for (alpha,), of in by_alpha.items()
    }
    header = ["alpha", *(name for shift in shifts for name in (f"{shift}: top-1", "cross-entropy"))]
    return markdown(header, [[f"{alpha:g}", *of] for alpha, of in cells.items()])


def photographs(results):
    rows = [
        [
            row["shift"],
            row["candidate"],
            percent(row["top1"]),
            f"{row['cross_entropy']:.2f}",
            percent(row["top1_clean"]),
            "x" if row["chosen"] else "",
        ]
        for row in results["photographs"]["rows"]
    ]
    header = [
        "shift",
        "candidate",
        "top-1, held out",
        "cross-entropy, held out",
        "clean after (top-1)",
        "chosen",
    ]
    return markdown(header, rows)


def corruptions(results):
    """Mean errors over the severities, by kind."""
    rows = [row for row in results["corruptions"]["rows"] if row["severity"]]
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in STANDARD} | {"mean": rows}
    columns = ("as_it_is", "for_all", "for_kind")
    cells = [
        [kind.replace("_", " "), *(percent(np.mean([row[key] for row in of])) for key in columns)]
        for kind, of in groups.items()
    ]
    return markdown(["kind", "as it is", "one patch for all kinds", "a patch for the kind"], cells)


def paper(direction, first):
    def table(results):
        rows = []
        for row in results["paper_directions"]["rows"]:
            if row["direction"] == direction:
                accuracy, entropy, up, down = (
                    row[key]
                    for key in ("accuracy", "cross_entropy", "accuracy_change", "cross_entropy_change")
                )
                rows.append(
                    [
                        row["setting"],
                        f"{accuracy[0]:.2f} ± {accuracy[1]:.2g}",
                        f"{up[0]:+.2f} ± {up[1]:.2g}",
                        f"{row['alpha_by_accuracy']:.3f}",
                        f"{entropy[0]:.4f} ± {entropy[1]:.2g}",
                        f"{down[0]:+.4f} ± {down[1]:.2g}",
                        f"{row['alpha_by_cross_entropy']:.3f}",
                    ]
                )
        return markdown(
            [first, "accuracy", "with alpha", "alpha", "cross-entropy", "with alpha", "alpha"], rows
        )

    return table


ghost = paper("ghost", "pooled examples, batch 64")
classes = paper("classes", "batches of 64 in 4 random classes")
small = paper("small", "batches of 2")
decay = paper("decay", "decay, batch 64")
