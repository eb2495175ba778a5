"""The reward of an item: the share of levels of its semantic ID that are right, from the first one on."""

import re

_CODE = re.compile(r"<[a-z]_\d+>")


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl calls this with the response and the item that the user chose, such as "<a_3><b_17><c_5>"."""
    said, meant = _CODE.findall(solution_str), _CODE.findall(ground_truth)
    right = 0
    while right < len(meant) and said[right : right + 1] == meant[right : right + 1]:
        right += 1
    return right / len(meant)
