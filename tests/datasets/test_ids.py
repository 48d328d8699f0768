"""Ids as numbers: in string order, whatever form they come in and however many are converted at a time."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.datasets import ids as ids_module
from torchrec_em3.datasets.ids import IdNumbers, count_codes, encode_ids, look_up, to_dictionary


def test_encode_ids_numbers_ids_in_string_order() -> None:
    for dtype in (object, str):
        values, codes = encode_ids(np.array(["b", "10", "9", "b", "é"], dtype=dtype))
        assert values.tolist() == ["10", "9", "b", "é"]
        assert codes.tolist() == [2, 0, 1, 2, 3]
        assert codes.dtype == np.int32


def test_encode_ids_of_more_text_than_one_arrow_chunk() -> None:
    ids = np.full(340, "b" * 50_000)
    ids[7] = "a"
    values, codes = encode_ids(ids)
    assert [len(value) for value in values] == [1, 50_000]
    assert np.flatnonzero(codes == 0).tolist() == [7]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["", "1", "10", "2", "b", "é"]), max_size=40))
def test_a_few_at_a_time_and_in_any_form_are_the_same(given_ids: list[str]) -> None:
    numbers = IdNumbers()
    for value in given_ids:
        numbers.add(value)
    # A dictionary in no order, with an id that nothing uses and one that stands there twice.
    spare = pa.array(["zzz", *sorted(set(given_ids), reverse=True), *given_ids[:1]], pa.string())
    places = [len(spare) - 1 if at == 0 else spare.to_pylist().index(value) for at, value in enumerate(given_ids)]
    forms = [
        np.array(given_ids, dtype=object),
        np.array(given_ids, dtype=str),
        numbers.encoded(),
        pa.DictionaryArray.from_arrays(pa.array(places, pa.int8()), spare),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for chunk in (1 << 20, 3):
            patch.setattr(ids_module, "_CHUNK", chunk)
            for form in forms:
                values, codes = encode_ids(form)
                assert values.tolist() == sorted(set(given_ids))
                assert look_up(values, codes).tolist() == to_dictionary(form).to_pylist() == given_ids
                assert count_codes(codes, len(values) + 1).tolist() == [*map(given_ids.count, values.tolist()), 0]


def test_a_dictionary_that_nothing_uses_holds_no_ids() -> None:
    numbers, values = np.array([], dtype=np.int32), np.array(["spare"])
    assert [len(part) for part in encode_ids(ids_module.ids_from_codes(numbers, values))] == [0, 0]
