"""A lesson as a page: the same value that `halfbyte explain` shows on a terminal, as HTML inside Markdown."""

from __future__ import annotations

import base64
import functools
import io
import re
from html import escape

from halfbyte.explain.lesson import Block, Chart, Check, Drawing, Lesson, Span, Table, Text
from halfbyte.explain.lessons import Options, explain, list_lessons
from halfbyte.report.style import COLOURS, MARKERS, add_legend, dress, new_figure

CHART_INCHES = (7.4, 3.4)


def listing(_: str) -> str:
    """A table of every lesson."""
    rows = [f"| [{name}]({name}.md) | {summary} |" for name, _title, summary in list_lessons("en")]
    return "\n".join(["| lesson | what it shows |", "|---|---|", *rows])


@functools.cache
def lesson(name: str) -> str:
    """The lesson with its own choice of layer; made once a build."""
    return render(explain(name, Options(progress=False), language="en"))


def render(made: Lesson) -> str:
    """Markdown: a heading a step, the rest as HTML."""
    parts = ["What has a ✓ was checked by the code while this page was made."]
    for step in made.steps:
        parts.append(f"## {step.heading}")
        parts += [_block(block) for block in step.blocks]
    return "\n\n".join(parts)


def _block(block: Block) -> str:
    match block:
        case Text():
            paragraphs = [" ".join(paragraph.split()) for paragraph in block.text.split("\n\n")]
            return "\n\n".join(f"<p>{_words(paragraph)}</p>" for paragraph in paragraphs)
        case Check():
            return f'<p class="hb-check">✓ {_words(block.statement)}</p>'
        case Table():
            return _figure(block.caption, _table(block))
        case Drawing():
            lines = "\n".join("".join(map(_span, line)) for line in block.lines)
            return _figure(block.caption, f'<pre class="hb-drawing">{lines}</pre>')
        case Chart():
            return _figure(block.caption, _chart(block))


def _figure(caption: str, inside: str) -> str:
    head = f"<figcaption>{_words(caption)}</figcaption>" if caption else ""
    return f'<figure class="hb-figure">{head}{inside}</figure>'


def _words(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _span(span: Span) -> str:
    text = escape(span.text, quote=False)
    return text if span.mark is None else f'<span class="hb-m{span.mark}">{text}</span>'


def _table(block: Table) -> str:
    columns = range(len(block.columns))
    numeric = [all(row[c].value is not None or row[c].mark is not None for row in block.rows) for c in columns]
    side = [' class="hb-number"' if right else "" for right in numeric]
    head = "".join(f"<th{side[c]}>{_words(block.columns[c])}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{side[c]}>{_span(row[c])}</td>" for c in columns) + "</tr>" for row in block.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chart(block: Chart) -> str:
    figure = new_figure(*CHART_INCHES)
    axes = figure.subplots()
    for number, series in enumerate(block.series):
        points = [(x, y) for x, y in zip(block.x, series.y, strict=True) if y is not None]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            label=series.name,
        )
    dress(axes, x=block.x_label, y=block.y_label)
    add_legend(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    alternative = escape(f"{block.caption} Curves: {', '.join(series.name for series in block.series)}")
    return f'<img class="hb-chart" alt="{alternative}" src="data:image/svg+xml;base64,{data}">'
