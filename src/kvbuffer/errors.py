"""Errors that users see. Each message names the offending value and what to do about it."""


class KVBufferError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(KVBufferError, ValueError):
    """An option, or a combination of options, that cannot work."""


class ModelError(KVBufferError):
    """A checkpoint that cannot be loaded: unknown architecture, missing or extra weights, wrong shapes."""


class StoreError(KVBufferError):
    """A file of the predictive cache that is torn, foreign or outdated."""


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


class QueueFullError(KVBufferError):
    """Too many requests wait already; answered with HTTP 429.

    Attributes:
        reason: ``queue_full``, or ``client_queue_full`` when it is this client's requests that are too many.
        retry_after_s: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, reason: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
