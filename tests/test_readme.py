"""README.md keeps its word: each command runs on a small toy world, or says what it lacks."""
import re
import shlex
import shutil

import pytest
from conftest import ROOT, run

TEXT = (ROOT / "README.md").read_text()
NOT_RUN = {  # a command's beginning -> why it is not run here
    "pip install": "the environment is there", "git clone": "needs a network",
    "ruff": "not needed to run or test", "python -m pytest": "these tests",
    "python tests/bench.py": "minutes", "python tests/ladder.py": "minutes",
    "python data.py extract --videos FOLDER": "test_data.py does so",
    "python pretrain.py --data toy --": "each is python pretrain.py --data toy, for minutes"}


def commands():
    """All commands of the page, in its order, each once, out of blocks and sentences; on 1 rank."""
    found = []
    for block, span in re.findall(r"```\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", TEXT, re.DOTALL):
        for line in (block or span).splitlines():
            line = re.sub(r"  +#.*|--nproc\S* ", "", line).strip().removeprefix("$ ")
            found += [part.strip() for part in line.split("&&")]
    starts = ("python ", "torchrun ", "pip ", "git ", "ruff ")
    return [line for line in dict.fromkeys(found) if line.startswith(starts) and "…" not in line]


COMMANDS = [line for line in commands() if not line.startswith(tuple(NOT_RUN))]
ON_THE_TOY = [line for line in COMMANDS if re.search("toy|by_hand|tests/figures.py", line)]


def test_every_script_has_a_command_on_the_page():
    scripts = {path.name for path in ROOT.glob("*.py")} - {"model.py"}
    assert scripts <= {word for line in COMMANDS for word in line.split()}
    assert len(ON_THE_TOY) >= 6 and len(COMMANDS) - len(ON_THE_TOY) >= 8


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in ON_THE_TOY])
def test_a_command_that_lacks_something_says_so_without_a_traceback(line, tmp_path):
    done = run(*shlex.split(line)[1:], cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"python \w+\.py|https?://|no such|by other means", done.stderr), done.stderr


def test_the_commands_for_the_toy_run_in_their_order(world, small_clip, tmp_path):
    shutil.copytree(world, tmp_path / "data/toy")
    (tmp_path / "out/toy/clip").mkdir(parents=True)
    shutil.copy(small_clip, tmp_path / "out/toy/clip/clip.pt")
    for line in ON_THE_TOY:
        few = ["--steps", 2] if "finetune.py" in line else []
        run(*shlex.split(line)[1:], *few, cwd=tmp_path)
    assert (tmp_path / "out/toy/pretrain/toy.json").exists()  # of the main job's last screen
