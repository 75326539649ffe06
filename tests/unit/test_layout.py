"""Who may import whom, how long a file may be, what lies at the top level: read from the source, not by importing."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("grpo_ds/**/*.py"), *ROOT.glob("launch/**/*.py")])
MAX_LINES = 400

TOP_LEVEL = {
    *("README.md", "LICENSE", "setup.cfg", "pyproject.toml", ".gitignore", ".ci"),
    *("grpo_ds", "launch", "recipes", "ds_configs", "tests"),
}

# Outside library -> the files that may import it (patterns). torch is everywhere below the recipe; see TORCH_FREE.
OUTSIDE = {
    "datasets": ["grpo_ds/prompts.py"],
    "deepspeed": ["grpo_ds/actor/backend.py"],
    "httpx": ["grpo_ds/engine/http.py"],
    "jsonargparse": ["grpo_ds/recipe.py"],
    "pebble": ["grpo_ds/rewards/processes.py", "grpo_ds/rewards/scoring.py"],
    "psutil": ["grpo_ds/doctor.py"],
    "pyarrow": ["grpo_ds/prompts.py"],
    "safetensors": ["grpo_ds/actor/adapter.py", "grpo_ds/samples.py"],
    "sglang": ["grpo_ds/engine/sglang_sampler.py", "grpo_ds/engine/sglang_serve.py"],
    "tokenizers": ["grpo_ds/demo.py"],
    "torchvision": ["grpo_ds/engine/sglang_serve.py"],
    "tqdm": ["grpo_ds/runlog.py"],
    "transformers": ["grpo_ds/actor/backend.py", "grpo_ds/build.py", "grpo_ds/demo.py", "grpo_ds/engine/hf.py"],
    "vllm": ["grpo_ds/engine/serve.py", "grpo_ds/sync/receive_vllm.py"],
    "yaml": ["grpo_ds/recipe.py"],
    "torch": ["*"],
}

# Read before anything heavy: a mistake in a recipe is answered at once.
TORCH_FREE = ["grpo_ds/__init__.py", "grpo_ds/config.py", "grpo_ds/recipe.py", "grpo_ds/plugins.py"]

# Functions of their arguments: no process group, no engine, no DeepSpeed.
PURE = ["prompts", "samples", "objective", "rewards", "filters", "estimators", "losses", "batching", "types", "config"]
DEVICES = ["deepspeed", "vllm", "sglang", "httpx", "torch.distributed"]

# Stage -> what of ours it may import beside itself. A stage does not import its neighbour: the loop hands values on.
SHARED = [
    "grpo_ds.config",
    "grpo_ds.types",
    "grpo_ds.plugins",
    "grpo_ds.plugin_options",
    "grpo_ds.dist",
    "grpo_ds.peers",
    "grpo_ds.records",
    "grpo_ds.lora",
    "grpo_ds.shards",
    "grpo_ds.guarded",
]
STAGES = ["prompts", "rewards", "filters", "estimators", "losses", "batching", "engine", "actor", "sync"]
STAGE_EXCEPTIONS = {
    # Names of DeepSpeed's files are looked up as all names in a recipe are.
    "actor": ["grpo_ds.recipe"],
    # The in-process engine receives weights as a server's worker does, with the same leaf module.
    "engine": ["grpo_ds.sync.receive"],
    # The protocol of an engine, not an engine.
    "sync": ["grpo_ds.engine.base"],
    # A plan counts what the loss will divide by.
    "batching": ["grpo_ds.losses"],
}


@functools.cache
def imports(path: Path, runtime_only: bool = False) -> set[str]:
    """Dotted names of all modules a file imports, also inside functions; `from a import b` gives `a` and `a.b`."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        todo.extend(ast.iter_child_nodes(node))
    return names


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def files_of(part: str) -> list[Path]:
    """The files of a part of grpo_ds, which is a module or a package."""
    return [
        path for path in SOURCES if within(".".join(path.relative_to(ROOT).with_suffix("").parts), f"grpo_ds.{part}")
    ]


def test_the_reader_of_imports_sees_every_way_to_import(tmp_path: Path) -> None:
    path = ROOT / "grpo_ds" / "losses" / "imaginary.py"
    tree = ast.parse("from . import kl\nfrom ..types import Group\nfrom .base import x")
    found = [_absolute(path, node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert found == ["grpo_ds.losses", "grpo_ds.types", "grpo_ds.losses.base"]
    source = tmp_path / "one.py"
    source.write_text("if TYPE_CHECKING:\n    import torch\ndef f():\n    from a.b import c\n    import d.e\n")
    assert imports(source) == {"torch", "a.b", "a.b.c", "d.e"}
    assert imports(source, runtime_only=True) == {"a.b", "a.b.c", "d.e"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_outside_library_is_imported_where_the_table_says(path: Path) -> None:
    own = {"grpo_ds", "__future__"}
    outside = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - own
    for library in sorted(outside):
        allowed = OUTSIDE.get(library, [])
        assert any(fnmatch(name_of(path), pattern) for pattern in allowed), (
            f"{name_of(path)} imports {library}, which belongs to {allowed or 'no file yet'}"
        )


def test_the_table_of_libraries_names_no_file_that_does_not_exist_or_does_not_import_it() -> None:
    for library, patterns in OUTSIDE.items():
        users = [name_of(path) for path in SOURCES if any(within(module, library) for module in imports(path))]
        idle = [pattern for pattern in patterns if not any(fnmatch(user, pattern) for user in users)]
        assert not idle, f"{library} is not imported by {idle}"


def test_only_dist_and_the_weight_groups_talk_to_torch_distributed() -> None:
    users = {name_of(path) for path in SOURCES if any(within(m, "torch.distributed") for m in imports(path))}
    # The others: groups between a trainer and its engine, and between an engine's workers, which are none of the ranks'
    # business.
    engines = {"grpo_ds/sync/receive.py", "grpo_ds/sync/receive_vllm.py"}
    assert users == {"grpo_ds/dist.py", "grpo_ds/sync/group.py", *engines}


@pytest.mark.parametrize("part", PURE)
def test_pure_modules_know_no_process_group_and_no_engine(part: str) -> None:
    files = files_of(part)
    assert files, f"grpo_ds.{part} does not exist"
    for path in files:
        known = {device for device in DEVICES for module in imports(path) if within(module, device)}
        assert not known, f"{name_of(path)} imports {known}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_does_not_import_its_neighbour_or_the_loop(stage: str) -> None:
    allowed = [*SHARED, f"grpo_ds.{stage}", *STAGE_EXCEPTIONS.get(stage, [])]
    for path in files_of(stage):
        ours = {module for module in imports(path, runtime_only=True) if within(module, "grpo_ds")} - {"grpo_ds"}
        strange = sorted(module for module in ours if not any(within(module, package) for package in allowed))
        assert not strange, f"{name_of(path)} imports {strange}"


@pytest.mark.parametrize("name", ["receive.py", "receive_vllm.py", "receive_sglang.py"])
def test_what_runs_in_an_engines_processes_knows_one_leaf_file_of_ours(name: str) -> None:
    """The engine's environment may hold nothing that the rest of grpo_ds needs; the leaf itself imports none of ours."""
    ours = {module for module in imports(ROOT / "grpo_ds" / "sync" / name) if within(module, "grpo_ds")}
    leaf = "grpo_ds.sync.receive"
    assert all(within(module, leaf) for module in ours), ours
    assert bool(ours) == (name != "receive.py")


def test_nobody_imports_the_entry_points() -> None:
    entries = ("grpo_ds.train", "grpo_ds.cli")
    users = [
        name_of(path)
        for path in SOURCES
        if path.is_relative_to(ROOT / "grpo_ds") and path.name not in ("train.py", "cli.py", "selftest.py")
        for module in imports(path)
        if any(within(module, entry) for entry in entries)
    ]
    assert users == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_is_read_first_imports_no_torch_even_indirectly(name: str) -> None:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    probe = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    files = [path for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]]
    long = {name_of(path): count for path in files if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_the_top_level_holds_what_the_readme_names() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top <= TOP_LEVEL, f"not expected at the top level: {sorted(top - TOP_LEVEL)}"


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    left_out = [
        path.as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        for pattern in pytestconfig.getini("norecursedirs")
        if any(fnmatch(part, pattern) for part in path.relative_to(ROOT).parts)
    ]
    assert not left_out
