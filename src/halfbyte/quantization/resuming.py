"""What a run says of the blocks its journal keeps: when it takes them up, and when it ends early."""

from __future__ import annotations

import sys

from halfbyte.checkpoints.journal import Journal


def seconds_spent(journal: Journal) -> float:
    """What the kept blocks took in earlier attempts."""
    return sum(float(record["seconds"]) for kept in (journal.records, journal.measured) for record in kept.values())


def announce(journal: Journal, blocks: int) -> None:
    """One line on stderr if an unfinished run is taken up."""
    kept = _kept(journal, blocks, "done")
    if kept:
        print(f"halfbyte: going on with an unfinished run, {kept} ({journal.folder})", file=sys.stderr)


def with_kept_blocks(error: BaseException, journal: Journal, blocks: int) -> BaseException:
    """The same error, which says how to go on if there is anything to go on with."""
    kept = _kept(journal, blocks, "finished")
    if not kept or journal.finished is not None:
        return error
    text = str(error) or "stopped by Ctrl-C"
    return type(error)(f"{text}; {kept} and kept; run the same command again to go on")


def _kept(journal: Journal, blocks: int, done: str) -> str:
    """How many blocks are done, or measured if none is, as the start of a line; empty if the journal keeps nothing."""
    count, what = (len(journal.records), done) if journal.records else (len(journal.measured), "measured")
    return f"{count} of {blocks} blocks are {what}" if count else ""
