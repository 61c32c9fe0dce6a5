"""What README, card and docstrings say must be there: commands, flags, files, names."""
import re

import pytest

from conftest import ROOT

SCRIPTS = ("synth", "model", "train", "predict", "eval")
MARKDOWN = ["README.md", "weights/README.md", "docs/TRAIN.md", "docs/SPEED.md", "docs/LOG.md"]
PAGES = [page for page in MARKDOWN if page != "docs/LOG.md"] + [f"{script}.py" for script in SCRIPTS]


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_command_exists(page):
    text = (ROOT / page).read_text()
    commands = re.findall(rf"\b({'|'.join(SCRIPTS)})\.py((?:[ \t]+[^#\n`|&]+)?)",
                          text if page.endswith(".md") else text.split('"""')[1])
    assert commands or page == "docs/SPEED.md"
    for script, rest in commands:
        for flag in set(re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest)) - {"-h"}:
            assert f'"{flag}"' in (ROOT / f"{script}.py").read_text(), f"{script}.py {rest}"


@pytest.mark.parametrize("page", MARKDOWN)
def test_links_lead_somewhere(page):
    headings = re.findall(r"^#+ (.*)", text := (ROOT / page).read_text(), re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


def test_the_names_that_the_readme_tells_to_read_exist():
    rows = re.findall(r"^\| \[`(\w+\.py)`\].*\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == len(SCRIPTS)
    for file, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b|^{name} =", (ROOT / file).read_text(), re.M), name


def test_pages_stay_short():
    assert all(len((ROOT / page).read_text().splitlines()) <= 130 for page in PAGES[:3])


def test_ci_runs_what_the_readme_says():
    second = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    command = [line for line in second.splitlines() if not line.startswith("#")]
    assert len(command) == 1 and command[0] in (ROOT / ".ci" / "run").read_text().splitlines()
