"""What can go wrong between here and the Hub, told apart: what passes by itself, and what a user can do about the rest."""

import importlib

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from finllm_prune.errors import one_line

_PASSING = (408, 429, 500, 502, 503, 504)


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client of the installed huggingface_hub raises: requests, httpx or httpx2, by version."""
    found: list[type[Exception]] = []
    for client, error in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        try:
            found.append(getattr(importlib.import_module(client), error))
        except ImportError:
            continue
    return tuple(found)


CUT_OFF: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, *_connection_errors())
UNREACHABLE: tuple[type[Exception], ...] = (OSError, OfflineModeIsEnabled, *CUT_OFF)
# huggingface_hub puts what went wrong with a file into a RuntimeError, and what the Hub says of one into a ValueError.
FAULTS: tuple[type[Exception], ...] = (HfHubHTTPError, RuntimeError, ValueError, *UNREACHABLE)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, where there was an answer."""
    answer = _answer(error)
    return None if answer is None else int(answer.response.status_code)


def is_passing(error: BaseException) -> bool:
    """Whether the same call may go well a little later."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    return not isinstance(error, OfflineModeIsEnabled) and any(isinstance(each, CUT_OFF) for each in _chain(error))


def wait_asked(error: BaseException) -> float | None:
    """The seconds of ``Retry-After``."""
    answer = _answer(error)
    value = "" if answer is None else str(answer.response.headers.get("Retry-After") or "")
    return float(value) if value.isdigit() else None


def remedy(error: BaseException, repo_id: str) -> str:
    """What happened to a call about a repository, and what to do, in a sentence without its full stop."""
    owner, status, answer = repo_id.partition("/")[0], status_of(error), _answer(error)
    said = one_line(Exception(answer.server_message or ""))[:200] if answer is not None else ""
    quoted = f": {said}" if said else ""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: HF_HUB_OFFLINE is set, so nothing reaches the Hub; unset it"
    if status == 401:
        return (
            f"{repo_id}: the Hub does not take the token (401{quoted}); log in with `hf auth login`, or set HF_TOKEN to one "
            f"that may write to {owner}"
        )
    if status in (402, 403, 413):
        return (
            f"{repo_id}: the Hub refuses ({status}{quoted}); take a token that may write to {owner}, or make room where its "
            "storage is full"
        )
    if status == 404:
        return (
            f"{repo_id}: the Hub shows no such repository or revision (404); check the name, and what the token may see"
        )
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else meanwhile ({status}); run this again"
    if status == 429:
        wait = wait_asked(error)
        when = "later" if wait is None else f"in {wait:g} s"
        return f"{repo_id}: the Hub takes no more calls for now (429{quoted}); run this again {when}"
    if status is not None and status >= 500:
        return f"{repo_id}: the Hub failed ({status}{quoted}); run this again later, what it has is not sent again"
    if is_passing(error):
        return (
            f"{repo_id}: the connection was cut ({one_line(error)}); run this again, what the Hub has is not sent again"
        )
    return f"{repo_id}: the Hub cannot be used ({one_line(error)[:300]}{quoted}); mend that and run this again"


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The error of the HTTP answer, where one is behind what was raised."""
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError) and getattr(each, "response", None) is not None:
            return each
    return None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in found:
        found.append(now)
        now = now.__cause__
    return found
