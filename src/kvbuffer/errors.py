"""Errors that users see. Each message names the offending value and what to do about it."""


class KVBufferError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(KVBufferError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ModelError(KVBufferError):
    """A checkpoint that cannot be loaded: unknown architecture, missing or extra weights, wrong shapes."""


class CapacityError(KVBufferError):
    """The memory budget is too small for what was asked."""


class InvalidRequestError(KVBufferError, ValueError):
    """A request that cannot be served; answered with HTTP 400.

    Attributes:
        param: the request field at fault in OpenAI's spelling, or None when no single field is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
