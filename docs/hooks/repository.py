"""Files of the repository on the documentation site, and links that work there and in a checkout.

Pages in `docs/` link to `../experiments/...`, `../README.md` and so on, as a reader of the
repository needs it. Here those files join the site, and the links follow. A link to something that
stays behind, a program for example, becomes its text; a link to nothing is an error, as every
broken link is.
"""

import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

SINGLE = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
"""Single files of the repository and what they are called on the site."""

STUDIES = ("*.png", "*/README.md", "*/*.png", "*/*.json", "*/results/*.json")
"""Files of the folder experiments, which is called studies on the site."""

_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)


def added() -> dict[str, str]:
    """Returns the site's name of each file that joins, by its path in the repository."""
    found = {path for pattern in STUDIES for path in (ROOT / "experiments").glob(pattern)}
    names = [path.relative_to(ROOT).as_posix() for path in sorted(found)]
    return SINGLE | {name: "studies/" + name.removeprefix("experiments/") for name in names}


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the repository to those of the site."""
    for name, uri in added().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns the page with links into the repository as links of the site."""
    uris = added()
    names = {uri: name for name, uri in uris.items()}
    uri = page.file.src_uri
    here = PurePosixPath(names.get(uri, "docs/" + uri)).parent

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = posixpath.normpath((here / target).as_posix())
        link = _on_site(path, uris)
        if link is None and not (ROOT / path).exists():
            raise PluginError(f"'{uri}' links to '{target}', which is not in the repository.")
        return text if link is None else f"[{text}]({_relative(link, uri)}{anchor or ''})"

    parts = _FENCED.split(markdown)
    return "".join(part if i % 2 else _LINK.sub(moved, part) for i, part in enumerate(parts))


def _on_site(path: str, uris: dict[str, str]) -> str | None:
    """The site's name of a path in the repository, None if it stays behind."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else uris.get(path)


def _relative(target: str, uri: str) -> str:
    return os.path.relpath(target, posixpath.dirname(uri) or ".").replace(os.sep, "/")
