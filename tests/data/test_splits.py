import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.dtypes import StringDType

from fgvc.data.splits import carve, fold_numbers, group_codes, sampled, straddling, stratified

labels_ = st.lists(st.integers(0, 6), min_size=1, max_size=200).map(lambda x: np.array(x, np.int32))
fractions = st.floats(0, 0.99)
seeds = st.integers(0, 2**31)


def names(texts):
    return np.array(texts, dtype=StringDType())


@given(labels_, fractions, seeds)
def test_every_class_gives_floor_or_ceiling_and_keeps_a_row(labels, fraction, seed):
    in_val = stratified(labels, fraction, seed=seed, split="val")
    for k in np.unique(labels):
        n, count = (labels == k).sum(), in_val[labels == k].sum()
        assert np.floor(n * fraction + 1e-9 * n) >= count - 1
        assert np.floor(n * fraction - 1e-6) <= count <= np.ceil(n * fraction + 1e-6)
        assert count < n


@given(labels_, fractions, seeds)
def test_the_total_is_rounded_once_unless_classes_run_out_of_rows(labels, fraction, seed):
    counts = np.bincount(labels)
    at_most = np.minimum(np.ceil(counts * fraction - 1e-9), np.maximum(counts - 1, 0)).sum()
    total = stratified(labels, fraction, seed=seed, split="val").sum()
    # Half a row may go either way, where the share is exactly x.5.
    assert abs(total - min(len(labels) * fraction, at_most)) <= 0.5 + 1e-6


def test_worked_quotas():
    tens = np.repeat([0, 1, 2], 10)
    assert np.bincount(tens[stratified(tens, 0.1, seed=3, split="val")]).tolist() == [1, 1, 1]
    fives = np.repeat(np.arange(8), 5)  # half a row each: four of the eight classes give one
    given_ = np.bincount(fives[stratified(fives, 0.1, seed=3, split="val")], minlength=8)
    assert sorted(given_.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    thirty = np.repeat(np.arange(50), 30)  # CUB: 30 * 0.1 is exactly three, whatever floating point says
    assert set(np.bincount(thirty[stratified(thirty, 0.1, seed=0, split="val")]).tolist()) == {3}
    assert not stratified(np.arange(9), 0.9, seed=0, split="test").any()
    assert stratified(np.array([], np.int32), 0.5, seed=0, split="val").shape == (0,)


@given(labels_, st.integers(1, 250), st.integers(1, 5), seeds)
def test_a_sample_has_the_least_of_every_class_and_of_larger_ones_their_share(labels, count, least, seed):
    mask = sampled(labels, count, least=least, seed=seed)
    for k in np.unique(labels):
        n, taken = (labels == k).sum(), mask[labels == k].sum()
        share = n * min(1, count / len(labels))
        assert taken >= min(n, least)
        assert taken <= max(min(n, least), np.ceil(share + 1e-6))
        assert taken >= np.floor(share - 1e-6)


def test_the_same_key_gives_the_same_rows_and_another_key_others():
    labels = np.repeat(np.arange(4), 100)
    first = stratified(labels, 0.3, seed=7, split="val")
    np.testing.assert_array_equal(first, stratified(labels, 0.3, seed=7, split="val"))
    assert (first != stratified(labels, 0.3, seed=8, split="val")).any()
    assert (first != stratified(labels, 0.3, seed=7, split="test")).any()
    # Frozen: a published split may not move with a new version.
    assert np.flatnonzero(first)[:6].tolist() == FROZEN


FROZEN = [2, 13, 16, 20, 27, 28]


@given(labels_, st.lists(st.integers(0, 20), min_size=200, max_size=200), fractions, seeds)
def test_groups_stay_whole_and_no_class_leaves_train(labels, codes, fraction, seed):
    groups = names([f"g{code}" if code else "" for code in codes[: len(labels)]])
    in_val = stratified(labels, fraction, seed=seed, split="val", groups=groups)
    assert straddling(groups, in_val.astype(np.int8)) == []
    assert set(labels[~in_val]) == set(labels)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=60), fractions, seeds)
def test_with_one_class_per_group_the_share_is_met_within_half_a_group(blocks, fraction, seed):
    labels = np.concatenate([np.full(size, k, np.int32) for k, size in blocks])
    groups = names([f"g{i}" for i, (_, size) in enumerate(blocks) for _ in range(size)])
    in_val = stratified(labels, fraction, seed=seed, split="val", groups=groups)
    for k in np.unique(labels):
        sizes = [size for kk, size in blocks if kk == k]
        n, count = (labels == k).sum(), in_val[labels == k].sum()
        assert count <= n * fraction + max(sizes) / 2
        # Below only where the one group left is what keeps the class in train.
        assert count >= n * fraction - max(sizes) / 2 or n - count <= max(sizes)


def test_rows_without_a_group_are_free():
    groups = names(["", "a", "", "a", "b"])
    codes = group_codes(groups)
    assert codes[1] == codes[3]
    assert len(set(codes.tolist())) == 4
    labels = np.zeros(1000, np.int32)
    in_val = stratified(labels, 0.25, seed=0, split="val", groups=names([""] * 1000))
    assert in_val.sum() == 250


def test_straddling_names_groups():
    groups = names(["b", "a", "b", "c", "a", "", ""])
    assert straddling(groups, np.array([0, 0, 1, 2, 0, 0, 1], np.int8)) == ["b"]
    assert straddling(names([]), np.array([], np.int8)) == []


@pytest.mark.parametrize("split", ["val", "test"])
def test_carve_takes_from_train_only(split):
    splits = np.repeat(np.array([0, 2], np.int8), 100)
    labels = np.tile(np.arange(4, dtype=np.int32), 50)
    carved = carve(labels, splits, split=split, fraction=0.2, seed=1)
    assert (splits == np.repeat([0, 2], 100)).all()  # the argument is left alone
    assert (carved[100:] == 2).all()
    assert (carved[:100] != 0).sum() == 20


@given(labels_, st.integers(2, 7), seeds)
def test_folds_partition_the_rows_evenly_by_class_and_in_all(labels, folds, seed):
    numbers = fold_numbers(labels, folds=folds, seed=seed)
    for k in np.unique(labels):
        own = numbers[labels == k]
        if len(own) == 1:
            assert own.tolist() == [-1]
        else:
            counts = np.bincount(own, minlength=folds)
            assert counts.max() - counts.min() <= 1
    counts = np.bincount(numbers[numbers >= 0], minlength=folds)
    assert counts.max() - counts.min() <= 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=120), st.integers(2, 6), seeds)
def test_folds_keep_groups_whole_and_leave_every_class_a_row(rows, folds, seed):
    labels = np.array([label for label, _ in rows], np.int32)
    groups = names([f"{group}" if group else "" for _, group in rows])
    numbers = fold_numbers(labels, folds=folds, seed=seed, groups=groups)
    codes = group_codes(groups)
    for code in np.unique(codes):
        assert len(set(numbers[codes == code].tolist())) == 1
    for fold in range(folds):
        assert set(labels[numbers != fold].tolist()) == set(labels.tolist())


def test_folds_of_groups_of_one_class_are_as_even_as_the_groups():
    labels = np.repeat(np.arange(5), 64)
    groups = names([f"{label}-{at // 8}" for label in range(5) for at in range(64)])
    numbers = fold_numbers(labels, folds=4, seed=0, groups=groups)
    for k in range(5):
        assert np.bincount(numbers[labels == k]).tolist() == [16] * 4


def test_folds_are_frozen_too():
    labels = np.repeat(np.arange(4), 10)
    assert fold_numbers(labels, folds=5, seed=7)[:10].tolist() == FOLDS
    assert (fold_numbers(labels, folds=5, seed=8) != fold_numbers(labels, folds=5, seed=7)).any()


FOLDS = [2, 0, 1, 1, 4, 2, 3, 3, 4, 0]
