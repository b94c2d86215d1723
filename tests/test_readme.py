"""README.md keeps its word: its commands run, its numbers are those that runs printed, its code stands in the files.

Commands that the toy world suffices for are run as they stand, in the order of the page, on a small one. The others are
run in an empty folder, where each has to say in one line what it lacks and where that is to be had.
"""
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import readme
from conftest import ROOT, as_in_a_terminal

from toy import make_toy

TEXT = (ROOT / "README.md").read_text()
NOT_RUN = {  # beginning of a command -> why it is not run here
    "pip install": "the environment is there", "git clone": "needs a network",
    "ruff": "not in requirements.txt, for it is not needed to run or test",
    "python -m pytest -q -n auto": "these tests", "python -m pytest tests/test_fuzz": "among these tests",
    "python tests/readme.py": "hours", "python tests/bench.py": "minutes, and figures of time need a quiet machine",
    "python pretrain.py --data random": "minutes on a CPU; test_the_papers_step_is_timed_without_a_file is its short form"}


def commands():
    """All commands of the page, in its order, each once: from blocks of code and from code within sentences."""
    found = []
    for language, block, span in re.findall(r"```(\w*)\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", TEXT, re.DOTALL):
        for line in ("" if language else block or span).splitlines():
            line = line.split("  #")[0].strip().removeprefix("$ ").replace("${part}", "eval")
            found += [part.strip() for part in line.split("&&")]
    starts = ("python ", "torchrun ", "pip ", "git ", "ruff ")
    return list(dict.fromkeys(command for command in found if command.startswith(starts) and "…" not in command))


IMPORTED = {f"{name}.py" for name in ("model", "bank", "train", "readers", "prepare", "toy", "ladder", "listen",
                                          "processes")}  # no commands of their own
COMMANDS = [command for command in commands() if not command.startswith(tuple(NOT_RUN))]
LADDER = "python finetune.py ladder --seeds 3"
ON_THE_TOY = [command for command in COMMANDS if command != LADDER
              and ("toy" in command or "-k by_hand" in command or command == "python figures.py")]


def start(command, folder):
    """A command of the page as a process in a folder without a network; torchrun's ranks are one."""
    launcher, *words = shlex.split(command)
    if launcher == "torchrun":
        words = [word for word in words if not word.startswith(("--nproc", "--nnodes", "--rdzv"))]
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    home = {"HOME": str(folder), "TMPDIR": str(folder), "PATH": "", "https_proxy": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": as_in_a_terminal}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=home, **options)


def test_there_are_commands_of_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")} - IMPORTED
    assert scripts == {word for command in COMMANDS for word in command.split() if word in scripts}
    assert len(COMMANDS) >= 30 and len(ON_THE_TOY) >= 10


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in (*ON_THE_TOY, LADDER)
                                     and "--nnodes" not in command])  # without torchrun as with --nproc_per_node
def test_a_command_that_lacks_its_data_says_so_in_one_line(command, tmp_path):
    process = start(command, tmp_path)
    out, errors = process.communicate(timeout=120)
    if "--help" in command:
        assert process.returncode == 0 and "--batch" in out
        return
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert re.search(r"python \w+\.py|https?://|no such|--\w+", last), last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small toy world, for the page's commands to be run in."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").mkdir()
    make_toy(folder / "data/toy", splits={"pairs": 256, "train": 128, "val": 24, "test": 144})
    return folder


def test_the_toys_commands_run_as_they_stand(folder):
    for command in ON_THE_TOY:
        process = start(command, ROOT if "pytest" in command else folder)
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}\n{out}\n{errors}"
        if "--mean 0" in command:
            assert "warning: the encoder's input has mean" in out  # the page says so
    assert (folder / "out/toy/pretrain/similarity.png").exists() and (folder / "data/toy/ac.png").exists()


def test_the_ladder_starts_and_can_be_stopped(folder):
    process = start(LADDER, folder)
    for line in process.stdout:
        if line.startswith("pretrain: "):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in errors


def test_numbers_and_code_are_those_of_the_runs_and_the_files():
    assert set(re.findall(r"<!-- (?!end)(.*?) -->", TEXT)) == set(readme.blocks())
    assert readme.fill(TEXT) == TEXT, "run: python tests/readme.py none"


def test_pictures_files_and_headings_that_it_links_to_are_there():
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in TEXT.splitlines() if line.startswith("#")}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 8
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).exists(), link
