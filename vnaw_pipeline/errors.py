"""Errors a user can act on. The command line turns each into one message and exit code 1; anything else is a bug."""


class PipelineError(Exception):
    """Something the user gave or has cannot be used; the message says what, where, and what to do."""


class ConfigError(PipelineError, ValueError):
    """A configuration file or an override holds a key or a value that is not allowed."""


class DataError(PipelineError, ValueError):
    """An annotation, manifest, crop, video or template does not have the form it must have."""


class StoreError(PipelineError, ValueError):
    """A feature store is missing, incomplete, or was made in another way than this run needs; or S3 cannot be used."""


class CheckpointError(PipelineError, ValueError):
    """A checkpoint or weights file cannot be read, or belongs to another task, width or run."""


class ProcessError(PipelineError):
    """Several processes of one run do not find each other, or do not run the same program on the same input."""


def listing(problems: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join problems into one message, a line each by default: the first `limit` and a count of the rest."""
    lines = problems[:limit]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    return separator.join(lines)
