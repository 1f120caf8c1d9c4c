"""Plain data -> typed values, and ``key.sub=value`` overrides; what is wrong is one sentence with the key."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from finllm_prune.errors import InputError, one_line

T = TypeVar("T")

_MOST = 100_000  # characters and values


def read_yaml(path: Path, overrides: Sequence[str], what: str) -> dict[str, Any]:
    """The keys and values of a YAML file after ``key.sub=value`` overrides (values are YAML); ``what`` it is, for errors."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable YAML file: {one_line(error)}") from None
    try:
        data = mapping(data, f"the {what}")
        for override in overrides:
            set_override(data, override)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return data


def parse_file(path: Path, overrides: Sequence[str], what: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """What ``parse`` makes of such a file; its errors then name the file."""
    data = read_yaml(path, overrides, what)
    try:
        return parse(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def plain(value: Any, names: Mapping[type, str], hidden: Callable[[Any], Iterable[str]]) -> Any:
    """Dataclasses as data that YAML and JSON can hold and ``build`` and ``named`` can read.

    Args:
        names: class -> what ``named`` calls it.
        hidden: of a dataclass, the fields that are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        left_out = set(hidden(value))
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in left_out}
        made = {key: plain(item, names, hidden) for key, item in fields.items()}
        return {"name": names[type(value)], **made} if type(value) in names else made
    if isinstance(value, list | tuple):
        return [plain(item, names, hidden) for item in value]
    if isinstance(value, dict):
        return {key: plain(item, names, hidden) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def named(table: Mapping[str, type[Any]], value: Any, where: str) -> Any:
    """``cubic`` or ``{name: cubic, begin: 0.2}`` -> an instance of the class of that name."""
    settings = {"name": value} if isinstance(value, str) else mapping(value, where)
    name = str(settings.get("name"))
    if name not in table:
        raise InputError(f"{where}: unknown name '{name}'{hint(name, table)}")
    return build(table[name], {key: v for key, v in settings.items() if key != "name"}, where)


def build(cls: Callable[..., T], data: Any, where: str) -> T:
    """A dataclass from a mapping of its fields; an unknown key is an error that names the nearest one."""
    settings = mapping(data, where)
    refuse_unknown(settings, [f.name for f in dataclasses.fields(cls) if f.init], where)  # type: ignore[arg-type]
    built: T = typed(cls, settings, where)
    return built


def typed(kind: Any, value: Any, where: str, keep: bool = False) -> Any:
    """The value as that type, numbers written as 1e-4 included (YAML takes those for text).

    ``keep`` passes a mapping or a list on as it was written, where transformers itself converts it.
    """
    try:
        result = TypeAdapter(kind, config=_config(kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        place = ".".join(
            [where, *(str(part) for part in first["loc"] if not str(part).startswith(("function-", "is-inst")))]
        )
        raise InputError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}") from None
    return value if keep and not isinstance(value, str | int | float) else result


def _config(kind: Any) -> ConfigDict | None:
    return None if dataclasses.is_dataclass(kind) else ConfigDict(arbitrary_types_allowed=True)


def parse_yaml(text: str) -> Any:
    """The plain data of a YAML text, by the safe loader.

    Raises:
        ValueError: it is no YAML, or more than a recipe is: a few aliases of aliases can grow to any size.
    """
    if len(text) > _MOST:
        raise ValueError(f"over {_MOST:,} characters are no recipe")
    try:
        data = yaml.safe_load(text)
        _refuse_large(data)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def _refuse_large(data: Any) -> None:
    count, waiting = 0, [data]
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _MOST:
            raise ValueError(f"its aliases make over {_MOST:,} values of it")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | set | tuple):
            waiting += value


def mapping(data: Any, where: str) -> dict[str, Any]:
    """A copy of a mapping with text keys; anything else is an error."""
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"{where}: keys and values are expected here, not {data!r}")
    return dict(data)


def refuse_unknown(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Each key of ``data`` must be one of ``known``."""
    for key in data:
        if key not in known:
            place = f"{where}.{key}" if where else key
            raise InputError(f"{place}: unknown key{hint(key, known)}")


def hint(name: str, known: Iterable[str]) -> str:
    """What a user may have meant, to be put behind an error."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1)
    listed = f"; known: {', '.join(choices)}" if len(choices) <= 40 else "; see transformers.TrainingArguments"
    return (f"; did you mean '{close[0]}'?" if close else "") + listed


def set_override(data: dict[str, Any], text: str) -> None:
    """``pruning.rules.0.sparsity=0.9``: walk down, lists by index, and set the YAML value."""
    path, sign, raw = text.partition("=")
    if not sign or not path:
        raise InputError(f"override '{text}': write it as key.sub=value")
    try:
        value = parse_yaml(raw)
    except ValueError:
        raise InputError(f"override '{text}': its value is not YAML") from None
    *parents, last = path.split(".")
    place: Any = data
    for depth, part in enumerate(parents):
        if isinstance(place, list):
            place = place[_index(place, part, text)]
        else:
            below = place.get(part)
            if below is None or (isinstance(below, str) and depth < len(parents)):
                below = {} if below is None else {"name": below}
            place[part] = below = dict(below) if isinstance(below, dict) else below
            place = below
        if not isinstance(place, dict | list):
            raise InputError(f"override '{text}': {'.'.join(parents[: depth + 1])} holds a value, not keys")
    if isinstance(place, list):
        place[_index(place, last, text)] = value
    else:
        place[last] = value


def _index(place: list[Any], part: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise InputError(f"override '{text}': '{part}' is no index of a list of {len(place)}")
    return int(part)
