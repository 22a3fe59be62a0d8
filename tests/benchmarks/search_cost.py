"""What the global search costs and where it lands, against a grid of 101 weights and a plain Optuna loop of
50 trials.

Handwritten digits (scikit-learn) and, where there are checkpoints, Fashion-MNIST:
``python -m tests.benchmarks.search_cost [--checkpoints DIR] [--examples 2000]``. DIR holds bare state dicts
named after their architecture (``test_resnet.pt``), of ten classes and one channel at 32 pixels.

Each search scores the model for real through bnpatch.evaluation.evaluate; regret is judged on the
examples that all three saw, against the grid's best. Which blocks a global search sees first is luck: global
searches in other orders of the examples, on the grid's scores, say how much. Seconds are those of the
processor, so that other programs do not count: with OMP_NUM_THREADS=1 they are what the wall clock of an idle
machine shows.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import optuna

import bnpatch
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, paired_difference
from bnpatch.search.candidates import FIRST_ALPHAS
from bnpatch.search.global_search import global_search
from bnpatch.search.score_cache import block_sizes
from bnpatch.search.studies import open_study
from bnpatch.search.trials import GlobalSearchConfig
from bnpatch_cli import demo
from tests.benchmarks.fashion_mnist import SHIFTS, read

METRICS = (CROSS_ENTROPY, ACCURACY)
ORDERS = 20
PREPROCESSING = {"img_size": 32, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}


class Scorer:
    """Scores a model with a weight, and counts examples and seconds."""

    def __init__(self, model, images, labels):
        self.model = model
        self.examples = bnpatch.open_examples((images, labels), model)
        self.order = np.random.default_rng(0).permutation(len(labels))
        self.sizes = block_sizes(len(labels))
        self.blocks = np.split(self.order, np.cumsum(self.sizes)[:-1])
        self.scored = 0
        list(self.examples.batches(256))  # decoded once, before any clock runs

    def __call__(self, root, indices):
        self.scored += len(indices)
        self.model.set_alphas(root**2)
        return evaluate(self.model, self.examples, METRICS, indices=indices, batch_size=128).values

    def blocks_of(self, params, blocks):
        """Scores by block, of several at a time."""
        parts = [self.blocks[block] for block in blocks]
        scores = self(params["alpha"] ** 0.5, np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        split = {name: np.split(values, ends) for name, values in scores.items()}
        return [{name: values[index] for name, values in split.items()} for index in range(len(parts))]

    def timed(self, search):
        """What a search returns, its passes and its seconds."""
        self.scored, started = 0, time.process_time()
        found = search()
        return found, self.scored / len(self.order), time.process_time() - started


def grid(scorer):
    return [scorer(root, scorer.order) for root in np.linspace(0, 1, 101)]


def plain(scorer, metric):
    study = optuna.create_study(
        direction="maximize" if metric.higher_is_better else "minimize",
        sampler=optuna.samplers.TPESampler(seed=0),
    )

    def objective(trial):
        return scorer(trial.suggest_float("sqrt_alpha", 0, 1), scorer.order)[metric.name].mean()

    study.optimize(objective, n_trials=50)
    return study.best_params["sqrt_alpha"]


def found_globally(blocks_of, sizes, metric):
    result = global_search(
        open_study(direction="maximize" if metric.higher_is_better else "minimize"),
        blocks_of,
        GlobalSearchConfig(
            sizes,
            metric,
            {"alpha": (0.0, 1.0)},
            {"alpha": 0.0},
            [{"alpha": alpha} for alpha in FIRST_ALPHAS],
            by_root=("alpha",),
        ),
    )
    return result.best.params["alpha"] ** 0.5


def in_another_order(curve, sizes, metric, seed):
    """Scores of what a global search finds, on the grid's scores with the examples in another order."""
    order = np.random.default_rng(seed).permutation(sum(sizes))
    ends = np.cumsum(sizes)[:-1]

    def at(root):
        return {name: values[order] for name, values in curve[round(root * (len(curve) - 1))].items()}

    def blocks_of(params, blocks):
        split = {name: np.split(values, ends) for name, values in at(params["alpha"] ** 0.5).items()}
        return [{name: values[block] for name, values in split.items()} for block in blocks]

    return at(found_globally(blocks_of, sizes, metric))[metric.name], order


class Regret:
    """How far what was found is from the best of a grid, on the same examples."""

    def __init__(self, metric, found, best):
        self.change = paired_difference(found, best)  # what is lost
        self.is_rate, self.of = metric.is_rate, best.mean()
        self.in_interval = self.change.low <= 0 <= self.change.high or np.array_equal(found, best)

    @property
    def lands(self):
        return self.in_interval if self.is_rate else -self.change.value / self.of <= 0.005

    def __str__(self):
        size = (
            f"{100 * self.change.value:.2f} points"
            if self.is_rate
            else f"{-self.change.value / self.of:+.2%}"
        )
        return f"{size}, {'within' if self.in_interval else 'outside'}"


def of_a_part(curve, metric, share):
    """In how many orders the whole grid would land if it saw a part of the examples: the limit of any search.

    With the baseline's scores on all of them as a control variate, as in the global search.
    """
    scores, landed = np.stack([values[metric.name] for values in curve]), 0
    changes = metric.sign * (scores - scores[0])
    for seed in range(ORDERS):
        part = np.random.default_rng(seed).permutation(scores.shape[1])[: int(share * scores.shape[1])]
        baseline = scores[0] - scores[0].mean()
        centred = baseline[part] - baseline[part].mean()
        slopes = changes[:, part] @ centred / (centred @ centred or 1.0)
        found = np.argmax(changes[:, part].mean(1) - slopes * baseline[part].mean())
        best = max(scores, key=lambda values: metric.sign * values.mean())
        landed += Regret(metric, scores[found], best).lands
    return landed


def compare(name, scorer):
    """Rows of the table: the global search and the loop, by metric, against the grid."""
    curve, _, grid_seconds = scorer.timed(partial(grid, scorer))
    for metric in METRICS:
        sign = -1 if metric.higher_is_better else 1
        best = min((scores[metric.name] for scores in curve), key=lambda values: sign * values.mean())
        # First, so that what is imported late doesn't count as the time of a search.
        found = (in_another_order(curve, scorer.sizes, metric, seed) for seed in range(ORDERS))
        landed = sum(Regret(metric, values, best[order]).lands for values, order in found)
        loop_root, _, loop_seconds = scorer.timed(partial(plain, scorer, metric))
        root, passes, seconds = scorer.timed(partial(found_globally, scorer.blocks_of, scorer.sizes, metric))
        regrets = [Regret(metric, scorer(r, scorer.order)[metric.name], best) for r in (root, loop_root)]
        row = [
            name,
            metric.name,
            f"{passes:.2f}",
            f"{grid_seconds / seconds:.0f}x",
            f"{loop_seconds / seconds:.0f}x",
            *map(str, regrets),
            f"{landed} of {ORDERS}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)
        quarter, half = (of_a_part(curve, metric, share) for share in (1 / 4, 1 / 2))
        print(f"<!-- a grid on a quarter lands in {quarter} of {ORDERS}, on half in {half} -->", flush=True)


def problems(checkpoints, fashion, examples, shifts):
    """Names, models and data."""
    if "contrast x 0.6" in shifts:
        yield from digits(examples)
    images, labels = (values[:examples] for values in read(fashion, "t10k")) if checkpoints else ([], [])
    for path in sorted(checkpoints.glob("*.pt")) if checkpoints else ():
        model = bnpatch.load(path, preprocessing=PREPROCESSING)
        for shift in ("none", "contrast x 0.4", "brightness x 0.35"):
            if shift in shifts:
                shifted = SHIFTS[shift](images.astype(float)).round().astype(np.uint8)
                yield f"{path.stem}, {shift}", Scorer(model, shifted, labels)


def digits(examples):
    images, labels = demo.digits()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        demo.train_classifier(images[:898], labels[:898], 12, 0, path)
        model = bnpatch.load(path)
    for shift, apply in (("none", SHIFTS["none"]), ("contrast x 0.6", lambda x: 127.5 + 0.6 * (x - 127.5))):
        shifted = apply(images[898:].astype(float)).round().astype(np.uint8)
        yield f"digits, {shift}", Scorer(model, shifted[:examples], labels[898:][:examples])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--examples", type=int, default=2000)
    kinds = ["none", "contrast x 0.4", "brightness x 0.35", "contrast x 0.6"]
    parser.add_argument("--shifts", nargs="+", default=kinds, help="of Fashion-MNIST; the last: of digits")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(
        "| problem | metric | passes | grid / global search, time | loop / global search, time | regret "
        "| regret of the loop | "
        "lands, in other orders |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, scorer in problems(args.checkpoints, args.data, args.examples, args.shifts):
        compare(name, scorer)


if __name__ == "__main__":
    main()
