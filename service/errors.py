"""Every way a request can fail, as one tree; each class carries its HTTP status and its code.

Knows nothing of HTTP frameworks: `service.app` has the one handler that turns these into OpenAI's error envelope.
"""

from typing import Self


class ServiceError(Exception):
    """`message` is advice to the caller; `param` names the field at fault; `retry_after` is in seconds."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(ServiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    @classmethod
    def of_context(cls, context_tokens: int, message: str, *, param: str) -> Self:
        """Begins with OpenAI's sentence: clients know the fault by these words, and read the number in them.

        Others (LangChain) know it by Anthropic's, "prompt is too long": the message has them where that is the fault.
        """
        return cls(f"This model's maximum context length is {context_tokens} tokens. {message}", param=param)


class TaskNotSupported(InvalidRequest):
    code = "task_not_supported"


class InvalidGrammar(InvalidRequest):
    code = "invalid_grammar"


class Unauthorized(ServiceError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class SwapFailed(ServiceError):
    """A version was not put in service; what served before goes on serving."""

    status = 409
    type = "invalid_request_error"
    code = "swap_failed"


class PayloadTooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class Overloaded(ServiceError):
    """The queue is full; `retry_after` says when it should have room."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class Unavailable(ServiceError):
    """Loading, draining or restarting: worth a retry."""

    status = 503
    type = "service_unavailable"
    code = "unavailable"


class DeadlineExceeded(ServiceError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class ClientGone(ServiceError):
    """The client closed its connection; nobody reads this, the metrics count it."""

    status = 499
    type = "cancelled"
    code = "client_gone"


class GenerationFailed(ServiceError):
    """The request's own step failed in the worker (a non-finite logit, out of memory)."""

    code = "generation_failed"


class Quarantined(ServiceError):
    """The request was being run each time that the worker died, at last among none but good ones: it is at fault."""

    code = "quarantined"


class WorkerLost(ServiceError):
    """The worker died and the restart budget is spent: another replica may answer."""

    status = 503
    type = "service_unavailable"
    code = "worker_lost"
