"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13)."""


def soft_overlong_penalty(length: int, max_response_tokens: int, buffer_len: int, factor: float) -> float:
    """Penalty of a response, in units of reward; never positive.

    penalty = -factor * clip((length - (max_response_tokens - buffer_len)) / buffer_len, 0, 1)

    `length`, `max_response_tokens` and `buffer_len` are in tokens; `buffer_len` 0 turns the penalty off.

    >>> soft_overlong_penalty(length=90, max_response_tokens=100, buffer_len=20, factor=1.0)
    -0.5
    """
    if buffer_len == 0:
        return 0.0
    excess = length - (max_response_tokens - buffer_len)
    return -factor * min(max(excess / buffer_len, 0.0), 1.0) if excess > 0 else 0.0
