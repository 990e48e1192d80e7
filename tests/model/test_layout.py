"""The layout of the package: public module paths, quick imports, and which folder may use which."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from small import ROOT, environment

from ysnake.former_paths import NEW_PATHS

COMMANDS = ("train", "run", "evaluate", "serve", "export", "generate_data")
# folder -> the other folders that it may import from
MAY_IMPORT = {
    "shared": (),
    "model": ("shared",),
    "text": ("shared", "model"),
    "checkpoints": ("shared", "model", "text"),
    "inference": ("shared", "model", "text", "checkpoints"),
    "data_generation": ("shared", "text"),
    "serving": ("shared", "model", "text", "inference", "checkpoints"),
    "training": ("shared", "model", "text", "inference", "checkpoints"),
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 450, 80, 8
# Other projects fix the parameters of these, and those of classes and layers in the drop-in.
SIGNATURES_OF_PEERS = {
    *("ssd_scan", "ssd_step", "mamba_split_conv1d_scan_combined", "mamba_chunk_scan_combined"),
    *("selective_state_update", "selective_scan", "selective_scan_fn"),
    *("layer_norm_fn", "rms_norm_fn"),
}
PUBLIC = {
    "ysnake": ["__version__"],
    "ysnake.model": ["Model", "LayerState", "State", "initialise"],
    "ysnake.checkpoint": ["save", "load", "load_all", "load_tokenizer", "load_training", "resolve"],
    "ysnake.config": ["ModelConfig", "PRESETS", "InputError", "IGNORED", "model_config"],
    "ysnake.data": ["Tokens", "Batch", "split", "open_corpus", "training_windows"],
    "ysnake.decoding": ["Decoder"],
    "ysnake.generate": ["Context", "choose", "draw"],
    "ysnake.prose": ["plain", "is_refusal", "whole_sentences", "Seen"],
    "ysnake.sampling": ["Sampling"],
    "ysnake.settings": ["Settings", "parse", "read", "write"],
    "ysnake.tokenizer": ["train", "encode", "decode", "save", "load", "eot_id", "EOT"],
    **{f"ysnake.{name}": ["main"] for name in COMMANDS},
    **{f"ysnake.{name}": ["main", "Options"] for name in COMMANDS if name != "train"},
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module):
    for name in PUBLIC[module]:
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize("former", NEW_PATHS)
def test_a_former_path_gives_the_same_module(former):
    new = importlib.import_module(NEW_PATHS[former])
    assert importlib.import_module(former) is new
    assert getattr(importlib.import_module("ysnake"), former.partition(".")[2]) is new
    assert new.__spec__.name == NEW_PATHS[former]


def test_the_package_alone_imports_nothing_and_commands_no_torch():
    script = f"""
import sys
before = set(sys.modules)
import ysnake
new = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
import importlib
for name in {COMMANDS}:
    importlib.import_module(f"ysnake.{{name}}")
print(sorted(new), sorted({{"torch", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "['ysnake'] []\n", done.stderr


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder):
    files = list((ROOT / "ysnake" / folder).glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ysnake."):
                used = node.module.split(".")[1]
                assert used in (folder, *MAY_IMPORT[folder]), f"{file.name}: {node.module}"


def test_every_folder_is_listed():
    folders = {path.parent.name for path in (ROOT / "ysnake").glob("*/__init__.py")}
    assert folders == MAY_IMPORT.keys()


def imported(file):
    """What a module imports while it runs, as names of modules or of things in them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            for alias in node.names:
                yield node.module, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("package", ["ysnake", "kernels/ysnake_kernels"])
def test_no_modules_import_each_other(package):
    """Also not inside functions."""
    root = (ROOT / package).parent
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {
        name: {inside if inside in files else module for module, inside in imported(path)} - {name}
        for name, path in files.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) > 50


def test_files_and_functions_are_short():
    files = [*(ROOT / "ysnake").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 150
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST_FILE, file
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            where = f"{file}:{node.lineno} {node.name}"
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, where
            if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                continue  # a kernel takes the strides of its tensors one by one
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            names += [a.arg for a in node.args.kwonlyargs]
            of_a_peer = node.name in SIGNATURES_OF_PEERS or (
                "dropin" in file.parts and node.name in ("__init__", "forward")
            )
            assert of_a_peer or len(set(names) - {"self", "cls"}) <= MOST_PARAMETERS, where
