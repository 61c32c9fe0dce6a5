"""What README, card and docstrings say must be there: commands, flags, files, lines."""
import re

import pytest

from conftest import ROOT

SCRIPTS = ("synth", "model", "train", "predict", "eval")
PAGES = [ROOT / "README.md", ROOT / "weights" / "README.md", *(ROOT / f"{s}.py" for s in SCRIPTS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_flag_in_a_command_exists(page):
    text = page.read_text() if page.suffix == ".md" else page.read_text().split('"""')[1]
    commands = re.findall(rf"\b({'|'.join(SCRIPTS)})\.py((?:[ \t]+[^#\n`|&]+)?)", text)
    assert commands
    for script, rest in commands:
        for flag in set(re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest)) - {"-h"}:
            assert f'"{flag}"' in (ROOT / f"{script}.py").read_text(), f"{script}.py {rest}"


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http", "#")):
            continue
        path, _, line = target.partition("#L")
        assert (page.parent / path).exists(), target
        if line:                                  # anchors rot: each must still meet the start of something
            assert re.match(r"(def|class|[A-Z_]+ =|    def|# ---|    # -- )",
                            (page.parent / path).read_text().splitlines()[int(line) - 1]), target


def test_ci_runs_what_the_readme_says():
    second = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    command = [line for line in second.splitlines() if not line.startswith("#")]
    assert len(command) == 1 and command[0] in (ROOT / ".ci" / "run").read_text().splitlines()
