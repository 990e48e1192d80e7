"""Our operators under the names of mamba_ssm and causal-conv1d, for code that imports those.

`install()` makes both packages importable. transformers and others then find them as if they had
been installed, on any device. They get the contents of `functions`, `modules`, `mamba_1`, `norms`
and `blocks`. Models of transformers get functions of `for_transformers` in place of some.
"""

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from ysnake_kernels import allocator
from ysnake_kernels.dropin import blocks, functions, norms
from ysnake_kernels.dropin.for_transformers import Models
from ysnake_kernels.dropin.mamba_1 import Mamba
from ysnake_kernels.dropin.modules import Mamba2
from ysnake_kernels.selective_scan import selective_scan

# The releases whose interfaces these are. "+ysnake" marks that they are not the real packages.
_VERSIONS = {"mamba_ssm": "2.3.0+ysnake", "causal_conv1d": "1.6.0+ysnake"}


def _named(*objects: Any, **others: Any) -> dict[str, Any]:
    return {o.__name__: o for o in objects} | others


_SCANS = _named(functions.mamba_chunk_scan_combined, functions.mamba_split_conv1d_scan_combined)
_STEP = _named(functions.selective_state_update)
_MAMBA_1 = _named(selective_scan_fn=selective_scan)
_VARLEN = _named(functions.causal_conv1d_varlen_states)
_CONVOLUTIONS = _named(functions.causal_conv1d_fn, functions.causal_conv1d_update)
_OFFERED: dict[str, dict[str, Any]] = {
    # transformers looks functions up at the root
    "mamba_ssm": {**_SCANS, **_STEP, **_MAMBA_1, **_named(Mamba, Mamba2)},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": _named(blocks.Block),
    "mamba_ssm.modules.mamba2": _named(Mamba2),
    "mamba_ssm.modules.mamba_simple": _named(Mamba),
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _MAMBA_1,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.ssd_combined": _SCANS,
    "mamba_ssm.ops.triton.selective_state_update": _STEP,
    "mamba_ssm.ops.triton.layernorm_gated": _named(
        norms.rmsnorm_fn,
        norms.layernorm_fn,
        RMSNorm=norms.GatedRMSNorm,
        LayerNorm=norms.GatedLayerNorm,
    ),
    "mamba_ssm.ops.triton.layer_norm": _named(
        norms.layer_norm_fn, norms.rms_norm_fn, norms.RMSNorm
    ),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _named(blocks.InferenceParams),
    "causal_conv1d": {**_CONVOLUTIONS, **_VARLEN},
    "causal_conv1d.causal_conv1d_interface": _CONVOLUTIONS,
    "causal_conv1d.causal_conv1d_varlen": _VARLEN,
}
_MODEL = "load its checkpoints with transformers' Mamba2ForCausalLM, or with ysnake"
_REASONS = {  # by the last part of the name
    "mamba_inner_fn": "it takes the place of a whole layer; use selective_scan_fn, or Mamba",
    **dict.fromkeys(("MambaLMHeadModel", "models", "mixer_seq_simple"), _MODEL),
}


def install(
    force: bool = False, keep_freed_memory: bool = True, fused_training: bool = False
) -> None:
    """Make `mamba_ssm` and `causal_conv1d` importable, each unless the real one is installed.

    Importing a name that they do not offer raises a ModuleNotFoundError that says so. Installing
    again changes nothing.

    Args:
        force: stand in for the real packages even where they are installed.
        keep_freed_memory: once an optimizer has made a step, set the C library's allocator to keep
            freed memory for the next one. This makes training on a CPU faster
            (`allocator.keep_freed_memory`).
        fused_training: in training, run a whole Mamba-2 mixer of transformers as one function. This
            is faster and takes less memory. The function sees only the mixer's weights. Results are
            wrong if an output projection has an adapter (LoRA) or a hook, if a batch is padded on
            the left, or if a norm comes before its gate.

    Raises:
        RuntimeError: it is too late. A model of transformers has been imported already and keeps
            the operators that it found, or a real package has been imported that `force` replaces.
    """
    wanted = [package for package in _VERSIONS if not _is_ours(package)]
    if not force:
        wanted = [package for package in wanted if find_spec(package) is None]
    for package in wanted:
        if package in sys.modules:
            raise RuntimeError(
                f"install: {package} has been imported already; call install before that import"
            )
    bound = [name for name in sys.modules if name.startswith("transformers.models.")]
    bound = [
        name for name in bound if "causal_conv1d_fn" in getattr(sys.modules[name], "__dict__", ())
    ]
    if wanted and bound:
        raise RuntimeError(
            f"install: {bound[0]} has been imported already and keeps the operators that it "
            "found then; call install before that import"
        )
    models = Models(fused_training)
    for name in _OFFERED:
        if name.partition(".")[0] in wanted:
            _add_module(name, models)
    if wanted and not any(isinstance(finder, _Refuser) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Refuser())
    if keep_freed_memory:
        allocator.keep_freed_memory_once_training()


def _is_ours(package: str) -> bool:
    return getattr(sys.modules.get(package), "__version__", None) == _VERSIONS[package]


def _add_module(name: str, models: Models) -> None:
    """Put the module into sys.modules, and into its parent, as importing it would."""
    package, _, _ = name.partition(".")
    spec = ModuleSpec(name, loader=_Loader(), origin=__file__, is_package=True)
    spec.has_location = True
    module: Any = module_from_spec(spec)
    module.__doc__ = f"Stands in for {name}; made by ysnake_kernels.dropin."
    module.__version__ = _VERSIONS[package]
    module.__all__ = list(_OFFERED[name])

    def look_up(attribute: str) -> object:
        if name == package and (special := models.offer(attribute)):
            return special
        if attribute in _OFFERED[name]:
            return _OFFERED[name][attribute]
        raise AttributeError(_not_offered(f"{name}.{attribute}"), name=attribute, obj=module)

    module.__getattr__ = look_up
    module.__dir__ = lambda: [*vars(module), *module.__all__]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _Loader(Loader):
    """Loads the modules that stand in. An import that began before `install` gets them too."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return sys.modules.get(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing is left to do."""


class _Refuser:
    """A finder on sys.meta_path that says why a name of mamba_ssm or causal_conv1d is missing.

    In `from package import name` Python hides a ModuleNotFoundError whose `name` attribute is the
    missing module. So the error carries the package's name, and Python shows its message.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package, _, rest = name.partition(".")
        if rest and package in _VERSIONS and _is_ours(package):
            raise ModuleNotFoundError(_not_offered(name), name=package)


def _not_offered(name: str) -> str:
    package, last = name.partition(".")[0], name.rpartition(".")[2]
    reason = f"; {_REASONS[last]}" if last in _REASONS else ""
    return (
        f"{name}: not offered by ysnake_kernels.dropin, which stands in for {package} here{reason}"
    )
