"""Hook of mkdocs: gives every file of the repository that a page links to a page of its own.

The Markdown files in docs/ link to sources and figures outside of it, as they are read in the repository too. In the
site these links lead to `repository/<path>`: Markdown, pictures and notebooks as they are, other
files as code.
"""

import json
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")
FENCE_OR_INDENT = re.compile(r"(?ms)^(`{3,}).*?^\1$|^ {3}(?=\S)")
PICTURES = (".png", ".svg")
LANGUAGES = {".cc": "cpp", ".cu": "cpp", ".cuh": "cpp", ".h": "cpp", ".json": "json", ".py": "python", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and those of the files that they link to in turn."""
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for link in LINK.findall(text):
            path = linked(page, link)
            if path is None or files.get_file_from_path(uri_of(path)):
                continue
            if path.suffix in PICTURES:
                files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
                continue
            content = (ROOT / path).read_text()
            if path.suffix == ".ipynb":
                content = notebook(content)
            elif path.suffix != ".md":
                content = f"# {path.name}\n\n`{path}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{content}````\n"
            files.append(File.generated(config, uri_of(path), content=content))
            waiting.append((uri_of(path), content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links out of docs/ to the pages that were added, and indents lists as Python-Markdown reads them."""
    here = page.file.src_uri

    def turned(link):
        path = linked(here, link.group())
        return link.group() if path is None else posixpath.relpath(uri_of(path), posixpath.dirname(here) or ".")

    # A numbered item is continued at 3 spaces on GitHub, at 4 here. What is in fences stays.
    return FENCE_OR_INDENT.sub(lambda found: found[0] if found[1] else "    ", LINK.sub(turned, markdown))


def notebook(content: str) -> str:
    """Returns the Markdown of a notebook with its outputs."""
    parts = []
    for cell in json.loads(content)["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output](data:image/png;base64,{''.join(data['image/png'].split())})")
            else:
                parts.append(f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def linked(page: str, link: str) -> pathlib.PurePosixPath | None:
    """The file of the repository that `link` in `page` leads to; None if it is in docs/ or does not exist.

    Args:
        page: path of the page in the site's sources.
        link: relative path.
    """
    source = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    path = pathlib.PurePosixPath(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)))
    if (ROOT / path).is_dir():
        path /= "README.md"
    in_docs = path.parts[:1] == ("docs",)
    if path.parts[:1] == ("..",) or not (ROOT / path).is_file() or (in_docs and not page.startswith("repository/")):
        return None
    return path


def uri_of(path: pathlib.PurePosixPath) -> str:
    """The path of the page of a file of the repository in the site's sources."""
    if path.parts[0] == "docs":
        return path.as_posix().removeprefix("docs/")
    return f"repository/{path}" if path.suffix in (".md", *PICTURES) else f"repository/{path}.md"
