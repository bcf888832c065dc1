"""What mkdocs puts into the pages while it builds them: options of verbs, lists, and lessons that are run.

A page says where, in a comment of its own line:

    <!-- halfbyte: options VERB -->    what `halfbyte VERB --help` says, as tables
    <!-- halfbyte: verbs -->           every verb with its one line
    <!-- halfbyte: lessons -->         every lesson with its one line
    <!-- halfbyte: lesson NAME -->     the lesson, made now; the build fails if one of its statements is not so
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lesson_page
import verb_tables

DIRECTIVE = re.compile(r"^<!-- halfbyte: (?P<what>[a-z]+)(?P<argument>(?: [a-z0-9-]+)*) -->$", re.MULTILINE)
# Marks for those who run the pages (tests/docs/pages.py); nothing for readers.
RUNNER_MARK = re.compile(r"^<!-- (?:needs|fails|given): .*? -->\n", re.MULTILINE)
MAKERS: dict[str, Callable[[str], str]] = {
    "options": verb_tables.options,
    "verbs": verb_tables.verbs,
    "lessons": lesson_page.listing,
    "lesson": lesson_page.lesson,
}


def expand(markdown: str) -> str:
    """A page with every directive carried out.

    Raises:
        KeyError: a directive or a verb that does not exist.
        HalfbyteError: a lesson that does not hold, or whose model cannot be read.
    """
    made = DIRECTIVE.sub(lambda found: MAKERS[found["what"]](found["argument"].strip()), markdown)
    return RUNNER_MARK.sub("", made)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls for every page."""
    return expand(markdown)
