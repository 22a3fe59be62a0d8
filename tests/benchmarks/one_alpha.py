"""One alpha: accuracy and cross-entropy against it, and where the global search lands on that curve.

A grid of 51 weights scores every image, once. The global search, in many orders of the examples, and a plain
Optuna loop of 50 trials then run on the grid's scores, with their proposals rounded to the grid. Regret is
judged on all images, against the grid's best.
"""

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
from tests.benchmarks.fashion_mnist import KINDS, NETWORKS, load

METRICS = (CROSS_ENTROPY, ACCURACY)
ORDERS, ROOTS = 20, np.linspace(0, 1, 51)


def parts():
    for shift in KINDS:
        yield {"network": NETWORKS[0], "shift": shift}


def measure(setup, network, shift):
    """One row per metric."""
    model, (tuning, _) = load(setup.network(network)), setup.parts(*setup.images(shift))
    examples, curve = bnpatch.open_examples(tuning, model), []
    for root in ROOTS:
        model.set_alphas(root**2)
        curve.append(evaluate(model, examples, METRICS, batch_size=250).values)
    return [landed(curve, metric) for metric in METRICS]


def landed(curve, metric):
    """Where searches end, in many orders of the examples."""
    means = np.array([values[metric.name].mean() for values in curve])
    best = curve[int(np.argmax(metric.sign * means))][metric.name]
    found = [in_another_order(curve, metric, seed) for seed in range(ORDERS)]
    regrets = [Regret(metric, curve[index][metric.name], best) for index, _ in found]
    loop = Regret(metric, curve[plain(means, metric)][metric.name], best)
    return {
        "metric": metric.name,
        "curve": [round(float(mean), 5) for mean in means],
        "passes": max(passes for _, passes in found),
        "regret": float(np.mean([regret.value for regret in regrets])),
        "worst_regret": max(regret.value for regret in regrets),
        "loop_regret": loop.value,
        "lands": sum(regret.lands for regret in regrets),
        "quarter_lands": of_a_part(curve, metric, 1 / 4),
        "half_lands": of_a_part(curve, metric, 1 / 2),
        "orders": ORDERS,
    }


def in_another_order(curve, metric, seed):
    """The grid's weight that a global search ends at, and its passes, with the examples in another order."""
    count = len(curve[0][metric.name])
    sizes, order, scored = block_sizes(count), np.random.default_rng(seed).permutation(count), []
    blocks_of_examples = np.split(order, np.cumsum(sizes)[:-1])

    def nearest(params):
        return round(params["alpha"] ** 0.5 * (len(curve) - 1))

    def blocks_of(params, blocks):
        scored.extend(sizes[block] for block in blocks)
        values = curve[nearest(params)]
        return [
            {name: scores[blocks_of_examples[block]] for name, scores in values.items()} for block in blocks
        ]

    config = GlobalSearchConfig(
        sizes,
        metric,
        {"alpha": (0.0, 1.0)},
        {"alpha": 0.0},
        [{"alpha": alpha} for alpha in FIRST_ALPHAS],
        by_root=("alpha",),
    )
    study = open_study(direction="maximize" if metric.higher_is_better else "minimize")
    result = global_search(study, blocks_of, config)
    return nearest(result.best.params), sum(scored) / count


def plain(means, metric):
    """The grid's weight that a loop of 50 trials ends at."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))

    def nearest(root):
        return round(root * (len(means) - 1))

    study.optimize(lambda trial: metric.sign * means[nearest(trial.suggest_float("root", 0, 1))], n_trials=50)
    return nearest(study.best_params["root"])


class Regret:
    """How far what was found is from the best of a grid, on the same examples."""

    def __init__(self, metric, found, best):
        change = paired_difference(found, best)
        self.value = abs(change.value) / (1 if metric.is_rate else best.mean())  # points, or a share
        in_interval = change.low <= 0 <= change.high or np.array_equal(found, best)
        self.lands = bool(in_interval if metric.is_rate else self.value <= 0.005)


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
