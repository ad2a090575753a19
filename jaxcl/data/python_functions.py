"""Find the Python functions of installed packages and parse them into (docstring, code).

`scan_files` reads and hashes every file, which is quick and shows whether anything has changed;
`parse_functions` does the slow part.
"""

import ast
import concurrent.futures
import gc
import hashlib
import io
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

__all__ = [
    "FileScan", "ParsedFunctions", "PythonFunction", "SourceFile", "SourceRoot",
    "functions_in_source", "installed_roots", "parse_functions", "scan_files",
]  # fmt: skip

MAX_FILE_BYTES = 1_000_000
MIN_PARAGRAPH_WORDS = 3
MIN_CODE_LINES = 3

_TEST_PART = re.compile(r"(^|_)tests?(_|$)|^conftest$")
# Paragraphs that only refer to another function, or do not describe the function.
_NOT_A_DESCRIPTION = re.compile(
    r"(see|like|same as|alias|deprecated|parameters)\b|(args?|arguments|returns?|raises):"
    r"|:param|\.\. |>>>",
    re.IGNORECASE,
)
_STDLIB_WITHOUT = frozenset({"idlelib", "lib2to3", "site-packages", "dist-packages"})
_OURSELVES = frozenset({"jaxcl"})  # or an upgrade of jaxcl would change its own training data

# Reasons for skipping a file.
UNREADABLE = "unreadable"
TOO_LARGE = "larger than 1 MB"
NULL_BYTES = "null bytes"
BAD_ENCODING = "not in its declared encoding"
BAD_SYNTAX = "syntax error"
TOO_DEEP = "nested too deeply"
CHANGED = "changed after the scan"

Progress = Callable[[int], None]
"""Called with the number of files done since the last call."""


class SourceRoot(NamedTuple):
    """A directory that is searched for Python files, with all its subdirectories.

    Attributes:
      path: the directory.
      package: the package that all its files belong to; with None, each top-level import name below
        `path` is a separate package.
      excluded: names of directories directly below `path` that are skipped.
    """

    path: Path
    package: str | None = None
    excluded: frozenset[str] = frozenset()


class SourceFile(NamedTuple):
    """A Python file: `file` is relative to its root, in posix form; `path` is absolute."""

    package: str
    file: str
    path: str
    sha256: str

    @property
    def identity(self) -> str:
        """A name for the file that does not depend on the location of its root."""
        return f"{self.package}:{self.file}"


class FileScan(NamedTuple):
    """The result of `scan_files`: sorted files, their fingerprint, and counts of skipped files."""

    files: tuple[SourceFile, ...]
    fingerprint: str
    skipped: Counter[str]


class PythonFunction(NamedTuple):
    """A documented function or method.

    `file` is relative to its root, and `path` is absolute. `line` is the line of the `def`, from 1.
    `source` is dedented, with decorators and comments but without the docstring.
    """

    package: str
    module: str
    qualified_name: str
    name: str
    file: str
    path: str
    line: int
    docstring_paragraph: str
    source: str


class ParsedFunctions(NamedTuple):
    """Functions in the order of the given files, and the number of skipped files by reason."""

    functions: list[PythonFunction]
    skipped: Counter[str]


def installed_roots() -> tuple[SourceRoot, ...]:
    """The standard library and site-packages folders of this interpreter, except jaxcl itself."""
    paths = sysconfig.get_paths()
    # A virtual environment has its own site-packages, but the standard library of its base.
    roots = [SourceRoot(Path(paths["stdlib"]), "stdlib", _STDLIB_WITHOUT)]
    site_packages = dict.fromkeys(Path(paths[k]).resolve() for k in ("purelib", "platlib"))
    packages = (SourceRoot(path, None, _OURSELVES) for path in site_packages if path.is_dir())
    return (*roots, *packages)


def scan_files(roots: Sequence[SourceRoot], *, on_progress: Progress = lambda _: None) -> FileScan:
    """Read and hash each Python file below `roots`, without parsing the files.

    Test files, hidden directories and names that cannot be imported are skipped. If two files have
    the same package and relative path, the file in the earlier root is taken.

    Returns:
      The sorted files, and one sha256 over the packages, relative paths and digests of all files,
      which does not depend on the locations of the roots.

    Raises:
      ValueError: if a root is not a directory.
    """
    files_by_name: dict[str, SourceFile] = {}
    skipped: Counter[str] = Counter()
    for root in roots:
        if not Path(root.path).is_dir():
            raise ValueError(f"the root {root.path} is not a directory; give one that exists")
        for path, relative in _python_files(root):
            package = root.package or relative.split("/")[0].removesuffix(".py")
            digest = _hash_file(path)
            if digest in (UNREADABLE, TOO_LARGE):
                skipped[digest] += 1
            else:
                file = SourceFile(package, relative, path, digest)
                files_by_name.setdefault(file.identity, file)
            on_progress(1)
    files = tuple(sorted(files_by_name.values(), key=lambda file: (file.package, file.file)))
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.identity}\0{file.sha256}\n".encode("utf-8", "surrogateescape"))
    return FileScan(files, content.hexdigest(), skipped)


def parse_functions(
    files: Sequence[SourceFile], *, num_processes: int = 1, on_progress: Progress = lambda _: None
) -> ParsedFunctions:
    """Parse files, and keep the functions that make good pairs, in the order of the files.

    Args:
      num_processes: if more than 1, the number of new interpreters that parse. They run only this
        file: nothing is forked under JAX's threads, and the caller's `__main__` is not run again.
      on_progress: called with the number of files done since the last call.
    """
    parse, size = (_parse_files, 64) if num_processes <= 1 else (_parse_in_new_process, 512)
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    functions: list[PythonFunction] = []
    skipped: Counter[str] = Counter()
    with concurrent.futures.ThreadPoolExecutor(max(1, num_processes)) as pool:
        parsed = pool.map(parse, chunks) if num_processes > 1 else map(parse, chunks)
        for chunk, result in zip(chunks, parsed, strict=True):
            functions += result.functions
            skipped += result.skipped
            on_progress(len(chunk))
    return ParsedFunctions(functions, skipped)


def functions_in_source(text: str, file: SourceFile) -> Iterator[PythonFunction]:
    """Yield the functions of one file that pass the filters, in the order of their lines.

    Raises:
      SyntaxError, ValueError, RecursionError, MemoryError: if `ast.parse` raises them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarnings about escapes in the code
        tree = ast.parse(text)
    lines = text.split("\n")  # not splitlines: ast does not count form feeds as line ends
    for prefix, node in _definitions(tree):
        if (function := _as_function(prefix, node, lines, file)) is not None:
            yield function


def _python_files(root: SourceRoot) -> Iterator[tuple[str, str]]:
    """Yield (absolute path, posix path relative to the root)."""
    top = os.path.abspath(root.path)
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if _is_searched(name) and not (folder == top and name in root.excluded)
        )
        relative = os.path.relpath(folder, top).replace(os.sep, "/")
        for name in sorted(names):
            if name.endswith(".py") and _is_searched(name.removesuffix(".py")):
                yield os.path.join(folder, name), name if relative == "." else f"{relative}/{name}"


def _is_searched(name: str) -> bool:
    return name.isidentifier() and name != "__pycache__" and not _TEST_PART.search(name)


def _hash_file(path: str) -> str:
    """The file's sha256, or the reason for skipping it."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            return TOO_LARGE if stat.S_ISREG(info.st_mode) else UNREADABLE  # a pipe would block
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest()
    except OSError:
        return UNREADABLE


def _parse_in_new_process(files: Sequence[SourceFile]) -> ParsedFunctions:
    """Parse in an interpreter that imports only the standard library."""
    command = [sys.executable, "-I", "-S", __file__]
    answer = subprocess.run(
        command, input=json.dumps(files).encode(), stdout=subprocess.PIPE, check=True
    )
    functions, skipped = json.loads(answer.stdout)
    return ParsedFunctions([PythonFunction(*values) for values in functions], Counter(skipped))


def _parse_files(files: Sequence[SourceFile]) -> ParsedFunctions:
    functions: list[PythonFunction] = []
    skipped: Counter[str] = Counter()
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles; looking for them costs a quarter of the time
    try:
        for file in files:
            result = _parse_file(file)
            if isinstance(result, str):
                skipped[result] += 1
            else:
                functions += result
    finally:
        if collecting:
            gc.enable()
    return ParsedFunctions(functions, skipped)


def _parse_file(file: SourceFile) -> list[PythonFunction] | str:
    """The functions of a file, or the reason for skipping it."""
    try:
        data = Path(file.path).read_bytes()
    except OSError:
        return UNREADABLE
    if hashlib.sha256(data).hexdigest() != file.sha256:
        return CHANGED
    if b"\0" in data:
        return NULL_BYTES
    try:
        text = _decode(data)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return BAD_ENCODING
    try:
        return list(functions_in_source(text, file))
    except (SyntaxError, ValueError):
        return BAD_SYNTAX
    except (RecursionError, MemoryError):
        return TOO_DEEP


def _decode(data: bytes) -> str:
    """Decode by the byte order mark or the coding cookie; every line ending becomes "\\n"."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    with io.TextIOWrapper(io.BytesIO(data), encoding) as stream:
        return stream.read()


_Definition = ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module) -> Iterator[tuple[str, _Definition]]:
    """Yield (prefix of the qualified name, def) in order, without defs inside functions."""
    # A stack instead of recursion, because a long chain of elif is a deep tree.
    stack: list[tuple[str, ast.AST]] = [("", node) for node in reversed(tree.body)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, _Definition):
            yield prefix, node
            continue
        if isinstance(node, ast.ClassDef):
            prefix = f"{prefix}{node.name}."
        blocks = ("body", "handlers", "orelse", "finalbody")
        inner = [child for block in blocks for child in _statements(node, block)]
        stack.extend((prefix, child) for child in reversed(inner))


def _statements(node: ast.AST, block: str) -> list[ast.AST]:
    value = getattr(node, block, None)
    return value if isinstance(value, list) else []  # a lambda's body is not a list


def _as_function(
    prefix: str, node: _Definition, lines: list[str], file: SourceFile
) -> PythonFunction | None:
    """The function, or None if a filter drops it."""
    is_dunder = node.name.startswith("__") and node.name.endswith("__")
    if is_dunder or "test" in node.name.lower() or _is_stub(node):
        return None
    paragraph = first_paragraph(ast.get_docstring(node) or "")
    if not _is_description(paragraph):
        return None
    decorators, code = _without_docstring(node, lines)
    is_code = [line.strip() and not line.lstrip().startswith("#") for line in code]
    if sum(map(bool, is_code)) < MIN_CODE_LINES:
        return None
    return PythonFunction(
        package=file.package,
        module=_module_name(file.file),
        qualified_name=prefix + node.name,
        name=node.name,
        file=file.file,
        path=file.path,
        line=node.lineno,
        docstring_paragraph=paragraph,
        source="\n".join([*decorators, *code]),
    )


def _is_stub(node: _Definition) -> bool:
    """Whether nothing but `pass`, `...` or `raise NotImplementedError` follows the docstring."""
    if len(node.body) != 2:
        return len(node.body) < 2
    statement = node.body[1]
    if isinstance(statement, ast.Raise) and statement.exc is not None:
        return ast.unparse(statement.exc).startswith("NotImplementedError")
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _is_description(paragraph: str) -> bool:
    words = len(paragraph.split())
    has_words = words >= MIN_PARAGRAPH_WORDS and paragraph.isascii()
    return has_words and not _NOT_A_DESCRIPTION.match(paragraph)


def first_paragraph(docstring: str) -> str:
    """The first paragraph of a docstring, on one line and without RST markup.

    Example:
      >>> first_paragraph("Like :meth:`~Map.get`, but\\n  raises ``KeyError``.\\n\\nMore.")
      'Like Map.get, but raises KeyError.'
    """
    paragraph = re.split(r"\n[ \t]*\n", docstring.strip(), maxsplit=1)[0]
    paragraph = re.sub(r":[a-zA-Z][\w:+-]*:`[~!]?([^`]*)`", r"\1`", paragraph)
    paragraph = re.sub(r"\s*<[^<>`]*>`_{0,2}", "", paragraph)  # a link's or a role's target
    return " ".join(paragraph.replace("`", "").split())


def _module_name(file: str) -> str:
    parts = file.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _without_docstring(node: _Definition, lines: list[str]) -> tuple[list[str], list[str]]:
    """The dedented lines of the decorators, and of the function from its `def` on."""
    docstring = node.body[0]
    first, last = docstring.lineno - 1, cast(int, docstring.end_lineno) - 1
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    # ast counts columns in UTF-8 bytes. The docstring may share lines with `def f():` or `; x = 1`.
    before = lines[first].encode()[: docstring.col_offset].decode()
    after = lines[last].encode()[docstring.end_col_offset :].decode().lstrip("; \t")
    shared = before.rstrip() if after.startswith("#") else (before + after).rstrip()
    body = lines[last + 1 : node.end_lineno]
    if not shared:
        body = list(itertools.dropwhile(lambda line: not line.strip(), body))
    def_line = lines[node.lineno - 1]
    indent = def_line[: len(def_line) - len(def_line.lstrip())]
    code = [*lines[node.lineno - 1 : first], *([shared] if shared else []), *body]
    decorators = lines[start - 1 : node.lineno - 1]
    return [d.removeprefix(indent) for d in decorators], [c.removeprefix(indent) for c in code]


if __name__ == "__main__":  # see _parse_in_new_process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback per interpreter on Ctrl-C
    sys.stdout.write(json.dumps(_parse_files([SourceFile(*f) for f in json.load(sys.stdin)])))
