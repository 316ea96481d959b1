"""The house rules that a machine can hold: imports run one way and are declared, nothing runs a model's code."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "huarizo").rglob("*.py"))
TIERS = {
    "what can be typed": {"commands", "__main__"},
    "what is done": {"training", "inference", "results", "doctor"},
    "what it is done with": {"data", "model", "hub"},
    "what everything stands on": {
        "kernels", "plan", "events", "machine", "host", "recipe", "recipe_file", "recipe_help",
        "trainer_fields", "runs", "files", "console", "errors", "wording", "sandbox",
    },
}  # fmt: skip
"""From what stands above all to what everything stands on: a module imports from its own tier or from one below."""


def part_of(module: str) -> str:
    """The package or module of `huarizo` that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "huarizo"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_part_has_a_tier() -> None:
    parts = {part_of(module_of(file)) for file in FILES} - {""}
    assert parts == set().union(*TIERS.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    tiers = list(TIERS.values())
    tier = {part: number for number, parts in enumerate(tiers) for part in parts}
    here = part_of(module_of(file))
    for imported in imports_of(file):
        there = part_of(imported) if imported.startswith("huarizo.") else ""
        if there and here:
            assert tier[there] >= tier[here], f"{file.relative_to(ROOT)} imports {imported}"


def test_no_two_parts_import_each_other() -> None:
    """Nor do three or more in a circle: what is left when parts that import nothing else are taken away is empty."""
    needs: dict[str, set[str]] = {}
    for file in FILES:
        here = part_of(module_of(file))
        found = {part_of(imported) for imported in imports_of(file) if imported.startswith("huarizo.")}
        needs.setdefault(here, set()).update(found - {here, ""})
    while done := {part for part, others in needs.items() if not others & needs.keys()}:
        for part in done:
            del needs[part]
    assert not needs


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


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By name, of lines as pyproject.toml and requirements files have them."""
    found = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip()) and text[0] != "-"]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def packages_imported() -> set[str]:
    """The packages on PyPI whose modules `huarizo` imports, by statement or by `import_module`."""
    modules = set()
    for file in FILES:
        modules |= imports_of(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                modules |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    tops = {module.split(".")[0] for module in modules} - {"huarizo"} - sys.stdlib_module_names
    owners = importlib.metadata.packages_distributions()
    return {canonicalize_name(name) for top in tops for name in owners.get(top, [top])}


def test_what_is_imported_is_declared_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = requirements(project["dependencies"])
    extras = requirements(
        [line for name, extra in project["optional-dependencies"].items() if name != "dev" for line in extra]
    )
    client = {"httpx", "httpx2"}  # of huggingface_hub, which brings the one or the other
    of_torch = {"triton"}  # torch brings it where it is built for CUDA; int8_gpu.py works without
    assert packages_imported() - client - of_torch <= declared.keys() | extras.keys()
    assert client & requirements(importlib.metadata.requires("huggingface_hub") or []).keys()
    pins = requirements((ROOT / "requirements.txt").read_text().splitlines())
    for name, requirement in declared.items():
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), name


def test_tests_mirror_the_package() -> None:
    """tests/PART/test_MODULE.py tests huarizo/PART/MODULE.py; only tests of a whole stand for none."""
    tests = ROOT / "tests"
    for file in tests.rglob("test_*.py"):
        place = file.relative_to(tests)
        whole = place.parts[0] in ("cuda", "faults", "end_to_end", "tiers", "test_architecture.py", "test_docs.py")
        module = ROOT / "huarizo" / place.with_name(file.name.removeprefix("test_"))
        assert whole or module.is_file(), f"tests/{place} stands for no module of huarizo/{place.parent}"
