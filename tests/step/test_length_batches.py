"""Batches of texts of similar length hold each text once, in few shapes, with little padding."""

import numpy as np
import pytest

from jaxcl.step.length_batches import length_batches, padded_width

LENGTHS = np.random.default_rng(0).integers(0, 200, 1000)


def batches_of(lengths, **options):
    options = {"multiple": 1, "batch_tokens": 512, **options}
    return list(length_batches(np.asarray(lengths, np.int64), **options))


@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [None, 1, 7, 5000])
def test_each_text_is_in_one_batch_that_is_wide_enough(multiple, batch_size):
    batches = batches_of(LENGTHS, multiple=multiple, batch_size=batch_size)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows) == list(range(len(LENGTHS)))
    for batch in batches:
        assert LENGTHS[batch.rows].max() <= batch.width
        assert len(batch.rows) <= batch.num_rows
        assert batch.num_rows % multiple == 0


def test_all_batches_of_a_width_have_one_size_except_the_very_last():
    batches = batches_of(LENGTHS)
    assert all(len(batch.rows) == batch.num_rows == 512 // batch.width for batch in batches[:-1])
    assert len({(batch.num_rows, batch.width) for batch in batches}) <= 20


def test_less_than_an_eighth_of_many_texts_is_padding():
    batches = batches_of(LENGTHS, batch_tokens=2048)
    padded = sum(batch.num_rows * batch.width for batch in batches)
    assert LENGTHS.sum() > 7 / 8 * padded


def test_a_single_text_has_one_of_few_widths():
    widths = {batches_of([length])[0].width for length in range(1, 257)}
    assert widths == {8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256}


def test_the_last_batch_has_a_power_of_two_for_each_device():
    for count, rows in {1: 4, 4: 4, 5: 8, 9: 16, 17: 32}.items():
        (batch,) = batches_of([5] * count, multiple=4, batch_tokens=10_000)
        assert batch.num_rows == rows


def test_a_width_is_a_power_of_two_or_1_5_times_one_or_the_limit():
    widths = {padded_width(length, longest=100) for length in range(101)}
    assert widths == {8, 12, 16, 24, 32, 48, 64, 96, 100}
    assert all(padded_width(length) >= length for length in range(1000))


def test_four_widths_a_doubling_are_twice_as_fine():
    widths = {padded_width(length, per_doubling=4) for length in range(65)}
    assert widths == {8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64}


def test_a_text_longer_than_a_batch_is_embedded_alone():
    batches = batches_of([2000, 3, 3000])
    assert [(batch.rows.tolist(), batch.num_rows, batch.width) for batch in batches] == [
        ([2], 1, 3072),
        ([0], 1, 2048),
        ([1], 1, 8),
    ]


def test_no_texts_make_no_batch():
    assert batches_of([]) == []
