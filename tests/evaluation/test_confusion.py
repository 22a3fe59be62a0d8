import numpy as np

from bnpatch.evaluation.confusion import (
    ClassChange,
    MistakeChange,
    class_changes,
    mistake_changes,
    most_changed,
)

# Target, answer before, answer after. Class 1 has no examples.
CLASSES = np.array([[0, 0, 0, 2, 2, 3], [0, 1, 1, 2, 0, 2], [0, 0, 2, 0, 0, 3]])


def test_recall_by_class():
    assert class_changes(CLASSES) == [
        ClassChange(0, 3, 1, 2),
        ClassChange(2, 2, 1, 0),
        ClassChange(3, 1, 0, 1),
    ]


def test_mistakes_that_change_most_come_first():
    expected = [
        MistakeChange(0, 1, 2, 0),
        MistakeChange(0, 2, 0, 1),
        MistakeChange(2, 0, 1, 2),
        MistakeChange(3, 2, 1, 0),
    ]
    assert mistake_changes(CLASSES, 9) == expected
    assert mistake_changes(CLASSES, 2) == expected[:2]


def test_mistakes_that_stay_are_not_listed():
    assert not mistake_changes(CLASSES[[0, 1, 1]], 9)


def test_the_most_changed_classes_are_in_the_order_of_the_classes():
    changes = [
        ClassChange(0, 9, 1, 2),
        ClassChange(1, 9, 5, 1),
        ClassChange(2, 9, 5, 8),
        ClassChange(3, 9, 1, 1),
    ]
    assert [change.target for change in most_changed(changes, 2)] == [1, 2]


def test_against_a_confusion_matrix():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 7, (3, 400))
    before, after = (np.zeros((7, 7), int) for _ in range(2))
    for target, a, b in classes.T:
        before[target, a] += 1
        after[target, b] += 1
    for change in class_changes(classes):
        k = change.target
        assert (change.examples, change.before, change.after) == (before[k].sum(), before[k, k], after[k, k])
    change = after - before
    np.fill_diagonal(change, 0)
    found = mistake_changes(classes, 99)
    assert sum(abs(m.after - m.before) for m in found) == abs(change).sum()
    assert all(after[m.target, m.answer] == m.after for m in found)
