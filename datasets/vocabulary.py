"""The vocabulary of a categorical feature, of users or of events: a row for every value that training knows.

Shape letters: X users or events, V values.
"""

import numpy as np

from torchrec_em3.datasets.ids import Ids, count_codes, encode_ids, look_up, to_dictionary

__all__ = ["index_values"]


def index_values(value_X: Ids, training_X: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Give every value of a feature a row.

    Args:
        value_X: The values; null and "" are unknown.
        training_X: Which users or events train, bool.

    Returns:
        The values by row, in string order behind "" in row 0, and the row of each user or event, int32 [X]. A value
        that none of those in training has would be an untrained row, so it is unknown.
    """
    values_V, code_X = encode_ids(to_dictionary(value_X).fill_null(""))
    known_V = (count_codes(code_X[training_X], len(values_V)) > 0) & (values_V != "")
    row_V = np.where(known_V, np.cumsum(known_V), 0).astype(np.int32)
    return ["", *values_V[known_V].tolist()], look_up(row_V, code_X)
