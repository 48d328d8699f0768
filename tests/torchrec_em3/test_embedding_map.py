import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.embedding_map import (
    nearest,
    neighbour_agreement,
    project,
    sample_items,
    top_categories,
)


def clusters(n=90, num=3, width=8):
    rng = np.random.default_rng(0)
    category = np.arange(n) % num
    return (4 * rng.normal(size=(num, width))[category] + rng.normal(size=(n, width))).astype(np.float32), category


def test_a_map_keeps_neighbours_together_and_repeats():
    vectors, category = clusters()
    xy = project(vectors, seed=0)
    assert xy.shape == (90, 2)
    assert xy.min() == 0.0
    assert xy.max() == 1.0
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (category[apart.argmin(axis=1)] == category).mean() > 0.9
    assert np.array_equal(xy, project(vectors, seed=0))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 11, 12])
@pytest.mark.parametrize("width", [1, 3])
def test_few_items_are_drawn_too(n, width):
    xy = project(np.random.default_rng(1).normal(size=(n, width)), seed=0)
    assert xy.shape == (n, 2)
    assert np.isfinite(xy).all()


def test_equal_items_share_a_place():
    assert np.array_equal(project(np.ones((40, 4)), seed=0), np.full((40, 2), 0.5))
    assert np.isfinite(project(np.zeros((40, 4)), seed=0)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 1000))
def test_nearest_is_by_cosine_and_never_the_item_itself(n, k, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 3)) * rng.uniform(0.1, 10, size=(n, 1))
    queries = rng.integers(0, n, 4)
    got = nearest(vectors, queries, k)
    assert got.shape == (4, min(k, n - 1))
    for query, row in zip(queries, got, strict=True):
        cosine = vectors @ vectors[query] / np.linalg.norm(vectors, axis=1)
        cosine[query] = -np.inf
        assert query not in row
        assert cosine[row] == pytest.approx(np.sort(cosine)[::-1][: len(row)])


def test_agreement_is_one_for_clusters_and_chance_for_noise():
    vectors, category = clusters()
    got = neighbour_agreement(vectors, category)
    assert got.share > 0.95
    assert got.chance == pytest.approx(29 / 89)
    noise = neighbour_agreement(np.random.default_rng(2).normal(size=(600, 8)), np.arange(600) % 4)
    assert noise.share == pytest.approx(noise.chance, abs=0.03)


def test_agreement_leaves_out_unknown_categories():
    vectors, category = clusters()
    category = np.where(category == 2, -1, category)
    assert neighbour_agreement(vectors, category).chance == pytest.approx(29 / 59)
    assert neighbour_agreement(vectors, np.where(category == 1, -1, category)) is None
    assert neighbour_agreement(vectors[:10], category[:10]) is None


def test_categories_are_counted_by_first_name():
    names, index = top_categories(["Drama|War", "Drama", "Comedy", "", "Comedy|War", "Drama", "War"], limit=2)
    assert names == ["Drama", "Comedy", "other"]
    assert index.tolist() == [0, 0, 1, 2, 1, 0, 2]
    assert top_categories(["a", "b"], limit=7)[0] == ["a", "b"]
    assert top_categories(["", ""], limit=7)[0] == ["other"]


def test_a_sample_is_bounded_ordered_and_repeats():
    assert sample_items(5, seed=0).tolist() == [0, 1, 2, 3, 4]
    chosen = sample_items(5000, seed=0)
    assert len(chosen) == 1500
    assert len(set(chosen)) == 1500
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, sample_items(5000, seed=0))
