"""`halfbyte doctor`."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from halfbyte.cli.render import JsonFlag, print_json, print_table

REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "numpy",
    "typer",
    "rich",
)
# extra → (packages, what it adds)
EXTRAS = {
    "offload": (("accelerate",), "device_map and max_memory: a model on several devices"),
    "gpu-cu13": (("cuda-core",), "halfbyte's own kernel on NVIDIA GPUs; gpu-cu12 where torch is built for CUDA 12"),
    "lora": (("peft",), "training of LoRA adapters on a quantized model"),
    "nf4": (("bitsandbytes", "accelerate"), "MODEL@nf4 in halfbyte compare: the 4 bits of bitsandbytes"),
    "bench": (("llama-cpp-python", "openvino", "nncf", "optimum-intel"), "the peers of benchmarks/cpu_decode.py"),
    "dev": (("ruff", "mypy", "pytest", "hypothesis", "import-linter"), "tests and checks of halfbyte itself"),
}


def command(json: JsonFlag = False) -> None:
    """Check the installation: what is there, what each extra adds and how to install it, what is wrong.

    Exits with code 2 if something needed is missing or broken. Example: halfbyte doctor
    """
    checks = [_package(name) for name in REQUIRED] + [_native(), _cpu(), _gpu(), _cache()]
    extras = [_extra(name) for name in EXTRAS]
    problems = [f"{check['what']}: {check['found']}" for check in checks if not check["ok"]]
    if json:
        print_json({"checks": checks, "extras": extras, "problems": problems})
    else:
        rows = [(check["what"], "ok" if check["ok"] else "PROBLEM", check["found"]) for check in checks]
        print_table(("what", "", "found"), rows)
        extra_rows = [(e["extra"], "yes" if e["installed"] else "no", e["adds"], e["install"]) for e in extras]
        print_table(("extra", "installed", "adds", "install with"), extra_rows)
        print("\n".join(f"problem: {problem}" for problem in problems) or "Nothing is wrong.")
    if problems:
        raise SystemExit(2)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> dict[str, Any]:
    version = _version(name)
    return {"what": name, "ok": version is not None, "found": version or f"missing: pip install {name}"}


def _extra(name: str) -> dict[str, Any]:
    packages, adds = EXTRAS[name]
    return {
        "extra": name,
        "installed": all(map(_version, packages)),
        "adds": adds,
        "install": f"pip install 'halfbyte[{name}]'  (in a clone: pip install '.[{name}]')",
    }


def _native() -> dict[str, Any]:
    try:
        from halfbyte import _native
    except ImportError as error:
        found = f"cannot be imported ({error}); reinstall with a C++17 compiler: pip install --force-reinstall ."
        return {"what": "native core", "ok": False, "found": found}
    return {
        "what": "native core",
        "ok": True,
        "found": f"tiers on this CPU: {', '.join(_native.available_tiers())}",
    }


def _cpu() -> dict[str, Any]:
    from halfbyte.device.cpu import pick_tier, thread_count
    from halfbyte.errors import HalfbyteError

    try:
        return {"what": "CPU", "ok": True, "found": f"tier {pick_tier()}, {thread_count()} threads"}
    except (HalfbyteError, ImportError) as error:
        return {"what": "CPU", "ok": False, "found": str(error)}


def _gpu() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"what": "GPU", "ok": False, "found": f"torch cannot be imported ({error})"}
    if not torch.cuda.is_available():
        built = "a CPU build of torch" if torch.version.cuda is None else "no usable NVIDIA driver or GPU"
        return {"what": "GPU", "ok": True, "found": f"none ({built}); halfbyte runs on the CPU"}
    from halfbyte.kernels.cuda_build import unavailable

    names = []
    for index in range(torch.cuda.device_count()):
        reason = unavailable(torch.device("cuda", index))
        kernel = "halfbyte's own kernel" if reason is None else f"torch's product; the CUDA kernel {reason}"
        names.append(f"{torch.cuda.get_device_name(index)} ({kernel})")
    return {"what": "GPU", "ok": True, "found": ", ".join(names)}


def _cache() -> dict[str, Any]:
    import os
    import shutil

    from halfbyte.checkpoints.cache import cache_folder

    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    state = f"{folder} (HALFBYTE_CACHE), {free / 1e9:,.1f} GB free"
    return {"what": "cache", "ok": writable, "found": state if writable else f"{state}; not writable"}
