"""The documentation site: it builds without a warning, lists every public name, and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUILD = """
import sys
from mkdocs.__main__ import cli

cli(["build", "--strict", "--site-dir", sys.argv[1]], standalone_mode=False)
print("imported:", sorted({"torch", "ray", "transformers", "prefvec_ray"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it. A broken link or anchor, or a page outside the navigation, is an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported: []" in done.stdout  # the API reference is read from the source
    return folder


@pytest.mark.slow
def test_the_reference_lists_every_public_name(site: Path) -> None:
    anchors = {
        anchor for page in (site / "api").glob("*.html") for anchor in re.findall(r'id="([\w.]+)"', page.read_text())
    }
    names = (ROOT / "tests" / "public_api.txt").read_text().split()
    # A function with the name of its module stands under the module's name.
    assert [name for name in names if not anchors & {name, f"{name}.{name.rpartition('.')[2]}"}] == []


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loaded = r'<(?:script|img|iframe)\b[^>]*\bsrc="([^"]*)"|<link\b[^>]*\bhref="([^"]*)"'
    for page in pages:
        targets = [first or second for first, second in re.findall(loaded, page.read_text())]
        assert targets
        assert not [target for target in targets if re.match(r"(https?:)?//", target)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_pages_show_their_pictures(site: Path) -> None:
    pictures = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures == {path.name for path in (site / "images").iterdir()}
    shown = {
        Path(picture).name
        for page in site.rglob("*.html")
        for picture in re.findall(r'<img [^>]*src="([^"]+)"', page.read_text())
        if (page.parent / picture).is_file()
    }
    assert shown == pictures
