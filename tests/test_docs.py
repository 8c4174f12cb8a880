"""README and docs point at what exists. `python tests/test_docs.py` brings their line numbers and counts up to date."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TO_FUNCTION = re.compile(r"\[`(\w+)`\]\(([\w./]+\.py)#L(\d+)\)")  # [`name`](file.py#L12)
TO_FILE = re.compile(r"\]\(([^)#:]+)\)")
LINES_OF = re.compile(r"^\| \[([\w./]+)\]\([\w./]+\) \| (\d+) \|", re.M)  # the reading order's rows


def line_of(name, file):
    """The line on which a function, class or constant begins; 0 if there is none."""
    lines = file.read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b|{name} =", line)]
    return found[0] if found else 0


def updated(text, folder):
    """The page with the line numbers and counts as they are now."""
    def function(match):
        name, file, _ = match.groups()
        return f"[`{name}`]({file}#L{line_of(name, folder / file)})"

    def count(match):
        lines = len((folder / match[1]).read_text().splitlines())
        return match[0].replace(f"| {match[2]} |", f"| {lines} |")

    return LINES_OF.sub(count, TO_FUNCTION.sub(function, text))


def test_links_lead_to_files_functions_and_lines_that_exist():
    for page in PAGES:
        text = page.read_text()
        for target in TO_FILE.findall(text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name, file, line in TO_FUNCTION.findall(text):
            assert int(line) == line_of(name, page.parent / file) > 0, f"{page.name}: {name} in {file}, line {line}"


def test_line_counts_are_those_of_the_files():
    for page in PAGES:
        assert updated(page.read_text(), page.parent) == page.read_text(), f"run: python tests/test_docs.py ({page.name})"


def test_the_readme_is_one_page():
    words = [word for word in (ROOT / "README.md").read_text().split() if re.search(r"\w", word)]
    assert len(words) <= 1000


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(), page.parent))
