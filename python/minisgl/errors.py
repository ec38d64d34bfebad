"""Every error that minisgl raises on purpose.

MiniSGLError
├── ConfigError     the operator's fault: a flag, a file or a model that cannot be used; one line, exit status 2
├── RequestError    the client's fault: one request is refused (HTTP 400), everyone else goes on
├── EngineError     our fault: a step failed on the device; its requests end with an error (HTTP 500)
├── IntegrityError  our fault: what we remember contradicts itself; running requests end with an error (HTTP 500)
└── WorkerDied      a child process is gone (HTTP 503); it is started again, or the server ends"""


class MiniSGLError(Exception):
    """Base of all errors raised on purpose.

    What clients are told: `status` is the HTTP status, `param` names the offending field and `code` the kind of fault
    (as in OpenAI's error objects)."""

    status = 500
    param: str | None = None
    code: str | None = None
    retry_after = 5  # seconds, where the status is 429 or 503


class ConfigError(MiniSGLError):
    """The configuration cannot work. The message is one line that names the flag or file and what to do."""


class RequestError(MiniSGLError):
    """A request cannot be served as it was asked."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def too_long(param: str, num_tokens: str, max_seq_len: int) -> RequestError:
    """That a prompt does not fit the context: in OpenAI's words, which clients look for."""
    message = f"This model's maximum context length is {max_seq_len} tokens. However, your {param} resulted in "
    more = ", and at least 1 is for the output" * (num_tokens.split()[-1] == str(max_seq_len))
    message += f"{num_tokens} tokens{more}. Please reduce the length of the {param}."
    return RequestError(message, param=param, code="context_length_exceeded")


class EngineError(MiniSGLError):
    """A step failed on the device."""


class IntegrityError(MiniSGLError, AssertionError):
    """What the planner or the engine remembers contradicts itself. Nothing that was computed can be trusted."""


def require(holds: object, contradiction: str) -> None:
    """Raises: IntegrityError."""
    if not holds:
        raise IntegrityError(contradiction)


class WorkerDied(MiniSGLError):
    """A child process ended, or stopped answering, while the server needed it."""

    status = 503
