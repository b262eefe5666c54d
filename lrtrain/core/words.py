"""Words of messages."""


def processes(count: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{count} process{'es' * (count != 1)}"
