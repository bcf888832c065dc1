"""The model card: README.md of a quantized checkpoint, with the front matter the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from halfbyte.checkpoints.reader import read_config, read_json_object
from halfbyte.checkpoints.sources import HUB_NAME
from halfbyte.errors import ConfigError
from halfbyte.quantization.report import MANIFEST_NAME

CARD_NAME = "README.md"
# quant_method of a config.json → what to call it.
LAYOUTS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "compressed-tensors": "compressed-tensors",
    "halfbyte": "halfbyte's own layout",
}


class Compared(Protocol):
    """A `halfbyte.Comparison`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""


def model_card(folder: str | Path, comparison: Compared | None = None, *, name: str | None = None) -> str:
    """Markdown with YAML front matter: what was quantized, how, with what loss, and how to run it.

    Says what the folder's config.json and manifest say. Nothing of this machine gets into it: a base model is named
    only where it has a name on the hub, or is a sample.

    Args:
        folder: a quantized checkpoint.
        comparison: of this folder with others, for perplexities and sizes; sides in other folders but the reference
            are left out.
        name: the model's; None for the folder's.

    Raises:
        ConfigError: the checkpoint is not quantized, or the comparison does not hold it.
        CheckpointError: no config.json, or a document that cannot be read.
    """
    folder = Path(folder)
    section = read_config(folder).get("quantization_config")
    if not isinstance(section, dict):
        raise ConfigError(f"{folder}: is not quantized; a model card is written for quantized checkpoints")
    manifest = read_json_object(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else {}
    base = _base_model(manifest)
    name = name or folder.resolve().name
    parts = [
        f"---\n{_front_matter(folder, section, manifest, base)}\n---",
        f"# {name}",
        _opening(section, manifest, base),
        "## How it was made",
        _table(("", ""), _facts(section, manifest)),
    ]
    if comparison is not None:
        parts += ["## What it costs", *_measured(comparison.to_dict(), folder)]
    parts += ["## How to run it", _how_to_run(name, section)]
    return "\n\n".join(parts) + "\n"


def _base_model(manifest: Mapping[str, Any]) -> str | None:
    """Its name where it has one for others."""
    model = str(manifest.get("model", ""))
    known = model.startswith("sample:") or (HUB_NAME.fullmatch(model) and not Path(model).exists())
    return model if known else None


def _front_matter(folder: Path, section: Mapping[str, Any], manifest: Mapping[str, Any], base: str | None) -> str:
    from huggingface_hub import ModelCardData

    method, made = section.get("quant_method", "awq"), _options(manifest).get("method")
    own = method == "halfbyte"
    data = ModelCardData(
        base_model=base if base and not base.startswith("sample:") else None,
        library_name="halfbyte" if own else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({"halfbyte", str(method), f"{_bits(section)}-bit", *([] if made is None else [str(made)])}),
        **_license(folder, manifest),
    )
    if data.base_model is not None:
        data["base_model_relation"] = "quantized"
    return str(data.to_yaml()).strip()


def _license(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Of the base model, from its card or this folder's, or from the licence file that came with it."""
    from huggingface_hub.repocard import metadata_load

    model = str(manifest.get("model", ""))
    for card in (folder / CARD_NAME, *([Path(model) / CARD_NAME] if model else [])):
        if card.is_file():
            data = metadata_load(card) or {}
            found = {key: str(data[key]) for key in ("license", "license_name", "license_link") if key in data}
            if found:
                return found
    text = next(iter(sorted(folder.glob("LICENSE*"))), None)
    return {} if text is None else {"license": "other", "license_name": "as-the-base-model", "license_link": text.name}


def _opening(section: Mapping[str, Any], manifest: Mapping[str, Any], base: str | None) -> str:
    what = "A model" if base is None else f"`{base}`"
    maker = "quantized with halfbyte" if manifest else "quantized"
    layout = LAYOUTS.get(str(section.get("quant_method", "awq")), str(section.get("quant_method")))
    return f"{what}, {maker} to {_bits(section)} bits and stored in {_layout_words(layout)}."


def _layout_words(layout: str) -> str:
    return layout if layout.startswith("halfbyte") else f"the {layout} layout"


def _options(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    found = manifest.get("config")
    return found if isinstance(found, Mapping) else {}


def _weights(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says inside its first group, others in the section itself."""
    groups = section.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    inside = first.get("weights") if isinstance(first, Mapping) else None
    return inside if isinstance(inside, Mapping) else section


def _bits(section: Mapping[str, Any]) -> Any:
    weights = _weights(section)
    return weights.get("bits", weights.get("num_bits", weights.get("w_bit", 4)))


def _facts(section: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    options, calibration = _options(manifest), manifest.get("calibration")
    weights = _weights(section)
    size = weights.get("group_size", weights.get("q_group_size"))
    rows = [("Bits of a weight", str(_bits(section))), ("Group size", "whole rows" if size == -1 else str(size))]
    if "method" in options:
        rows.insert(0, ("Method", f"`{options['method']}`"))
    if "bits_per_weight" in manifest:
        rows.append(("Bits with scales and zero points", f"{manifest['bits_per_weight']:.2f}"))
    skipped = section.get("modules_to_not_convert", section.get("ignore"))
    if skipped:
        rows.append(("Left in 16 bit", ", ".join(f"`{module}`" for module in skipped)))
    if isinstance(calibration, Mapping) and calibration:
        source = str(calibration.get("source", "text"))
        source = "halfbyte's built-in text" if source == "builtin" else source
        rows.append(("Calibrated on", f"{_public_name(source)}: {calibration.get('tokens', 0):,} tokens"))
        rows.append(("SHA-256 of these", f"`{calibration.get('sha256')}`"))
    elif manifest:
        rows.append(("Calibrated on", "nothing"))
    if "total_bytes_before" in manifest:
        before, after = manifest["total_bytes_before"] / 1e6, manifest["total_bytes_after"] / 1e6
        rows.append(("Size", f"{before:,.1f} MB → {after:,.1f} MB"))
    versions = manifest.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("Versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    return rows


def _public_name(text: str) -> str:
    """Of a text: a file without its folder, which is nobody's business."""
    return Path(text).name if "/" in text and Path(text).suffix else text


def _measured(comparison: Mapping[str, Any], folder: Path) -> list[str]:
    """A row for the reference, one for this folder, and what the numbers are of."""
    sides = [side for side in comparison["sides"] if side["perplexity"] is not None]
    ours = [side for side in sides if Path(side["folder"]).resolve() == folder.resolve()]
    if not ours:
        raise ConfigError(f"comparison: none of its models is {folder}; compare the original with this folder")
    reference = [side for side in sides if side["label"] == comparison["reference"] and side is not ours[0]]
    rows = [
        (what, f"{side['perplexity']['value']:.3f}", "" if side["kl"] is None else f"{side['kl']['value']:.4f}")
        for what, group in (("before", reference), ("after", ours))
        for side in group[:1]
    ]
    text = comparison["text"]
    note = f"Over {sum(text['tokens']):,} tokens of {_public_name(text['name'])}."
    if comparison["provisional"]:
        note += " A quick comparison, of few tokens."
    return [_table(("", "perplexity", "KL divergence to the original, nats"), rows), note]


def _table(columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _how_to_run(name: str, section: Mapping[str, Any]) -> str:
    method = section.get("quant_method", "awq")
    own = method == "halfbyte"
    # Of AWQ's forms vLLM reads one; a section that names none means that.
    served = not own and (method != "awq" or str(section.get("version", "gemm")).lower() == "gemm")
    asked = "" if own else ", quantization_config=halfbyte.HalfbyteConfig()"
    why = "" if own else "\n\nWithout `quantization_config`, transformers takes its own backend for this layout."
    vllm = (
        f"```sh\nvllm serve {name}\n```"
        if served
        else "vLLM does not read this layout. `halfbyte convert FOLDER OUT --format compressed-tensors` stores the "
        "same codes for it where it can, and says why where it cannot."
    )
    return f"""With halfbyte:

```python
import halfbyte

model = halfbyte.load("{name}")
print(model.generate("The history of bread", max_new_tokens=64))
```

With transformers:

```python
import halfbyte
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{asked})
```{why}

With vLLM:

{vllm}"""
