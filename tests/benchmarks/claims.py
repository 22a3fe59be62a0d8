"""What docs/results.md claims: a claim is a function of the measurements, and its docstring is the sentence.

It returns whether the claim holds, and the figures that the sentence shows. The page takes the sentences from
here (``{{ claim("name") }}`` in results.md.j2), so that its text cannot drift from its check.
"""

import inspect

import numpy as np

from tests.benchmarks.results_tables import grouped, percent

CLAIMS = {}


def claim(function):
    """Add a claim to the list."""
    CLAIMS[function.__name__] = function
    return function


def sentence(name, results):
    """What the page says."""
    _, figures = CLAIMS[name](results)
    return " ".join(inspect.getdoc(CLAIMS[name]).split()).format(**figures)


def rows_of(results, name, **values):
    """The rows of a benchmark in which keys have these values; there is at least one."""
    rows = [r for r in results[name]["rows"] if all(r[key] == value for key, value in values.items())]
    if not rows:
        raise KeyError(f"{name} has no row of {values}")
    return rows


def searches(results, *names, **values):
    """Rows of the small networks, by these searches."""
    return [row for row in rows_of(results, "candidates", **values) if row["search"] in names]


def span(values, sign=""):
    """Shares in percent, the least and the most of them."""
    low, high = (f"{100 * value:{sign}.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def gain(row):
    return row["after"] - row["before"]


WITH, WITHOUT = "candidates", "candidates, no labels"


@claim
def no_shift(results):
    """**Without a shift nothing is gained.** The search keeps the network as it is, or finds weights as good
    as that: top-1 changes by {change} points.
    """
    gains = [gain(row) for row in searches(results, WITH, WITHOUT, shift="none")]
    return min(gains) > -0.005 and max(gains) < 0.01, {"change": span(gains, "+")}


@claim
def shared_shift(results):
    """**A shift that all images share** is undone almost completely, with labels or without: contrast x 0.4
    leaves {before} of {clean} top-1, and the patched networks have {after}. Re-estimated statistics (lambda)
    do this. Such a patch ruins images without the shift: `--keep-data` says which images must not suffer.
    """
    clean = {row["network"]: row["before"] for row in searches(results, WITH, shift="none")}
    rows = searches(results, WITH, WITHOUT, shift="contrast x 0.4")
    before, after = ([row[key] for row in rows] for key in ("before", "after"))
    left = max(clean[row["network"]] - row["after"] for row in rows)
    return left < 0.015, {"before": span(before), "clean": span(clean.values()), "after": span(after)}


@claim
def one_alpha_gains_a_part(results):
    """**One alpha for all layers**, the paper's form, gains a part of that: over both networks and four
    shifts {one:.0f} points on average, where the whole search gains {whole:.0f}.
    """
    one, whole = (
        [gain(row) for row in searches(results, name) if row["shift"] != "none"]
        for name in ("one alpha", WITH)
    )
    figures = {"one": 100 * np.mean(one), "whole": 100 * np.mean(whole)}
    return 0.05 < np.mean(one) < np.mean(whole) - 0.05, figures


@claim
def mixture_needs_layers(results):
    """**Shifts that differ from image to image** need a weight per layer, and are undone in part: top-1 rises
    from {before} to {after}; one alpha ends at {one}.
    """
    whole, one = (searches(results, name, shift="mixed") for name in (WITH, "one alpha"))
    holds = all(w["after"] > o["after"] + 0.03 for w, o in zip(whole, one, strict=True))
    columns = {"before": (whole, "before"), "after": (whole, "after"), "one": (one, "after")}
    figures = {name: " and ".join(percent(r[key]) for r in rows) for name, (rows, key) in columns.items()}
    return holds, figures


@claim
def no_labels(results):
    """**Without labels** the search finds {least:.0f}% to {most:.0f}% of what labels gain under the mixture,
    on {count} networks.
    """
    rows = searches(results, WITH, WITHOUT, shift="mixed") + rows_of(results, "further_networks")
    gains = [
        {(row["network"], row.get("seed", 0)): gain(row) for row in rows if row["search"] == name}
        for name in (WITH, WITHOUT)
    ]
    shares = [100 * gains[1][key] / gains[0][key] for key in gains[0]]
    return min(shares) > 50, {"least": min(shares), "most": max(shares), "count": len(shares)}


@claim
def further_networks(results):
    """A further network, and the same two from another seed, gain {gains} points under the mixture."""
    gains = [gain(row) for row in rows_of(results, "further_networks", search=WITH)]
    return min(gains) > 0.05, {"gains": span(gains, "+")}


@claim
def onnx_files(results):
    """**An ONNX file** is tuned as well as a checkpoint: it gains {onnx} points under the mixture and the
    noise, and the checkpoint of the table above, of the same training on another machine, {torch}.
    """
    rows = rows_of(results, "onnx_files")
    pairs = [
        (gain(row), gain(*searches(results, WITH, network=row["network"], shift=row["shift"])))
        for row in rows
    ]
    figures = {
        name: " and ".join(f"{100 * value:+.1f}" for value in values)
        for name, values in zip(("onnx", "torch"), zip(*pairs, strict=True), strict=True)
    }
    return all(onnx > torch - 0.03 for onnx, torch in pairs), figures


@claim
def several_candidates(results):
    """The {count} searches with labels choose {different} different candidates: none is best everywhere,
    which is why there are several.
    """
    chosen = [row["chosen"] for row in searches(results, WITH)]
    return len(set(chosen)) >= 3, {"count": len(chosen), "different": len(set(chosen))}


@claim
def stronger_shifts(results):
    """**The stronger the shift, the larger the gain**: {figures}. In none of the {count} cases does the
    search lose more than half a point.
    """
    rows = [row for row in rows_of(results, "strength", search=WITH) if row["strength"] != 1]
    by_shift = {
        shift.removesuffix(" x"): sorted(of, key=lambda row: -row["before"])
        for (shift,), of in grouped(rows, "shift").items()
    }
    figures = [
        f"under {shift} {100 * gain(of[0]):+.1f} points at the mildest, "
        f"{100 * gain(of[-1]):+.1f} at the strongest"
        for shift, of in by_shift.items()
    ]
    holds = all(gain(of[-1]) > gain(of[0]) for of in by_shift.values()) and min(map(gain, rows)) > -0.005
    return holds, {"figures": "; ".join(figures), "count": len(rows)}


@claim
def standard_corruptions(results):
    """**Under the 15 standard corruptions** in 5 severities the mean error of the small network falls from
    {as_it_is}% to {for_all}% with one patch for all of them, and to {for_kind}% with a patch for each kind.
    The latter gains most under {most}, and least under {least}.
    """
    rows = [row for row in rows_of(results, "corruptions") if row["severity"]]
    means = {key: np.mean([row[key] for row in rows]) for key in ("as_it_is", "for_all", "for_kind")}
    gains = {
        kind: np.mean([row["as_it_is"] - row["for_kind"] for row in of])
        for (kind,), of in grouped(rows, "kind").items()
    }
    order = sorted(gains, key=gains.__getitem__)
    named = [f"{kind.replace('_', ' ')} ({100 * gains[kind]:.1f} points)" for kind in order]
    figures = {key: percent(mean) for key, mean in means.items()}
    holds = means["as_it_is"] - 0.02 > means["for_all"] > means["for_kind"] and min(gains.values()) > -0.02
    return holds, {**figures, "most": ", ".join(named[:-4:-1]), "least": ", ".join(named[:3])}


@claim
def clean_after_all(results):
    """The patch for all of them has its price: on images as they are the error rises from {before}% to
    {after}% (`--keep-data` limits that).
    """
    rows = rows_of(results, "corruptions", severity=0)
    before, after = (np.mean([row[key] for row in rows]) for key in ("as_it_is", "for_all"))
    return before < after < before + 0.1, {"before": percent(before), "after": percent(after)}


@claim
def one_patch_for_all(results):
    """One patch for all kinds raises the error under {worse}, the mildest kinds here, and lowers it under the
    {count} others.
    """
    rows = [row for row in rows_of(results, "corruptions") if row["severity"]]
    means = {
        kind.replace("_", " "): [np.mean([row[key] for row in of]) for key in ("as_it_is", "for_all")]
        for (kind,), of in grouped(rows, "kind").items()
    }
    worse = {kind: after - before for kind, (before, after) in means.items() if after > before}
    named = ", ".join(f"{kind} ({100 * more:+.1f} points)" for kind, more in worse.items())
    mild = all(means[kind][0] < 0.4 for kind in worse)
    return mild and 0 < len(worse) < 6, {"worse": named, "count": len(means) - len(worse)}


@claim
def another_severity(results):
    """A patch for a kind may harm in another severity than it was tuned in: under {kind} in severity
    {severity} the error rises from {before}% to {after}%.
    """
    rows = [row for row in rows_of(results, "corruptions") if row["severity"]]
    worst = max(rows, key=lambda row: row["for_kind"] - row["as_it_is"])
    figures = {"kind": worst["kind"].replace("_", " "), "severity": worst["severity"]}
    figures |= {"before": percent(worst["as_it_is"]), "after": percent(worst["for_kind"])}
    return worst["for_kind"] > worst["as_it_is"] + 0.1, figures


@claim
def weight_without_shift(results):
    """**Without a shift** no alpha gains more than {most:.1f} points, as the paper's Fig. 1 shows for well
    trained networks, and alpha = 1 costs {cost:.1f} points.
    """
    (row,) = rows_of(results, "one_alpha", metric="accuracy", shift="none")
    first, last, most = row["curve"][0], row["curve"][-1], max(row["curve"])
    holds = most - first < 0.01 and first - last > 0.1
    return holds, {"most": 100 * (most - first), "cost": 100 * (first - last)}


@claim
def search_passes(results):
    """**The search for one alpha** takes {passes:.2f} passes over the images at most; the grid takes 51, and
    the loop, which finds the grid's best, 50.
    """
    rows = rows_of(results, "one_alpha")
    passes = max(row["passes"] for row in rows)
    return passes <= 3 and max(row["loop_regret"] for row in rows) < 0.005, {"passes": passes}


@claim
def search_lands(results):
    """It ends where the grid does in {accuracy[lands]:.0f}% of orders by accuracy, and in
    {entropy[lands]:.0f}% by cross-entropy. Two of its passes are the baseline and the winner; the third is
    enough for some weights on a quarter of the images. If all weights of the grid had seen that quarter, the
    best would land in {accuracy[quarter_lands]:.0f}% and {entropy[quarter_lands]:.0f}%, with half of the
    images in {accuracy[half_lands]:.0f}% and {entropy[half_lands]:.0f}%. More images help, and so does
    `--max-passes`.
    """
    figures = {}
    for name, metric in (("accuracy", "accuracy"), ("entropy", "cross-entropy")):
        rows = rows_of(results, "one_alpha", metric=metric)
        figures[name] = {
            key: 100 * np.mean([row[key] / row["orders"] for row in rows])
            for key in ("lands", "quarter_lands", "half_lands")
        }
    return figures["accuracy"]["lands"] > 85 and figures["entropy"]["lands"] > 75, figures


@claim
def augmented(results):
    """**Tuning for augmented shifts** costs nothing on clean images ({clean} points) and gains little
    ({others} points). Images from the field, even without labels, help far more.
    """
    clean, others = [], []
    for row in rows_of(results, "augment"):
        (clean if row["shift"] == "none" else others).append(gain(row))
    return min(clean) > -0.005 and max(others) < 0.15, {
        "clean": span(clean, "+"),
        "others": span(others, "+"),
    }


@claim
def imagenet(results):
    """**An ImageNet network on photographs**: under contrast x 0.25 EfficientNet-Lite0 has {base} top-1 as it
    is, {one} with one alpha, and {layers} with weights per layer. The patch is for images that share the
    shift: it takes photographs without it from {clean} to {clean_after}.
    """
    by_name = {row["candidate"]: row for row in rows_of(results, "photographs", shift="contrast x 0.25")}
    base, one = by_name["baseline"], by_name["alpha"]
    layers = [row["top1"] for name, row in by_name.items() if "per layer" in name or name == "refined"]
    chosen = next(row for row in by_name.values() if row["chosen"])
    figures = {"base": percent(base["top1"]), "one": percent(one["top1"]), "layers": span(layers)}
    figures |= {"clean": percent(base["top1_clean"]), "clean_after": percent(chosen["top1_clean"])}
    return one["top1"] > base["top1"] + 0.01 and min(layers) > one["top1"] + 0.05, figures
