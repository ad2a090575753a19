"""Imports point down, and the library has few dependencies, for use in any training loop."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxcl"

# The folders and modules of jaxcl on each floor, from the bottom up. A module may import modules of
# its own floor and of lower ones.
FLOORS = dict(
    enumerate(
        [
            ("typing",),
            ("losses", "negatives", "assignment", "ops", "grad_cache", "metrics"),
            ("host",),
            ("models",),
            ("settings", "configs"),
            ("data",),
            ("cost",),
            ("step",),
            ("run",),
            ("evaluation",),
            (
                "train",
                "search",
                "mine",
                "topics",
                "compare",
                "plan",
                "check_grad",
                "export",
                "embed",
                "evaluate",
                "bench",
            ),
            ("__main__",),
        ]
    )
)
LIBRARY = FLOORS[1]
ALLOWED_IN_LIBRARY = {"jax", "jaxtyping", "numpy", "scipy", "jaxcl"} | set(sys.stdlib_module_names)
HEAVY = ("flax", "optax", "orbax", "absl", "ml_collections", "tensorflow_datasets", "grain", "rich")


def test_every_part_has_a_floor():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} == {
        part for parts in FLOORS.values() for part in parts
    }


def test_imports_point_down():
    assert upward_imports(PACKAGE) == []


def test_an_import_that_points_up_is_seen(tmp_path):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "softmax.py").write_text("from jaxcl.data import loader\n")
    (tmp_path / "metrics.py").write_text("def f():\n    import jaxcl.settings\n")
    assert upward_imports(tmp_path) == [
        "losses/softmax.py imports jaxcl.data",
        "metrics.py imports jaxcl.settings",
    ]


def test_the_library_imports_little():
    assert foreign_imports(PACKAGE) == []


def test_a_foreign_import_is_seen(tmp_path):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "softmax.py").write_text("import optax\nfrom flax import nnx\n")
    assert foreign_imports(tmp_path) == [
        "losses/softmax.py imports flax",
        "losses/softmax.py imports optax",
    ]


COMMANDS = {"train", "search", "mine", "topics", "compare", "plan", "check_grad", "export"}
COMMANDS |= {"embed", "evaluate"}
ROOT = COMMANDS | {"__init__", "__main__", "typing", "metrics", "grad_cache"}
READERS = COMMANDS | {"settings", "configs", "bench"}


def test_the_root_holds_the_commands_and_five_files():
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ROOT


def test_only_commands_and_settings_know_of_configs():
    """Code below the commands receives checked settings, never a ConfigDict."""
    assert config_readers(PACKAGE) == []


def test_a_config_below_the_commands_is_seen(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "build.py").write_text("from ml_collections import ConfigDict\n")
    (tmp_path / "train.py").write_text("from ml_collections import ConfigDict\n")
    assert config_readers(tmp_path) == ["run/build.py"]


def test_no_module_is_too_long():
    assert too_long(PACKAGE) == []


def test_a_long_module_is_seen(tmp_path):
    (tmp_path / "short.py").write_text("x = 1\n" * 400)
    (tmp_path / "long.py").write_text("x = 1\n" * 401)
    assert too_long(tmp_path) == ["long.py: 401 lines"]


def test_no_function_is_too_long():
    assert long_functions(PACKAGE) == []


def test_a_long_function_is_seen(tmp_path):
    for name, lines in {"short": 60, "long": 61}.items():
        body = "    x = 1\n" * lines
        text = f'def {name}():\n    """Do a lot.\n\n    At length.\n    """\n{body}'
        (tmp_path / f"{name}.py").write_text(text)
    assert long_functions(tmp_path) == ["long.py: long has 61 lines"]


def test_a_fresh_interpreter_loads_nothing_heavy_for_the_library():
    everything = ", ".join(["jaxcl", *(f"jaxcl.{part}" for part in LIBRARY)])
    assert heavy_modules_after(f"import {everything}") == []


def test_a_heavy_module_would_be_seen():
    assert heavy_modules_after("import jaxcl.losses, optax") != []


def upward_imports(package):
    floor_of = {part: floor for floor, parts in FLOORS.items() for part in parts}
    return [
        f"{path.relative_to(package)} imports jaxcl.{part}"
        for path in sorted(package.rglob("*.py"))
        for part in sorted(parts_imported(path))
        if (own := floor_of.get(path.relative_to(package).parts[0].removesuffix(".py"))) is not None
        and floor_of[part] > own
    ]


def foreign_imports(package):
    return [
        f"{path.relative_to(package)} imports {name}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0].removesuffix(".py") in LIBRARY
        for name in sorted({module.split(".")[0] for module in modules_imported(path)})
        if name not in ALLOWED_IN_LIBRARY
    ]


def config_readers(package):
    return [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0].removesuffix(".py") not in READERS
        and any(module.split(".")[0] == "ml_collections" for module in modules_imported(path))
    ]


def long_functions(package: Path) -> list[str]:
    """Functions with more than 60 lines after the docstring."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                if lines > 60:
                    found.append(f"{path.relative_to(package)}: {node.name} has {lines} lines")
    return found


def too_long(package):
    lines = {
        path.relative_to(package): path.read_text().count("\n") for path in package.rglob("*.py")
    }
    return [
        f"{path}: {count} lines"
        for path, count in sorted(lines.items())
        if count > (700 if path.parts[:2] == ("ops", "pairs") else 400)
    ]


def parts_imported(path):
    modules = [module.split(".") for module in modules_imported(path)]
    return {names[1] for names in modules if names[0] == "jaxcl" and len(names) > 1}


def modules_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "jaxcl"
            )


def heavy_modules_after(statement):
    program = f"{statement}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return ast.literal_eval(result.stdout)
