"""The functions that are found, the text that is kept, and the files that are skipped."""

import ast
import gc
import json
import os
import sysconfig
import textwrap
import warnings
from pathlib import Path

import pytest

from jaxcl.data import python_functions
from jaxcl.data.python_functions import (
    SourceFile,
    SourceRoot,
    first_paragraph,
    functions_in_source,
    installed_roots,
    parse_functions,
    scan_files,
)

FILE = SourceFile("tools", "tools/words.py", "/somewhere/tools/words.py", "")

GOOD = '''\
def {name}(text):
    """Counts the {name} words."""
    words = text.split()
    return len(words)
'''


STUB = 'def f(\n    a,\n):\n    """Counts the words."""\n    {body}\n'


def find(source: str) -> list:
    return list(functions_in_source(textwrap.dedent(source), FILE))


def names(source: str) -> list[str]:
    return [function.qualified_name for function in find(source)]


def write_files(root: Path, files: dict[str, str | bytes]) -> SourceRoot:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return SourceRoot(root)


def scan_and_parse(root: SourceRoot):
    scan = scan_files([root])
    functions, skipped = parse_functions(scan.files)
    return [function.name for function in functions], dict(scan.skipped + skipped)


def test_a_function_is_found_with_its_parts():
    [found] = find(
        '''
        class Outer:
            class Inner:
                @property
                def size(self):
                    """Returns how many
                    words there are.

                    More of it.
                    """

                    # counts spaces
                    words = self.text.split()
                    return len(words)
        '''
    )
    assert found.source.split("\n") == [
        "@property",
        "def size(self):",
        "    # counts spaces",
        "    words = self.text.split()",
        "    return len(words)",
    ]
    assert found.docstring_paragraph == "Returns how many words there are."
    assert (found.qualified_name, found.name) == ("Outer.Inner.size", "size")
    assert (found.package, found.module) == ("tools", "tools.words")
    assert (found.file, found.path) == ("tools/words.py", "/somewhere/tools/words.py")
    assert found.line == 5  # the line of `def`; the first line is empty


def test_functions_under_if_try_and_with_are_found_but_not_those_inside_functions():
    source = "import os\nif os.name:\n" + textwrap.indent(GOOD.format(name="in_if"), "    ")
    source += "else:\n" + textwrap.indent(GOOD.format(name="in_else"), "    ")
    source += "try:\n" + textwrap.indent(GOOD.format(name="in_try"), "    ")
    source += "except OSError:\n" + textwrap.indent(GOOD.format(name="in_except"), "    ")
    source += "with os:\n" + textwrap.indent(GOOD.format(name="in_with"), "    ")
    source += "async " + GOOD.format(name="in_async")
    source += "def plain():\n" + textwrap.indent(GOOD.format(name="in_def"), "    ")
    assert names(source) == ["in_if", "in_else", "in_try", "in_except", "in_with", "in_async"]


@pytest.mark.parametrize(
    ("reason", "source"),
    [
        ("a dunder", GOOD.replace("{name}", "__len__", 1)),
        ("a test", GOOD.replace("{name}", "check_Tests", 1)),
        ("two words", GOOD.replace("Counts the {name} words.", "Counts words.")),
        ("not ASCII", GOOD.replace("Counts", "Zählt")),
        ("two lines of code", GOOD.replace("    words = text.split()\n", "")),
        ("comments are no code", GOOD.replace("    words = text.split()\n", "    # split\n")),
        ("only a docstring", 'def f(\n    a,\n    b,\n    c,\n):\n    """Counts the words."""\n'),
        ("a stub", STUB.format(body="raise NotImplementedError(a)")),
        ("an empty body", STUB.format(body="pass")),
        ("no docstring", "def f(text):\n    a = 1\n    b = 2\n    return a + b\n"),
        ("a reference", GOOD.replace("Counts the", "Like :func:`count` for")),
        ("a section", GOOD.replace("Counts the", "Args: text: the")),
        ("a directive", GOOD.replace("Counts the", ".. deprecated:: 1.2 the")),
    ],
)
def test_a_filter_drops(reason, source):
    assert names(GOOD.format(name="kept")) == ["kept"]
    assert names(source.replace("{name}", "kept")) == [], reason


def test_a_body_of_one_statement_is_not_a_stub_by_itself():
    assert names(STUB.format(body="return a")) == ["f"]
    assert names(STUB.format(body="raise ValueError(a)")) == ["f"]


def test_only_the_first_paragraph_must_be_ascii():
    assert names(GOOD.format(name="kept").replace('words."""', 'words.\n\n    Zählt."""')) == [
        "kept"
    ]


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("Like :meth:`~Map.get`, but\n  ``fast``.\n\nMore.", "Like Map.get, but fast."),
        ("See :py:class:`the map <pkg.Map>` first.", "See the map first."),
        ("From `the paper <https://x.org>`_ of 1999.", "From the paper of 1999."),
        ("If a < b and b > c then.\n \t\nMore.", "If a < b and b > c then."),
    ],
)
def test_markup_is_stripped_from_the_first_paragraph(docstring, paragraph):
    assert first_paragraph(docstring) == paragraph


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): 'Adds some things.'; a = 1; \\\n  b = 2; \\\n  return a", "def f(): a = 1; \\"),
        ("def f():\n  'Adds some things.'  # noqa\n  a = 1\n  return a", "def f():"),
        ("def f():\n  ('Adds some '\n   'things.')\n  a = 1\n  return a", "def f():"),
        ("def f(é='é'): 'Adds some things.'; a = 1; \\\n  b = 2; \\\n  return a", "def f(é='é'):"),
    ],
)
def test_a_docstring_is_removed_completely(source, expected):
    [found] = find(source)
    assert "things" not in found.source
    assert found.source.startswith(expected)
    assert "noqa" not in found.source
    compile(found.source, "found", "exec")


def test_a_form_feed_does_not_shift_the_lines():
    [found] = find("a = 1\n\x0c\n" + GOOD.format(name="count"))
    assert found.source.startswith("def count(text):\n    words")
    assert found.line == 3


def test_a_long_elif_chain_is_walked_without_recursion():
    chain = "if a == 0:\n    pass\n" + "".join(f"elif a == {i}:\n    pass\n" for i in range(400))
    assert names(chain + "else:\n" + textwrap.indent(GOOD.format(name="last"), "    ")) == ["last"]


def test_pipes_and_devices_are_passed_over(tmp_path):
    root = write_files(tmp_path, {"package/sound.py": "x = 1\n"})
    os.mkfifo(tmp_path / "package" / "pipe.py")
    (tmp_path / "package" / "endless.py").symlink_to("/dev/zero")
    scan = python_functions.scan_files([root])
    assert [file.file for file in scan.files] == ["package/sound.py"]
    assert scan.skipped == {python_functions.UNREADABLE: 2}


def test_unusable_files_are_skipped_and_counted(tmp_path):
    good = GOOD.format(name="count")
    root = write_files(
        tmp_path,
        {
            "pkg/good.py": good,
            "pkg/broken.py": "def broken(:\n" + good,
            "pkg/null.py": good + "\0",
            "pkg/deep.py": "a = " + "-" * 200_000 + "1\n" + good,
            "pkg/huge.py": good + "#" * 1_000_001,
            "pkg/cookie.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n"
            + GOOD.format(name="latin").encode(),
            "pkg/no_cookie.py": b"name = '\xe9'\n" + good.encode(),
            "pkg/odd_cookie.py": b"# coding: no-such-code\n" + good.encode(),
            "pkg/bom.py": b"\xef\xbb\xbf" + GOOD.format(name="marked").encode(),
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "pkg" / "dangling.py")
    assert scan_and_parse(root) == (
        ["marked", "latin", "count"],  # sorted by file name
        {
            python_functions.BAD_SYNTAX: 1,
            python_functions.NULL_BYTES: 1,
            python_functions.TOO_DEEP: 1,
            python_functions.TOO_LARGE: 1,
            python_functions.BAD_ENCODING: 2,
            python_functions.UNREADABLE: 1,
        },
    )


def test_test_files_hidden_directories_and_unimportable_names_are_passed_over(tmp_path):
    good = GOOD.format(name="count")
    passed_over = [
        "pkg/tests/words.py",
        "pkg/_test/words.py",
        "pkg/test_words.py",
        "pkg/words_test.py",
        "pkg/conftest.py",
        "pkg/.hidden/words.py",
        "pkg/__pycache__/words.py",
        "pkg-1.0.dist-info/words.py",
        "pkg/not-a-name.py",
    ]
    root = write_files(tmp_path, dict.fromkeys([*passed_over, "pkg/contest.py", "solo.py"], good))
    scan = scan_files([root])
    assert [(file.package, file.file) for file in scan.files] == [
        ("pkg", "pkg/contest.py"),
        ("solo", "solo.py"),
    ]


def test_a_root_can_be_one_package_without_some_directories(tmp_path):
    good = GOOD.format(name="count")
    write_files(tmp_path, dict.fromkeys(["a.py", "lib/b.py", "old/c.py", "lib/old/d.py"], good))
    scan = scan_files([SourceRoot(tmp_path, "base", frozenset({"old"}))])
    assert [(f.package, f.file) for f in scan.files] == [
        ("base", "a.py"),
        ("base", "lib/b.py"),
        ("base", "lib/old/d.py"),
    ]


def test_the_fingerprint_depends_on_content_and_relative_names_alone(tmp_path):
    files = {"pkg/a.py": GOOD.format(name="one"), "pkg/b.py": GOOD.format(name="two")}
    here = scan_files([write_files(tmp_path / "here", files)])
    there = scan_files([write_files(tmp_path / "there", dict(reversed(files.items())))])
    renamed = {"pkg/a.py": files["pkg/a.py"], "pkg/c.py": files["pkg/b.py"]}
    changed = files | {"pkg/b.py": GOOD.format(name="six")}
    others = [
        scan_files([write_files(tmp_path / str(i), f)]) for i, f in enumerate([renamed, changed])
    ]
    assert here.fingerprint == there.fingerprint
    assert len({here.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_the_earlier_root_wins(tmp_path):
    first = write_files(tmp_path / "1", {"pkg/a.py": GOOD.format(name="first")})
    second = write_files(tmp_path / "2", {"pkg/a.py": GOOD.format(name="second")})
    functions, _ = parse_functions(scan_files([first, second]).files)
    assert [function.name for function in functions] == ["first"]


def test_a_file_changed_after_the_scan_is_noticed(tmp_path):
    root = write_files(tmp_path, {"pkg/a.py": GOOD.format(name="one")})
    scan = scan_files([root])
    write_files(tmp_path, {"pkg/a.py": GOOD.format(name="two")})
    functions, skipped = parse_functions(scan.files)
    assert not functions
    assert skipped == {python_functions.CHANGED: 1}


def test_new_processes_find_the_same(tmp_path):
    files = {f"pkg/f{i:04}.py": GOOD.format(name=f"count_{i}") for i in range(600)}
    scan = scan_files([write_files(tmp_path, files | {"pkg/broken.py": "("})])
    done: list[int] = []
    serial = parse_functions(scan.files)
    assert parse_functions(scan.files, num_processes=2, on_progress=done.append) == serial
    assert len(serial.functions) == 600
    assert gc.isenabled()  # off while files are parsed
    assert sum(done) == 601


def test_warnings_about_other_peoples_code_are_silenced():
    source = "pattern = '\\d'\n" + GOOD.format(name="count")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(source) == ["count"]
        with pytest.raises(SyntaxError, match="invalid escape"):  # Python's form of that error
            ast.parse(source)


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a directory"):
        scan_files([SourceRoot(tmp_path / "nowhere")])


def test_the_interpreters_own_json_package_is_found():
    [stdlib] = [root for root in installed_roots() if root.package == "stdlib"]
    assert Path(sysconfig.get_paths()["purelib"]).resolve() in [r.path for r in installed_roots()]
    assert all("jaxcl" in r.excluded for r in installed_roots() if r.package is None)
    scan = scan_files([SourceRoot(stdlib.path / "json", "json")])
    functions, skipped = parse_functions(scan.files)
    found = {function.qualified_name: function for function in functions}
    assert not skipped
    assert Path(found["dumps"].path) == Path(json.__file__)
    assert found["dumps"].docstring_paragraph == "Serialize obj to a JSON formatted str."
    assert found["JSONEncoder.iterencode"].module == "encoder"
