"""The house rules that a machine can hold: imports run one way, nothing unpickles, nothing runs a model's code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "huarizo").rglob("*.py"))
# from what stands above all to what everything stands on
LEVELS = [
    {"__main__"}, {"cli"}, {"cli_results"}, {"finetune", "prepare", "doctor"}, {"results", "training"}, {"model", "data"}, {"kernels"},
    {"hub", "machine", "runs"}, {"recipe", "files", "console"}, {"recipe_file"}, {"sandbox"}, {"errors", "host"}, {""},
]  # fmt: skip


def level_of(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return next(number for number, names in enumerate(LEVELS) if part in names)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "huarizo"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    package = module.split(".")[:2]
    for imported in imports_of(file):
        if imported.startswith("huarizo.") and imported.split(".")[:2] != package:
            same_level = level_of(imported) == level_of(module)
            allowed = level_of(imported) > level_of(module) or (same_level and package[1] not in LEVELS[4] | LEVELS[5])
            assert allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("file", [*FILES, ROOT / "script.py"], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_foreign_code(file: Path) -> None:
    assert not imports_of(file) & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "torch.save", "eval", "exec", "yaml.unsafe_load", "yaml.full_load"}
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_hub_and_the_machine_read_the_environment(file: Path) -> None:
    if file.parent.name == "hub" or file.name in ("host.py", "machine.py"):
        return
    text = file.read_text()
    assert "os.environ" not in text and "getenv" not in text
