"""README and guides: every link leads somewhere, every command in a fenced block exists and takes those options."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from import_graph import REPO, modules

DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
SHELL_LANGUAGES = ("bash", "sh", "shell", "console")
GROUPS = ("data", "config", "track", "bench", "selftest")


def shell_commands(text: str) -> list[str]:
    """Commands in the fenced shell blocks of a document, continued lines joined; comments and output left out."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language not in SHELL_LANGUAGES:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found.append(line.strip().removeprefix("$ "))
    return [line for line in found if line.split(" ")[0] in ("make", "trichord", "trichord-launch")]


def all_commands() -> list[tuple[str, str]]:
    return [(str(doc.relative_to(REPO)), command) for doc in DOCUMENTS for command in shell_commands(doc.read_text())]


def words_of(command: str) -> list[str]:
    """Words up to a pipe, a redirection or the next command."""
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("|", "&&", "||", ";", ">", ">>", "&", "2>&1")]
    return words[: ends[0]] if ends else words


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))


def help_of(program: str, words: list[str], capsys) -> str:
    """What `--help` of the verb says; the verb is the first word, or two of a group."""
    verb = words[: 2 if words and words[0] in GROUPS else 1]
    verb = [] if verb and verb[0].startswith("-") else verb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *verb, "--help"])
        try:
            code = importlib.import_module(f"{program.replace('-', '_')}.cli").main()
        except SystemExit as left:
            code = left.code
    assert code in (0, None), f"{program} {' '.join(verb)} is no verb"
    return capsys.readouterr().out


def check_command(command: str, capsys) -> None:
    program, *words = words_of(command)
    if program == "make":
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        assert set(targets) <= make_targets(), f"`{command}`: no such make target"
        return
    text = help_of(program, words, capsys)
    for option in (word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){re.escape(option)}\b", text), f"`{command}` has no option {option}"


@pytest.mark.parametrize(("document", "command"), all_commands())
def test_every_command_in_the_documents_exists(document, command, capsys):
    check_command(command, capsys)


@pytest.mark.parametrize(("document", "command"), all_commands())
def test_shipped_configs_named_in_commands_load(document, command):
    from trichord.config.load import check_config, shipped_configs

    for word in words_of(command):
        name = word.removeprefix("configs/")
        if name.endswith(".yaml") and name.split("/")[0] in ("runs", "debug", "suites", "clusters"):
            assert name in shipped_configs(), f"{document}: `{command}` names {word}"
            check_config(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_relative_link_leads_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize(
    "command",
    [
        "make nonsense",
        "trichord nonsense",
        "trichord train x.yaml --nonsense 3",
        "trichord-launch nonsense",
        "trichord data no",
    ],
)
def test_commands_that_do_not_exist_are_found(command, capsys):
    with pytest.raises(AssertionError):
        check_command(command, capsys)


def test_commands_are_read_out_of_fences():
    text = "```bash\n$ make test\n# no\ntrichord train a.yaml \\\n  engine.lr=1 | tee x\n```\n```yaml\nmake: 1\n```\n"
    assert [words_of(c) for c in shell_commands(text)] == [
        ["make", "test"],
        ["trichord", "train", "a.yaml", "engine.lr=1"],
    ]


def test_the_tree_holds_no_private_words():
    """Documents speak of the project, not of how it was made."""
    for path in [*DOCUMENTS, REPO / "CHANGELOG.md", REPO / "Makefile"]:
        assert not re.search(r"(?<!\w)/(?:home|root)/|\bTODO\b|\bFIXME\b", Path(path).read_text()), path


def test_the_picture_of_the_imports_shows_every_room():
    drawn = set(re.findall(r"<title>\.(\w+)</title>", (REPO / "docs" / "import-graph.svg").read_text()))
    rooms = {name.split(".")[1] for name in modules() if name.startswith("trichord.")}
    assert drawn == rooms, "draw it anew: docs/architecture.md says how"
