"""Errors that a caller can act upon."""


class TooLittleMemory(ValueError):
    """A memory limit below the ``least`` number of bytes that would do."""

    def __init__(self, message: str, least: int = 0) -> None:
        super().__init__(message)
        self.least = least
