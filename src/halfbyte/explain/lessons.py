"""`explain`: a lesson by its name. Its module is imported when it is told, torch only where it computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module

from halfbyte.errors import ConfigError
from halfbyte.explain.catalogue import Messages, pick_language
from halfbyte.explain.lesson import Lesson, Step

# Name → the options it takes, in the order in which they are best read. Each is a module of this room.
LESSONS: dict[str, tuple[str, ...]] = {
    "packing": ("model", "layer", "m", "n", "k", "verify"),
    "rounding": ("model", "layer"),
    "awq": ("model", "layer"),
    "kernel": ("model", "layer"),
    "gpu": ("n", "k"),
    "speculative": (),
}
SAMPLE = "sample:smollm2-135m"


@dataclass(frozen=True)
class Options:
    """What a lesson is to be told about.

    Attributes:
        model: whose layer: a folder, "sample:NAME" or a hub name, not quantized; None for made-up weights where the
            lesson has them, else the sample model.
        layer: full name of a linear, such as "model.layers.3.mlp.up_proj"; None for one of the lesson's choice.
        m: rows of activations.
        n: outputs of a made-up matrix.
        k: its inputs.
        verify: compare whole products, too.
        progress: show progress on a terminal.
    """

    model: str | None = None
    layer: str | None = None
    m: int | None = None
    n: int | None = None
    k: int | None = None
    verify: bool = False
    progress: bool = True

    @property
    def source(self) -> str | None:
        """The model to read a layer from; None where none was asked for."""
        return self.model or (SAMPLE if self.layer else None)


def explain(name: str, options: Options | None = None, *, language: str | None = None) -> Lesson:
    """Make a lesson: run the code it is about, and check every statement.

    Args:
        name: one of `LESSONS`.
        options: what to tell about.
        language: of the headings: "en", "vi", "zh_TW" or a locale; None for the one in the environment.

    Raises:
        ConfigError: no such lesson or language, or an option the lesson does not take.
        LessonError: a statement is not so.
        HalfbyteError: the model or the layer cannot be read.
    """
    if name not in LESSONS:
        raise ConfigError(f"{name}: no such lesson; there are {', '.join(LESSONS)}")
    options = options or Options()
    for field in fields(options):
        if field.name not in (*LESSONS[name], "progress") and getattr(options, field.name) != field.default:
            takes = ", ".join(f"--{option}" for option in LESSONS[name]) or "no options of its own"
            raise ConfigError(f"--{field.name}: lesson {name} does not take it; it takes {takes}")
    messages = Messages(pick_language(language))
    tell: Callable[[Options, Messages], Iterator[Step]] = import_module(f"halfbyte.explain.{name}").tell
    title, summary = (messages.text(f"{name}.{part}") for part in ("title", "summary"))
    return Lesson(name, title, summary, messages.language, tuple(tell(options, messages)))


def list_lessons(language: str | None = None) -> list[tuple[str, str, str]]:
    """(name, title, summary) of every lesson. Arguments and errors as for `explain`."""
    messages = Messages(pick_language(language))
    return [(name, messages.text(f"{name}.title"), messages.text(f"{name}.summary")) for name in LESSONS]
