"""How often the 95% interval of a mean change holds the true one: Student's interval, and the one in use.

``python -m tests.benchmarks.coverage [--size 20000] [--samples 4000]``: changes of the cross-entropy of
digits with noise, by the classifier of :mod:`tests.closed_form`, and numbers with heavy tails. Each of these
populations has a known mean. Prints the tables of docs/trust.md in a few minutes on one core.

The second table is of near-copies: five copies of each image, whose answers and cross-entropies are those of
the image in most cases.
"""

import argparse
import copy
from dataclasses import dataclass

import numpy as np

from bnpatch.evaluation.metrics import paired_difference, student

SIZES = (30, 100, 300, 1000)
GROUPS, COPIES = (20, 60, 200), 5

# Share of the copies that get the answer of their image; the others vary by themselves.
LIKENESS = 0.9


@dataclass(frozen=True)
class Coverage:
    """How the intervals of many samples lie.

    Attributes:
        holds: share of the samples whose interval holds the true mean.
        gain: share whose interval lies on the better side of it, a false gain for a change that does nothing.
        loss: share whose interval lies on the worse side of it, a false loss.
        width: median width of the intervals.
    """

    holds: float
    gain: float
    loss: float
    width: float

    def __str__(self):
        return " | ".join(f"{100 * share:.1f}" for share in (self.holds, self.gain, self.loss))


def coverage(population, n, samples, rng, interval):
    """Draw samples of n values, of which less is better, with replacement, as new examples are drawn.

    Without replacement, a sample of 1,000 out of 20,000 has a mean that varies 2.5% less than the interval
    says, so every method would look better.
    """
    truth = population.mean()
    estimates = [interval(population[rng.integers(0, len(population), n)]) for _ in range(samples)]
    gain = np.mean([estimate.high < truth for estimate in estimates])
    loss = np.mean([estimate.low > truth for estimate in estimates])
    width = np.median([estimate.high - estimate.low for estimate in estimates])
    return Coverage(1 - gain - loss, gain, loss, width)


def coverage_of_groups(draw, truth, count, samples, rng, with_groups):
    """Draw samples of ``count`` groups of near-copies, and compare them with or without knowing the groups.

    Args:
        draw: takes a number of groups and a generator; returns scores before and after, each of shape
            (groups, copies), where more is better.
        truth: the true mean change.
        count: number of groups in a sample.
        samples: number of samples.
        rng: source of random numbers.
        with_groups: whether the interval knows the groups.
    """
    numbers = np.repeat(np.arange(count), COPIES) if with_groups else None
    estimates = []
    for _ in range(samples):
        before, after = draw(count, rng)
        estimates.append(paired_difference(before.reshape(-1), after.reshape(-1), numbers))
    gain = np.mean([estimate.low > truth for estimate in estimates])
    loss = np.mean([estimate.high < truth for estimate in estimates])
    width = np.median([estimate.high - estimate.low for estimate in estimates])
    return Coverage(1 - gain - loss, gain, loss, width)


def near_copies(values, count, rng):
    """Draw images from pairs (N, 2): for each copy the pair of its image, or another's, (G, 5, 2)."""
    of_image = np.repeat(rng.integers(0, len(values), (count, 1)), COPIES, axis=1)
    others = rng.integers(0, len(values), (count, COPIES))
    return values[np.where(rng.random(others.shape) < LIKENESS, of_image, others)]


def right_answers(flipped, gained):
    """Scores (N, 2) without and with a patch that changes this share of the answers, some for the better."""
    right = np.repeat([[1.0, 1.0], [0.0, 0.0]], [8000, 2000], axis=0)
    up, down = round(10_000 * flipped * gained), round(10_000 * flipped * (1 - gained))
    right[8000 : 8000 + up, 1], right[:down, 1] = 1.0, 0.0
    return right


def populations_of_groups(size, rng):
    """Pairs of scores (N, 2) without and with a patch, where more is better, by name of population."""
    logits = rng.normal(0, 1, (size, 10)) + 4 * np.eye(10)[rng.integers(0, 10, size)]

    def losses(divisor):
        changes = scaled(logits, divisor, rng)
        return np.stack([np.zeros(size), -changes], 1)

    return {
        "accuracy, 1% of answers change": right_answers(0.01, 0.5),
        "accuracy, 6% change": right_answers(0.06, 0.5),
        "accuracy, 12% change, 10% for the better": right_answers(0.12, 10 / 12),
        "cross-entropy, logits / 0.7": losses(0.7),
        "cross-entropy, logits / 1.5": losses(1.5),
    }


def table_of_groups(size, samples, rng):
    """Print the table of near-copies."""
    print("| change | groups | ignored: holds | gain | loss | known: holds | gain | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, values in populations_of_groups(size, rng).items():
        truth = float(np.mean(values[:, 1] - values[:, 0]))

        def draw(count, rng, values=values):
            drawn = near_copies(values, count, rng)
            return drawn[..., 0], drawn[..., 1]

        for count in GROUPS:
            seed = rng.integers(2**32)  # the same samples for both
            ignored, known = (
                coverage_of_groups(draw, truth, count, samples, np.random.default_rng(seed), with_groups)
                for with_groups in (False, True)
            )
            print(f"| {name} | {count} | {ignored} | {known} |", flush=True)


def in_use(changes):
    """The interval that bnpatch prints."""
    return paired_difference(np.zeros_like(changes), changes)


def cross_entropies(logits, labels):
    """Cross-entropies (N,) of logits (N, K)."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(logits)), labels]


def scaled(logits, divisor, rng):
    """Changes of the cross-entropy by dividing calibrated logits: labels are drawn from their softmax."""
    chances = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
    labels = (rng.random((len(logits), 1)) * chances[:, -1:] > chances[:, :-1]).sum(1)
    return cross_entropies(logits / divisor, labels) - cross_entropies(logits, labels)


def calibrated(logits, labels):
    """Logits divided by the temperature with the least cross-entropy."""
    temperatures = np.geomspace(0.5, 8, 81)
    return logits / min(temperatures, key=lambda t: cross_entropies(logits / t, labels).mean())


def populations(size, rng):
    """Changes (N,) by name of population."""
    # Imported here, so that tests of the rest are quick.
    from bnpatch_cli import demo
    from tests import closed_form
    from tests.benchmarks.fashion_mnist import shifted
    from tests.conftest import DIGITS

    images, labels = demo.digits()
    model = closed_form.fitted(images[:DIGITS], labels[:DIGITS])
    picked = rng.integers(DIGITS, len(images), size)
    noisy = images[picked] + rng.normal(0, 10, (size, *images.shape[1:]))
    clean, labels = noisy.round().clip(0, 255).astype(np.uint8), labels[picked]
    mixed = shifted("mixed", clean, rng)
    before = {"clean": _logits(model, clean), "mixed": _logits(model, mixed)}

    def patched(images, kind, alpha):
        after = _logits(model, images, alpha)
        return cross_entropies(after, labels) - cross_entropies(before[kind], labels)

    sure, fair = before["clean"], calibrated(before["clean"], labels)
    return {
        "(a) clean, alpha 0.02": patched(clean, "clean", 0.02),
        "(b) mixed shift, alpha 0.1": patched(mixed, "mixed", 0.1),
        "(c) logits / 0.7": scaled(fair, 0.7, rng),
        "(d) logits / 1.5": scaled(fair, 1.5, rng),
        "(e) Student's t(2.5)": rng.standard_t(2.5, 10 * size),
        "(f) as (c), few errors": scaled(sure, 0.7, rng),
        "(g) as (d), few errors": scaled(sure, 1.5, rng),
    }


def _logits(model, images, alpha=None, batch_size=250):
    """Logits (N, 10) of images as bytes, of the model as it is or with an alpha."""
    import torch

    import bnpatch
    from tests import closed_form

    if alpha is not None:
        model = bnpatch.patch(copy.deepcopy(model), alpha=alpha)
    parts = np.array_split(images, max(1, len(images) // batch_size))
    with torch.no_grad():
        return np.concatenate([model(closed_form.as_inputs(part)).double().numpy() for part in parts])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=20_000, help="examples of a population")
    parser.add_argument("--samples", type=int, default=4000, help="samples of each population and size")
    args = parser.parse_args()
    table_of_groups(args.size, args.samples, np.random.default_rng(0))
    print()
    rng = np.random.default_rng(0)
    print("| population | skewness | n | before: holds | gain | loss | now: holds | gain | loss | wider |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, changes in populations(args.size, rng).items():
        skewness = np.mean(((changes - changes.mean()) / changes.std()) ** 3)
        for n in SIZES:
            seed = rng.integers(2**32)  # the same samples for both
            before, now = (
                coverage(changes, n, args.samples, np.random.default_rng(seed), interval)
                for interval in (student, in_use)
            )
            wider = now.width / before.width - 1
            print(f"| {name} | {skewness:.1f} | {n:,} | {before} | {now} | {wider:.0%} |", flush=True)


if __name__ == "__main__":
    main()
