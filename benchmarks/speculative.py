"""Claim: a draft makes decoding faster without changing what is decoded.

    python benchmarks/speculative.py --data ../shared/data --draft smollm2-4bit --target-4bit smollm2-4bit

Two targets, three kinds of text, each prompt without and with the draft in turn:

    bf16    the sample model in 16 bits, its 4-bit copy as the draft, at temperature 0 and 1: the first 64 tokens of 20
            articles of the WikiText-2 test text, 128 new tokens each
    edits   the 4-bit model, n-grams as the draft: ten paragraphs to say again with a word replaced
            (prompts/edits.jsonl)
    prose   the same model and draft on the articles, where there is little to copy

Medians and the worst prompt. Outputs that end in a loop (16 tokens three times within the last 64) are left out and
counted: they flatter drafts. `predicted` is what the tokens a pass and the measured cost of draft, check and sampler
make of the plain step. Prints tables, then one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from halfbyte.cli.render import print_table
from halfbyte.device.cpu import cpu_info, thread_count
from halfbyte.evaluation.speculation import SpeculationSpeed, article_openings, measure_speculation
from halfbyte.generation.model import Model, load

EDITS = Path(__file__).parent / "prompts" / "edits.jsonl"
ARTICLES, PROMPT_TOKENS, NEW_TOKENS = 20, 64, 128


def openings(model: Model, data: Path, count: int) -> list[str]:
    text = (data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    return [model.tokenizer.decode(model.encode(one)[:PROMPT_TOKENS]) for one in article_openings(text, count)]


def edits() -> list[str]:
    prompts = []
    for line in EDITS.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        opening = " ".join(one["text"].replace(one["replace"], one["by"]).split()[:8])
        prompts.append(
            f'Here is a text:\n\n{one["text"]}\n\nHere is the same text, with "{one["replace"]}" replaced by '
            f'"{one["by"]}" everywhere and nothing else changed:\n\n{opening}'
        )
    return prompts


def summary(name: str, found: Sequence[SpeculationSpeed]) -> tuple[dict[str, Any], Sequence[str]]:
    kept = [one for one in found if not one.loops]
    document: dict[str, Any] = {"name": name, "prompts": len(found), "loops": len(found) - len(kept)}
    document["each"] = [
        {**asdict(one), "speed_up": one.speed_up, "predicted": one.predicted, "sampler_share": one.sampler_share}
        for one in found
    ]
    if not kept:
        return document, (name, str(len(found)), str(len(found)), *["—"] * 8)
    drafted = sum(one.counters.drafted for one in kept)
    document |= {
        "speed_up": median(one.speed_up for one in kept),
        "worst": min(one.speed_up for one in kept),
        "total_ratio": median(one.total_ratio for one in kept),
        "predicted": median(one.predicted or 1.0 for one in kept),
        "acceptance_rate": sum(one.counters.accepted for one in kept) / drafted if drafted else None,
        "tokens_per_pass": fmean(one.counters.tokens_per_pass or 1.0 for one in kept),
        "plain_tokens_per_second": median(1 / one.plain_seconds_per_token for one in kept),
        "sampler_share": median(one.sampler_share for one in kept),
        "same_tokens": sum(one.same_tokens for one in kept),
    }
    rate = document["acceptance_rate"]
    row = (
        name,
        str(len(found)),
        str(document["loops"]),
        f"{document['plain_tokens_per_second']:.1f}",
        f"{document['speed_up']:.2f}",
        f"{document['worst']:.2f}",
        f"{document['predicted']:.2f}",
        f"{document['total_ratio']:.2f}",
        "—" if rate is None else f"{rate:.2f}",
        f"{document['tokens_per_pass']:.2f}",
        f"{document['sampler_share']:.1%}",
        f"{document['same_tokens']} of {len(kept)}",
    )
    return document, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2_raw_test.txt")
    parser.add_argument("--model", default="sample:smollm2-135m", help="the 16-bit target")
    parser.add_argument("--draft", default="int4", help="its draft: int4, or a 4-bit copy")
    parser.add_argument("--target-4bit", help="the 4-bit target of `edits` and `prose`; without it they are left out")
    parser.add_argument("--draft-length", default="auto")
    parser.add_argument("--articles", type=int, default=ARTICLES)
    parser.add_argument("--rounds", type=int, default=1, help="of each prompt; the faster of each kind counts")
    options = parser.parse_args()
    length: Any = options.draft_length if options.draft_length == "auto" else int(options.draft_length)
    common: dict[str, Any] = {"draft_length": length, "max_new_tokens": NEW_TOKENS, "rounds": options.rounds}
    runs: list[tuple[str, list[SpeculationSpeed]]] = []
    target = load(options.model)
    prompts = openings(target, options.data, options.articles)
    target.generate(prompts[0], max_new_tokens=8, draft=options.draft)  # the copy is made before anything is timed
    for temperature in (0.0, 1.0):
        found = list(measure_speculation(target, prompts, options.draft, temperature=temperature, **common))
        runs.append((f"bf16, temperature {temperature:g}", found))
    if options.target_4bit:
        target = load(options.target_4bit)
        runs.append(("edits", list(measure_speculation(target, edits(), "ngram", **common))))
        runs.append(("prose", list(measure_speculation(target, prompts, "ngram", **common))))
    columns = (
        "run", "prompts", "loops", "plain tok/s", "speed-up", "worst", "predicted", "whole call", "accepted",
        "tokens a pass", "sampler", "same text",
    )  # fmt: skip
    documents, rows = zip(*(summary(name, found) for name, found in runs), strict=True)
    machine = cpu_info()
    print_table(columns, rows, f"Speculation; {machine.model}, {thread_count()} threads")
    print(json.dumps({"benchmark": "speculative", "machine": vars(machine), "runs": documents}, default=str))


if __name__ == "__main__":
    main()
