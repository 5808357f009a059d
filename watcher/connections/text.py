"""A connection string taken apart, with the place of each part, so that a mistake can be shown under a caret."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from watcher.errors import WatcherError
from watcher.values import Json

MASK = "*****"
"""What stands in place of a secret, as in the log, whose module is too heavy for a worker."""
MOST = 16 * 1024
"""Characters of a connection string."""

_WRAPPED = re.compile(r"\A(?:psql\s+|(?:export\s+)?[A-Z][A-Z0-9_]*\s*=\s*)")
"""What web consoles put before it: Neon's ``psql '…'``, and lines of an .env file."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOSTS = re.compile(r"(?:[\w.%~-]*|\[[^\]@]*\])(?::\d*)?(?:,(?:[\w.%~-]*|\[[^\]@]*\])(?::\d*)?)*")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
_PLACEHOLDER = re.compile(
    r"\[[^\]]*\]|<[^>]*>|\*{3,}|•{3,}|(?-i:\$\{?[A-Z_][A-Z0-9_]*\}?)|\{\{?[^}]*\}?\}|YOUR[-_ ]?PASSWORD", re.I
)
_PATH = re.compile(r"(?:/[\w.%~-]*)*")
_NAME = re.compile(r"(?:amp;)?[A-Za-z_][\w.-]{0,40}", re.ASCII)
"""Of a parameter."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One mistake: what is wrong, from where to where in the text, and what would be right."""

    message: str
    start: int
    end: int
    hint: str = ""


class Typo(WatcherError):
    """A connection string cannot be understood. The text shows it with carets, its secrets blanked."""

    exit_code = 2

    def __init__(self, kind: str, text: str, marks: Sequence[Mark], harmless: Collection[str] = ()) -> None:
        self.marks = tuple(marks)
        super().__init__(_render(kind, text, self.marks, harmless))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the text: its decoded value, and where it stands."""

    value: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Host:
    """One host of the list, without percent signs and brackets. ``port`` is None where none is written."""

    name: str
    port: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One ``name=value`` after the question mark."""

    name: str
    value: str
    start: int
    end: int
    value_start: int


@dataclass(slots=True)
class Split:
    """A connection string in its parts, and the mistakes found so far."""

    kind: str
    text: str
    harmless: Collection[str] = ()  # parameters whose values may be shown
    scheme: Part = Part("", 0, 0)
    user: Part | None = None
    password: Part | None = None
    hosts: tuple[Host, ...] = ()
    path: Part = Part("", 0, 0)
    parameters: tuple[Parameter, ...] = ()
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, message: str, start: int, end: int, hint: str = "") -> None:
        """Note a mistake; `done` tells them all."""
        self.marks.append(Mark(message, start, end, hint))

    def fatal(self, message: str, start: int, end: int, hint: str = "") -> Typo:
        """The error to raise where nothing behind the place can be understood."""
        self.wrong(message, start, end, hint)
        return Typo(self.kind, self.text, self.marks, self.harmless)

    def done(self) -> None:
        """Raises Typo if there was any mistake."""
        if self.marks:
            raise Typo(self.kind, self.text, sorted(self.marks, key=lambda mark: mark.start), self.harmless)


# --- taking apart -----------------------------------------------------------------------------------------------------


def split(
    kind: str, given: str, schemes: Mapping[str, str], others: Mapping[str, str], harmless: Collection[str]
) -> Split:
    """The parts of a connection string. ``schemes``: those of this kind, by what they mean; ``others``: scheme → kind;
    ``harmless``: the parameters whose values may be shown.

    Hosts are validated as names, ports as numbers, escapes as escapes; what parameters mean is for the kind to say.
    Raises Typo when the rest cannot be read.
    """
    text = unwrapped(given)
    found = Split(kind, text, harmless)
    first = next(iter(schemes))
    if not text:
        raise found.fatal("it is empty", 0, 1, f"it begins with {first}://")
    if len(text) > MOST:
        raise Typo(kind, "", [Mark(f"it is longer than {MOST:,} characters", 0, 1)])
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise found.fatal("it has no scheme", 0, min(len(text), 8), _no_scheme(text, first))
    found.scheme = Part(scheme[1].lower(), 0, scheme.end(1))
    if found.scheme.value not in schemes:
        raise found.fatal(*_unknown_scheme(found, schemes, others))
    if control := _CONTROL.search(text):
        what = "a space" if control[0] == " " else "a control character or a line end"
        raise found.fatal(f"{what} in it", control.start(), control.end(), "write a space as %20")
    behind = _authority(found, scheme.end())
    _path_and_parameters(found, behind)
    return found


def unwrapped(given: str) -> str:
    """Without what comes along when it is copied: white space, quotes, ``psql``, ``DATABASE_URL=``."""
    text = _WRAPPED.sub("", given.strip())
    return text[1:-1].strip() if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0] else text


def _no_scheme(text: str, first: str) -> str:
    if re.match(r"\w+\s*=", text):
        return f"host=… dbname=… is another form: write {first}://USER:PASSWORD@HOST/DATABASE"
    return f"it begins with {first}://"


def _unknown_scheme(found: Split, schemes: Mapping[str, str], others: Mapping[str, str]) -> tuple[str, int, int, str]:
    scheme = found.scheme
    if scheme.value in others:
        kind = others[scheme.value]
        message = f"{scheme.value}:// is of resource type {kind}, not {found.kind}"
        return message, scheme.start, scheme.end, f"watcher resource add {kind} …"
    hint = near(scheme.value, [*schemes, *others]) or f"it begins with {next(iter(schemes))}://"
    return f"no such scheme: {scheme.value}://", scheme.start, scheme.end, hint


def _authority(found: Split, start: int) -> int:
    """User, password and hosts; where the path begins.

    A host holds no ``@``, so the last one before the path ends the password: ``@``, ``#`` and ``?`` in it need not be
    escaped, as psql and people have it. A slash would be the path's.
    """
    text = found.text
    slash = text.find("/", start)
    stop = len(text) if slash < 0 else slash
    at = text.rfind("@", start, stop)
    question = text.find("?", start, stop)
    if at >= 0 and 0 <= question < at and _HOSTS.fullmatch(text, start, question):
        at = -1  # that one belongs to a parameter
    if at < 0:
        _slash_in_password(found, start, stop)
    else:
        _user(found, start, at)
    begin = at + 1 if at >= 0 else start
    ends = [text.find(mark, begin, stop) for mark in "?#"]
    end = min([place for place in ends if place >= 0], default=stop)
    _hosts(found, begin, end)
    return end


def _slash_in_password(found: Split, start: int, stop: int) -> None:
    head, at = found.text[start:stop], found.text.find("@", stop)
    port = head.rpartition(":")[2]
    if ":" in head and at >= 0 and not port.isdigit() and not head.startswith("["):
        raise found.fatal("a slash in the password", stop, stop + 1, "write / as %2F")


def _user(found: Split, start: int, at: int) -> None:
    colon = found.text.find(":", start, at)
    end = at if colon < 0 else colon
    user = decoded(found, start, end, "the user")
    found.user = user if user.value else None
    if colon < 0:
        return
    if _PLACEHOLDER.fullmatch(found.text, colon + 1, at):
        hint = "put the password in its place; if it is really that, escape its first character"
        found.wrong("this is a placeholder", colon + 1, at, hint)
    password = decoded(found, colon + 1, at, "the password")
    found.password = password if password.value else None


def decoded(found: Split, start: int, end: int, what: str) -> Part:
    """A part of the text with its percent signs decoded; a broken one is a mistake."""
    raw = found.text[start:end]
    if bad := _BAD_PERCENT.search(raw):
        place = start + bad.start()
        found.wrong(f"{what}: a % that no two hexadecimal digits follow", place, place + 1, "write % as %25")
    try:
        value = unquote(raw, errors="strict")
    except UnicodeDecodeError:
        found.wrong(f"{what}: its escapes are not UTF-8", start, end)
        return Part("", start, end)
    if "\0" in value:
        found.wrong(f"{what}: %00 in it", start, end)
    return Part(value, start, end)


def _hosts(found: Split, start: int, end: int) -> None:
    hosts, at = [], start
    if start < end:
        for piece in found.text[start:end].split(","):
            hosts.append(_host(found, at, at + len(piece)))
            at += len(piece) + 1
    found.hosts = tuple(hosts)


def _host(found: Split, start: int, end: int) -> Host:
    raw = found.text[start:end]
    if raw.startswith("["):
        close = raw.find("]")
        if close < 0:
            found.wrong("a [ without its ]", start, end)
            return Host("", None, start, end)
        name, rest, rest_at = raw[1:close], raw[close + 1 :], start + close + 1
        name = decoded(found, start + 1, start + close, "the host").value
        if not re.fullmatch(r"[0-9A-Fa-f:.]+(?:%[\w.-]+)?", name) or ":" not in name:
            found.wrong("this is no IPv6 address", start, rest_at)
    elif raw.count(":") > 1:
        found.wrong("an IPv6 address must stand in brackets", start, end, "such as [::1]:5432")
        return Host("", None, start, end)
    else:
        before = raw.partition(":")[0]
        rest, rest_at = raw[len(before) :], start + len(before)
        name = decoded(found, start, rest_at, "the host").value
        if not name:
            found.wrong("a host is missing", start, max(end, start + 1))
        elif not name.startswith("/") and not re.fullmatch(r"[\w.-]+", name):
            found.wrong("this is no host name", start, rest_at)
    return Host(name, _port(found, rest, rest_at, end), start, end)


def _port(found: Split, rest: str, start: int, end: int) -> int | None:
    if rest in ("", ":"):
        return None
    if rest[0] == ":" and rest[1:].isascii() and rest[1:].isdigit() and 1 <= int(rest[1:7]) <= 65535:
        return int(rest[1:])
    hint = "" if found.user or rest[1:].isdigit() else "a password stands before an @: USER:PASSWORD@HOST"
    found.wrong("a port is a number from 1 to 65535", start + 1, max(end, start + 2), hint)
    return None


def _path_and_parameters(found: Split, start: int) -> None:
    text = found.text
    question = text.find("?", start)
    end = len(text) if question < 0 else question
    begin = start + 1 if text[start : start + 1] == "/" else start
    if (sharp := text.find("#", start)) >= 0:
        found.wrong("a # would begin a remark", sharp, sharp + 1, "write # as %23")
    if (ampersand := text.find("&", begin, end)) >= 0 and "=" in text[ampersand:end]:
        raise found.fatal("an & before any ?", ampersand, ampersand + 1, "the first parameter begins with ?")
    if (at := text.find("@", begin, end)) >= 0:
        hint = "write @ as %40, and a slash in a password as %2F"
        raise found.fatal("an @ behind the host", at, at + 1, hint)
    if (slash := text.find("/", begin, end)) >= 0 and found.hosts and not text.startswith("http"):
        found.wrong("a second slash behind the host", slash, slash + 1, "write / as %2F")
    found.path = decoded(found, begin, end, "the database")
    if question >= 0:
        found.parameters = tuple(_parameters(found, question + 1))


def _parameters(found: Split, start: int) -> Iterable[Parameter]:
    at = start
    for piece in found.text[start:].split("&"):
        end, here = at + len(piece), at
        at = end + 1
        if not piece:
            continue
        raw, equals, value = piece.partition("=")
        middle = here + len(raw)
        if raw.startswith("amp;"):
            found.wrong("&amp; is how web pages write &", here, here + 4, "write & alone")
            continue
        if not equals:
            found.wrong("a parameter without a value", here, end, "write & in a value as %26")
            continue
        if (second := value.find("?")) >= 0 and "=" in value[second:]:
            found.wrong("a second ?", middle + 1 + second, middle + 2 + second, "parameters are joined with &")
            continue
        name = decoded(found, here, middle, "a parameter").value
        content = decoded(found, middle + 1, end, name)
        yield Parameter(name, content.value, here, end, middle + 1)


# --- what all kinds ask -----------------------------------------------------------------------------------------------


def chosen(found: Split, parameter: Parameter, allowed: Collection[str], say: Mapping[str, str] | None = None) -> str:
    """The one of ``allowed`` that a parameter says, in any case; ``say``: hints for what other products write."""
    for value in allowed:
        if parameter.value.lower() == value.lower():
            return value
    hint = (say or {}).get(parameter.value.lower()) or near(parameter.value, allowed)
    message = f"{parameter.name} is one of {', '.join(allowed)}"
    found.wrong(message, parameter.value_start, max(parameter.end, parameter.value_start + 1), hint)
    return ""


def truth(found: Split, parameter: Parameter) -> bool:
    """The value of a parameter that is true or false."""
    word = parameter.value.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word not in ("false", "0", "no", "off"):
        found.wrong(f"{parameter.name} is true or false", parameter.value_start, parameter.end)
    return False


def number(found: Split, parameter: Parameter) -> int:
    """The value of a parameter that is a whole number."""
    if re.fullmatch(r"-?\d{1,18}", parameter.value, re.A):
        return int(parameter.value)
    found.wrong(
        f"{parameter.name} is a whole number", parameter.value_start, max(parameter.end, parameter.value_start + 1)
    )
    return 0


def unknown(found: Split, parameter: Parameter, known: Collection[str]) -> None:
    """Note that there is no such parameter."""
    plain = _NAME.fullmatch(parameter.name)
    found.wrong(
        f"no such parameter: {parameter.name}" if plain else "no such parameter",
        parameter.start,
        parameter.value_start - 1,
        near(parameter.name, known),
    )


def once(found: Split, parameter: Parameter, value: Mapping[str, Json], name: str = "") -> bool:
    """Whether this parameter is the first to say what it says; a second one is a mistake."""
    if (name or parameter.name) not in value:
        return True
    found.wrong(f"{parameter.name} is said twice", parameter.start, parameter.end)
    return False


def near(word: str, words: Collection[str]) -> str:
    """`` did you mean …?``, or nothing."""
    by_lower = {each.lower(): each for each in words}
    close = difflib.get_close_matches(word.lower(), by_lower, 1, 0.6)
    return f"did you mean {by_lower[close[0]]}?" if close else ""


# --- putting together -------------------------------------------------------------------------------------------------


def escaped(value: object) -> str:
    return quote(str(value), safe="")


def user_info(user: object, password: object) -> str:
    """``user:password@``, escaped; empty without either."""
    if not user and not password:
        return ""
    return escaped(user or "") + (f":{escaped(password)}" if password else "") + "@"


def host_port(host: str, port: object = None) -> str:
    """``host:port``; an IPv6 address in brackets, a path escaped."""
    name = f"[{quote(host, safe=':')}]" if ":" in host and not host.startswith("/") else escaped(host)
    return name if port in (None, "") else f"{name}:{port}"


def query(pairs: Iterable[tuple[str, Json]]) -> str:
    """``?a=b&c=d``; lists repeat their name, true and false are words."""
    flat = [(name, one) for name, value in pairs for one in (value if isinstance(value, list) else [value])]
    said = [f"{escaped(name)}={escaped(str(one).lower() if isinstance(one, bool) else one)}" for name, one in flat]
    return f"?{'&'.join(said)}" if said else ""


# --- showing ----------------------------------------------------------------------------------------------------------


def blanked(text: str, harmless: Collection[str] = ()) -> tuple[str, Callable[[int], int]]:
    """The text without what is, or may be, secret; and where a place of the text is in that."""
    holes = _holes(text, harmless)
    shown, at = [], 0
    for start, end in holes:
        shown += [text[at:start], MASK]
        at = end
    shown.append(text[at:])

    def place(index: int) -> int:
        moved = index
        for start, end in holes:
            if index >= end:
                moved += len(MASK) - (end - start)
            elif index > start:
                moved += start - index
        return moved

    return "".join(shown), place


def _holes(text: str, harmless: Collection[str]) -> list[tuple[int, int]]:
    """Where secrets may stand: wherever the text does not have the form of what may be shown.

    Whatever the log would blank is among them, else it would move the text away from its carets.
    """
    scheme = _SCHEME.match(text)
    if scheme is None:
        return [(0, len(text))]
    start, at = scheme.end(), text.rfind("@")
    holes: list[tuple[int, int]] = []
    if at >= start:
        begin = _next(text, "&", at) if "?" in text[start:at] else at + 1
        holes.append((start, begin - (begin == at + 1)))  # the user too, as the log has it
        start = begin
    question = _next(text, "?", start)
    slash = _next(text, "/", start, question)
    if not _HOSTS.fullmatch(text, start, slash):  # perhaps the @HOST was forgotten
        holes.append((start, question))
    elif not _PATH.fullmatch(text, slash, question):
        holes.append((slash, question))
    for piece in re.finditer(r"[^&]+", text[question + 1 :]):
        begin, end = question + 1 + piece.start(), question + 1 + piece.end()
        name, equals, value = piece[0].partition("=")
        if not equals or not _NAME.fullmatch(name):
            holes.append((begin, end))
        elif name.lower() not in harmless or re.search("[#?=]", value):
            holes.append((begin + len(name) + 1, end))
    return [hole for hole in holes if hole[0] < hole[1]]


def _next(text: str, mark: str, start: int, end: int | None = None) -> int:
    """Where a mark is next, else the end."""
    stop = len(text) if end is None else end
    found = text.find(mark, start, stop)
    return stop if found < 0 else found


_WIDTH = 100


def _render(kind: str, text: str, marks: Sequence[Mark], harmless: Collection[str]) -> str:
    shown, place = blanked(text, harmless)
    lines = [f"this is no connection string of type {kind}:"]
    for mark in marks:
        lines.append(f"  {mark.message}" + (f" ({mark.hint})" if mark.hint else ""))
        if not text:
            continue
        start = min(place(mark.start), len(shown))
        end = max(place(mark.end), start + 1)
        begin = max(0, min(start - _WIDTH // 2, len(shown) - _WIDTH))
        cut = shown[begin : begin + _WIDTH]
        clean = "".join(c if c.isprintable() else "�" for c in cut)
        lines.append(f"    {clean}")
        lines.append(f"    {' ' * (start - begin)}{'^' * max(1, min(end, begin + _WIDTH) - start)}")
    return "\n".join(lines)
