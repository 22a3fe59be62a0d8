import itertools

from tests.nn.pairwise import pairwise


def test_every_two_values_meet_in_fewer_rows_than_the_product_has():
    factors = [range(10), "abcd", [0.0, 0.5, 1.0], [True, False]]
    rows = pairwise(*factors)
    for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    assert 40 <= len(rows) < 50  # of 240; the two largest factors alone take 40
