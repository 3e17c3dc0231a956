"""The house: imports run one way, the library needs no recipes and no extras, functions stay short."""

import ast
import functools
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ofadiff.old_paths import MOVED

ROOT = Path(__file__).parents[1]

# The rooms, each of which may import from those before it. What stands in one line may not import from each other.
ORDER = [
    {"reading"},
    {"options", "old_paths", "dtypes", "values", "diffusers_hooks"},
    {"channels", "sizes"},
    {"size_schedule", "quantized", "basis"},
    {"layers"},
    {"storage", "cutting"},
    {"recordings"},
    {"verification"},
    {"unet_elastic", "stand_ins", "adapters"},
    {"extraction"},
    {"supernet_state"},
    {"supernet_model"},
    {"supernet"},
    {"noise"},
    {"denoisers"},
    {"profiling", "importance", "correction"},
    {"allocation"},
    {"architectures", "data", "reweight"},
    {"training", "pipelines"},
    {"evaluation"},
    {"page", "runs"},
    {"commands"},
    {"", "__main__"},
]

# Longest function of the library, in lines, and how many parameters one may have.
LONGEST, PARAMETERS = 80, 12


@functools.cache
def modules():
    """Name and syntax tree of every module."""
    found = []
    for path in sorted((ROOT / "ofadiff").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


@functools.cache
def imports():
    """What each module imports of the library: late imports and those for type checkers alone as well."""
    trees = dict(modules())
    found = {}
    for name, tree in trees.items():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ofadiff":
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {each if each in trees else node.module for each in wanted}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name in trees}
        found[name] = imported - {name}
    return found


def test_no_module_imports_itself_through_others():
    list(TopologicalSorter(imports()).static_order())


def test_rooms_import_from_those_before_them_only():
    rank = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    room_of = {name: name.split(".")[1] if "." in name else "" for name in imports()}
    assert set(room_of.values()) == rank.keys()
    wrong = [
        (name, other)
        for name, others in imports().items()
        for other in others
        if room_of[name] != room_of[other] and not (rank[room_of[other]] < rank[room_of[name]] or other == "ofadiff")
    ]
    assert not wrong
    assert not [name for name, others in imports().items() if "ofadiff" in others]


def test_the_library_knows_nothing_of_recipes():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("recipes", "compression_run"), name
            if isinstance(node, ast.Raise):  # errors name commands, not files of a checkout
                assert "recipes/" not in ast.unparse(node), name


def test_functions_are_short_and_take_few_arguments():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert len(arguments) <= PARAMETERS, (name, node.name)
                assert node.end_lineno - node.lineno < LONGEST, (name, node.name)


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert path.name == "demo.py" or len(path.read_text(encoding="utf-8").splitlines()) <= 150, path.name


# What follows finds some packages not installed.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({missing!r})); "
EXTRAS = {"datasets", "transformers", "peft", "matplotlib", "torch_fidelity", "skimage", "jinja2", "sklearn", "gradio"}


@pytest.mark.slow
def test_no_extra_is_needed_to_import_the_library_and_its_commands():
    code = WITHOUT.format(missing=EXTRAS) + "import ofadiff, ofadiff.commands.app, ofadiff.runs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_everything_that_is_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [each for extra in project["optional-dependencies"].values() for each in extra] + project["dependencies"]
    names = {entry.split(">")[0].split("[")[0].lower().replace("_", "-") for entry in declared}
    distributions = packages_distributions()
    known = sys.stdlib_module_names | {"ofadiff", "bitsandbytes"}  # the latter is asked for by a flag and needs a GPU
    for name, tree in modules():
        for node in ast.walk(tree):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for root in {root.split(".")[0] for root in roots} - known:
                owners = {owner.lower().replace("_", "-") for owner in distributions[root]}
                assert owners & names, f"{name} imports {root}"


@pytest.mark.parametrize("name", MOVED)
def test_modules_that_moved_are_found_under_their_old_names(name):
    old = importlib.import_module(name)
    first = importlib.import_module(f"ofadiff.{MOVED[name][0]}")
    own = {each for each in vars(first) if not each.startswith("__")}
    assert own and all(vars(old)[each] is vars(first)[each] for each in own)


@pytest.mark.slow
def test_a_module_that_moved_is_an_attribute_too():
    code = "import ofadiff; ofadiff.cost.latency_table; ofadiff.size_adapter.SizeAdapter; ofadiff.profiling.count_macs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_names_of_the_documentation_are_found_where_they_were():
    from ofadiff.cost import latency_table
    from ofadiff.inputs import INPUTS, example_inputs
    from ofadiff.size_adapter import SizeAdapter
    from ofadiff.training.families import FAMILIES
    from ofadiff.unet_elastic import FINDERS, verify_groups

    assert all(map(callable, (latency_table, example_inputs, SizeAdapter, verify_groups)))
    assert len(FINDERS) > 50 and set(FAMILIES) >= {"StableDiffusionPipeline", "FluxPipeline"}
    assert {"UNet2DModel", "WanTransformer3DModel"} <= set(INPUTS)
