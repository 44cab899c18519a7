"""Globs: which files below a folder one matches, and into which folders a walk has to go to find them."""

import functools
import re
from dataclasses import dataclass
from urllib.parse import unquote

# What `**` between two strokes of a path stands for.
ANY_FOLDERS = r"(?:[^/.][^/]*/)*"
# `*`, `?` and `[` as they are written in a URI if they are signs of a name and no wildcards.
ESCAPED_WILDCARDS = re.compile("%(?:2A|3F|5B)", re.IGNORECASE)


@dataclass(frozen=True)
class Glob:
    """A pattern of paths below a folder, as a shell knows it: `*`, `?`, `[...]`, and `**` for any number of folders.

    A name that begins with a dot is matched only by a part of the pattern that begins with one.
    """

    pattern: str

    @property
    def is_endless(self) -> bool:
        """Whether it matches in folders of any depth."""
        return "**" in self.pattern.split("/")

    @property
    def is_deep(self) -> bool:
        """Whether it matches in folders below, and not only in the first one."""
        return "/" in self.pattern or self.is_endless

    def matches(self, path: bytes) -> bool:
        """Tell whether it matches a file; `path` is below the folder, as the file system holds it."""
        return self._files.fullmatch(path) is not None

    def enters(self, folder: bytes) -> bool:
        """Tell whether it may match files below a folder, whose path is of the same kind."""
        return self._folders.fullmatch(folder + b"/") is not None

    @functools.cached_property
    def _files(self) -> re.Pattern[bytes]:
        return re.compile(glob_regex(self.pattern).encode("utf-8", "surrogateescape"))

    @functools.cached_property
    def _folders(self) -> re.Pattern[bytes]:
        return re.compile(folders_regex(self.pattern).encode("utf-8", "surrogateescape"))


ALL_BELOW = Glob("**")
"""Every file in a folder and below it."""


def unescaped(name: str) -> str:
    """Return a name of a URI as the file system holds it: `%20` stands for a blank."""
    return unquote(name, errors="surrogateescape")


def glob_of_uri(pattern: str) -> Glob:
    """Return the glob that a URI holds, whose names are escaped as `unescaped` says."""
    return Glob(unescaped(ESCAPED_WILDCARDS.sub(lambda found: f"[{unquote(found[0])}]", pattern)))


def glob_regex(pattern: str) -> str:
    """Return the regular expression of the paths that a glob matches."""
    expressions = []
    *folders, last = pattern.split("/")
    for part in folders:
        expressions.append(ANY_FOLDERS if part == "**" else name_regex(part) + "/")
    return "".join(expressions) + (ANY_FOLDERS + name_regex("*") if last == "**" else name_regex(last))


def folders_regex(pattern: str) -> str:
    """Return the regular expression of the folders, each with a stroke at its end, below which a glob may match."""
    *folders, last = pattern.split("/")
    expression = ANY_FOLDERS if last == "**" else ""
    for part in reversed(folders):
        expression = ANY_FOLDERS + expression if part == "**" else f"(?:{name_regex(part)}/{expression})?"
    return expression


def name_regex(part: str) -> str:
    """Return the regular expression of the names that one part of a glob matches."""
    pieces = re.findall(r"\[!?\]?[^\]]*\]|.", part, flags=re.DOTALL)
    return ("" if part.startswith(".") else r"(?!\.)") + "".join(map(piece_regex, pieces))


def piece_regex(piece: str) -> str:
    """Return the regular expression of one sign of a glob, or of one class of signs in brackets."""
    if piece in ("*", "?"):
        return "[^/]*" if piece == "*" else "[^/]"
    if len(piece) > 2 and piece.startswith("["):
        signs = re.sub(r"([\\\[\]^&~|])", r"\\\1", piece[1:-1].removeprefix("!"))
        return f"[{'^' if piece.startswith('[!') else ''}{signs}]"
    return re.escape(piece)
