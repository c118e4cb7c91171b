"""The house: who may import whom, and which file owns which foreign library.  docs/architecture.md has the picture."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dist_train", "launch", "shards")

# From the ground up: a package imports from lower layers, and from itself.
LAYERS = [
    ["dist_train.errors", "dist_train.files", "dist_train.precision", "dist_train.render"],
    ["dist_train.arguments", "dist_train.checks", "dist_train.slurm", "dist_train.hub", "dist_train.config"],
    ["shards", "dist_train.config_file", "dist_train.models", "dist_train.loss", "dist_train.distributed"],
    ["dist_train.data", "dist_train.tracking"],
    ["dist_train.training", "dist_train.compare"],
    ["dist_train.prediction", "launch"],
    ["dist_train.evaluation"],
    ["dist_train.export"],
    ["dist_train.commands", "dist_train"],
    ["dist_train.cli", "dist_train.bench"],
    ["dist_train.__main__"],
]
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}

# The one file, or files, that may import a foreign library; benches measure against what they like.
OWNERS = {
    "deepspeed": ["dist_train/training/zero.py"],
    "nvidia": ["dist_train/data/decode.py"],
    "triton": ["dist_train/loss/gpu.py"],
    "mlflow": ["dist_train/tracking/mlflow.py"],
    "submitit": ["dist_train/slurm.py"],
    "huggingface_hub": ["dist_train/hub.py"],
    "rich": ["dist_train/tracking/progress.py"],
    "tensorboard": ["dist_train/tracking/tensorboard.py"],
    "fsspec": ["dist_train/data/remote.py"],
    "pyarrow": ["shards/parquet.py"],
    "onnxruntime": ["dist_train/export/int8.py", "dist_train/export/runner.py"],
    "openvino": ["dist_train/export/openvino_runtime.py"],
    "onnx": ["dist_train/export/single_graph.py", "dist_train/export/triton_repository.py"],
    "matplotlib": ["dist_train/render/figure.py", "dist_train/evaluation/plots.py", "dist_train/compare/plots.py"],
}

BASE_OF_SHARDS = {"dist_train.errors", "dist_train.arguments", "dist_train.files", "dist_train.slurm"}


def sources():
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sources()}


def imports(path):
    """Every module that a file imports, at any depth: also inside functions, and for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def package_of(module):
    return next((r for r in sorted(LAYER, key=len, reverse=True) if module == r or module.startswith(f"{r}.")), None)


def own_imports():
    return [(name, other) for name, path in MODULES.items() for other in imports(path) if other in MODULES]


def test_every_file_is_in_a_package():
    assert [name for name in MODULES if package_of(name) is None] == []
    assert not [name for name in MODULES if name.startswith("dist_train.") and package_of(name) == "dist_train"]


def test_packages_import_from_lower_layers_only():
    wrong = [
        f"{name} imports {other}"
        for name, other in own_imports()
        if package_of(name) != package_of(other) and LAYER[package_of(other)] >= LAYER[package_of(name)]
    ]
    assert wrong == []


def test_shards_know_only_the_base_and_training_does_not_know_its_launchers():
    wrong = [
        f"{name} imports {other}"
        for name, other in own_imports()
        if (package_of(name) == "shards" and package_of(other) not in BASE_OF_SHARDS | {"shards"})
        or (
            package_of(other) == "launch"
            and package_of(name) not in ("launch", "dist_train.commands", "dist_train.bench")
        )
    ]
    assert wrong == []


def test_models_loss_and_data_do_not_know_each_other():
    apart = {"dist_train.models", "dist_train.loss", "dist_train.data"}
    crossing = {(name, other) for name, other in own_imports() if {package_of(name), package_of(other)} <= apart}
    crossing = {(a, b) for a, b in crossing if package_of(a) != package_of(b)}
    # Mixed images have two labels each, which the loss takes.
    assert crossing <= {("dist_train.data.mix", "dist_train.loss"), ("dist_train.data.pipeline", "dist_train.loss")}


def test_comparison_and_evaluation_read_a_run_through_its_folder():
    trainers = {"dist_train.training.run", "dist_train.training.trainer", "dist_train.training.engine"}
    wrong = [
        f"{name} imports {other}"
        for name, other in own_imports()
        if (package_of(name) == "dist_train.compare" and package_of(other) == "dist_train.training")
        or (package_of(name) == "dist_train.evaluation" and other in trainers)
    ]
    assert wrong == []


@pytest.mark.parametrize("library", OWNERS)
def test_a_foreign_library_has_one_door(library):
    users = [
        str(path.relative_to(ROOT))
        for path in sources()
        if "bench" not in path.parts and any(name.partition(".")[0] == library for name in imports(path))
    ]
    assert sorted(users) == sorted(OWNERS[library])


def test_files_become_whole_in_one_place():
    users = [
        str(path.relative_to(ROOT))
        for path in sources()
        if "bench" not in path.parts and any(word in path.read_text() for word in ("os.replace(", "os.fsync("))
    ]
    # remote.py keeps room for what it fetches, in drafts with a name of their own.
    assert users == ["dist_train/data/remote.py", "dist_train/files.py"]


def test_exit_codes_are_named_in_one_place():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant):
                assert node.value.value not in (75, 130), f"{path}: {node.lineno}"


def test_only_the_command_lines_print():
    speakers = {"dist_train.commands", "dist_train.cli", "dist_train.bench", "launch", "shards"}
    # A rank that ends because another one hangs has no log that anybody reads; a comparison is printed by two verbs.
    speakers |= {"dist_train.distributed.watchdog", "dist_train.compare.files"}
    speakers |= {"dist_train.export.runner"}  # a command line of its own, where it is exported
    wrong = [
        f"{name}: {node.lineno}"
        for name, path in MODULES.items()
        if package_of(name) not in speakers and name not in speakers
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert wrong == []


def test_no_library_function_takes_a_command_line():
    wrong = [
        f"{name}: {node.name}"
        for name, path in MODULES.items()
        if package_of(name) not in ("dist_train.commands", "dist_train.bench")
        and name not in ("launch.slurm", "shards.__main__")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "Namespace" in ast.unparse(node.args)
    ]
    assert wrong == []


def test_no_class_name_twice():
    names = Counter(
        node.name
        for path in (ROOT / "dist_train").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == set()


def test_files_and_functions_can_be_read():
    """At most 400 lines a file, 60 lines a function, 12 parameters."""
    long = [f"{name}: {len(path.read_text().splitlines())}" for name, path in MODULES.items()]
    assert [text for text in long if int(text.rpartition(" ")[2]) > 400] == []
    wrong = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                parameters = len(node.args.args) + len(node.args.posonlyargs)
                if node.end_lineno - node.lineno > 60 or parameters > 12:
                    wrong.append(f"{name}.{node.name}: {node.end_lineno - node.lineno} lines, {parameters} parameters")
    assert wrong == []
