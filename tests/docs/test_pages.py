"""Every command of the docs is run as it stands: page by page, from top to bottom, each page in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, Block, Page, read_pages

pytestmark = [pytest.mark.slow, pytest.mark.sample]
SECONDS = 900
# What a page is given when it asks for a checkpoint: made as a reader makes it, from less text.
QUANTIZE = "halfbyte quantize sample:smollm2-135m -o smollm2-4bit --max-calib-samples 8 --max-calib-seq-len 256"


@pytest.fixture(scope="module")
def given(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages ask for: a quantized sample model, and a text."""
    folder = tmp_path_factory.mktemp("given")
    texts = [path.read_text(encoding="utf-8") for path in sorted((DOCS / "design").glob("*.md"))]
    (folder / "my.txt").write_text("\n\n".join(texts), encoding="utf-8")
    done = run(Block(0, "sh", QUANTIZE, None, 0, ()), folder)
    assert done.returncode == 0, done.stdout
    return folder


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader would, in the environment of these tests; output and errors together."""
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*command, block.code],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.parametrize("page", read_pages(), ids=lambda page: page.path)
def test_every_command_of_the_page_works(page: Page, given: Path, tmp_path: Path) -> None:
    for name in page.given:
        source = given / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for block in page.blocks:
        if block.needs is not None:
            continue
        start = time.perf_counter()
        done = run(block, tmp_path)
        print(f"docs/{page.path}:{block.line}: {time.perf_counter() - start:.1f} s")
        said = f"docs/{page.path}:{block.line}: exit code {done.returncode}, expected {block.exit_code}"
        assert done.returncode == block.exit_code, f"{said}\n{block.code}\n{done.stdout[-4000:]}"
        shown = " ".join(done.stdout.split())
        for part in block.prints:
            said = f"docs/{page.path}:{block.line}: does not print\n{part}\nbut\n{done.stdout[-4000:]}"
            assert " ".join(part.split()) in shown, said
