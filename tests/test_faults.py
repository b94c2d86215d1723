"""Kills, full disks, lost ranks, vanished files, two runs in one folder: the same command goes on, and nothing is lost.

    python -m pytest tests/test_fuzz.py tests/test_faults.py            # prints a table of what was tried
"""
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, flat, linked, make_video, tiny_language_model

from bank import Bank, embed_all, frame_bank
from clip_load import audio_encoder_from_clip, fingerprint, load_clip
from finetune import Settings, starting_encoder
from processes import new_array
from readers import read_index
from train import AudioSamples, doubts, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


class Command(NamedTuple):
    """A long command whose folder is `out`: what it needs, how it is given, how far it is, what it leaves."""
    prepare: callable
    words: callable
    progress: callable
    result: callable


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def rows_done(folder, name):
    """Rows of all arrays called `name` below a folder that are 1."""
    return sum(int((np.fromfile(path, np.uint8)[128:] == 1).sum()) for path in folder.rglob(name))


def files_in(folder, *patterns):
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


def weights(out):
    return {name: tensor.numpy().tobytes()
            for name, tensor in load_checkpoint(out / "checkpoint.pt", ["pretrain", "finetune", "head"])["learner"].items()}


@pytest.fixture(scope="session")
def commands(world, small_clip, tmp_path_factory):
    """The project's long commands, small."""
    place = tmp_path_factory.mktemp("inputs")
    make_video(place / "one.mp4", seconds=4)
    (place / "videos").mkdir()
    names = [f"video_{i:05d}" for i in range(10)]
    for name in names:
        os.link(place / "one.mp4", place / f"videos/{name}.mp4")
    (place / "train.csv").write_text("# a\n# b\n# c\n" + "".join(f'{name}, 0.500, 3.500, "/m/1"\n' for name in names))
    tiny_language_model(place / "model")
    (place / "primers.txt").write_text("a dog runs\ntwo cats sleep\n")
    clip = {"--clip": small_clip, "--vocab": world / "vocab.txt.gz"}
    small = {"--sample-rate": 16_000, "--mels": 32, "--frames": 60, "--mean": -3, "--std": 4, "--stride-time": 8,
             "--stride-mel": 8, "--batch": 16, "--epochs": 5, "--warmup-epochs": 1, "--lr-weights": 5, "--precision": "fp32",
             "--log-every": 2, "--save-every": 3, "--leave-out": "none", "--workers": 1} | clip

    def copy(out, *indexes):
        linked(world, out)
        for name in indexes:
            shutil.copy(world / name, out / name)

    def dataset(out):
        copy(out, "train.jsonl", "val.jsonl", "test.jsonl", "gold.jsonl", "ac.txt")

    def with_pairs(out):
        dataset(out)
        shutil.copy(world / "gold.jsonl", out / "gc.jsonl")

    def with_checkpoint(out):
        dataset(out)
        for name in ("start", *"abcdef"):
            shutil.copy(start, out / f"{name}.pt")

    eye, start = load_clip(small_clip), place / "start.pt"
    encoder = audio_encoder_from_clip(eye, 60, 32, (8, 8))
    save_checkpoint(start, {
        "stage": "pretrain", "encoder": encoder.config, "step": 1, "steps": 1, "settings": {"init": "clip"},
        "front_end": {"sample_rate": 16_000, "mels": 32, "frames": 60, "mean": -3.0, "std": 4.0},
        "learner": {f"audio_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        | {"log_scale": torch.tensor(2.66)},
        "clip": {"weights": str(small_clip), "vocab": str(clip["--vocab"]), "fingerprint": fingerprint(eye)}})
    return {
        "data.py extract": Command(
            lambda out: None,
            lambda out: ["data.py", "extract", "--segments", place / "train.csv", "--videos", place / "videos", "--out", out,
                         "--workers", 1],
            lambda out: len(list(out.glob("audio/*/*.wav"))),
            lambda out: files_in(out, "audio/*/*", "frames/*/*", "train.jsonl")),
        "data.py pack": Command(
            lambda out: dataset(out),
            lambda out: ["data.py", "pack", "--data", out, "--sample-rate", 11_025, "--workers", 1],
            lambda out: size_of(out / "packed-11025/waves.i16"),
            lambda out: files_in(out, "packed-11025/[dpw]*", "packed-11025/starts.npy")),
        "pretrain.py (banks, training)": Command(
            dataset,
            lambda out: ["pretrain.py", "--data", out, "--out", out / "run", *flat(small)],
            lambda out: rows_done(out, "state.npy") + size_of(out / "run/log.jsonl"),
            lambda out: weights(out / "run")),
        "curate.py": Command(
            dataset,
            lambda out: ["curate.py", "--source", "ac", "--data", out, "--rows", 4, "--leave-out", "none", "--workers", 0,
                         *flat(clip)],
            lambda out: rows_done(out, "state.npy") + rows_done(out, "done.npy"),
            lambda out: files_in(out, "ac.jsonl")),
        "curate.py generate": Command(
            lambda out: out.mkdir(),
            lambda out: ["curate.py", "generate", "--model", place / "model", "--out", out / "fc.txt", "--count", 120,
                         "--shots", 2, "--batch", 2, "--data", place / "primers.txt", "--tokens", 24],
            lambda out: size_of(out / "fc.txt"),
            lambda out: files_in(out, "fc.txt")),
        "finetune.py": Command(
            with_pairs,
            lambda out: ["finetune.py", "--source", "gc", "--data", out, "--out", out / "run", "--init", "clip",
                         *flat({key: value for key, value in small.items() if key != "--leave-out"})],
            lambda out: size_of(out / "run/log.jsonl"),
            lambda out: weights(out / "run")),
        "evaluate.py": Command(
            with_checkpoint,
            lambda out: ["evaluate.py", "--task", "all", "--data", out, "--workers", 0, "--compare",
                         *(out / f"{name}.pt" for name in "abcdef")],
            lambda out: len(list(out.glob("*.all.json"))),
            lambda out: {path.name: json.loads(path.read_text().replace(str(out), "OUT"))["results"]
                         for path in out.glob("*.all.json")}),
    }


WATCH = """import os, runpy, sys
sys.path.insert(0, {root!r})
written = open({report!r}, "a", buffering=1)
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.write(os.path.realpath(os.fsdecode(args[0])) + "\\n")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link"):
        written.write(os.path.realpath(os.fsdecode(args[0])) + "\\n")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


NAMES = ["data.py extract", "data.py pack", "pretrain.py (banks, training)", "curate.py", "curate.py generate",
         "finetune.py", "evaluate.py"]


class Undisturbed(NamedTuple):
    """What a command leaves when nothing happens to it, and what of it lies outside its folder."""
    result: object
    outside: list


@pytest.fixture(scope="session")
def undisturbed(run, commands, tmp_path_factory):
    """(name) -> Undisturbed."""
    known = {}

    def leaves(name):
        if name not in known:
            place = tmp_path_factory.mktemp("undisturbed")
            out, report, elsewhere = place / "out", place / "written.txt", {"cwd": place / "cwd", "tmp": place / "tmp"}
            for folder in elsewhere.values():
                folder.mkdir()
            commands[name].prepare(out)
            (place / "watch.py").write_text(WATCH.format(root=str(ROOT), report=str(report)))
            script, *flags = commands[name].words(out)
            run(place / "watch.py", ROOT / script, *flags, cwd=elsewhere["cwd"], env={
                "PYTHONDONTWRITEBYTECODE": "1", **dict.fromkeys(("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"), str(elsewhere["tmp"]))})
            written = report.read_text().splitlines()
            assert any(path.startswith(str(out)) for path in written)
            allowed = (str(out), str(elsewhere["tmp"]), "/dev/", "/proc/")  # sockets between processes lie in the second
            known[name] = Undisturbed(commands[name].result(out), [*os.listdir(elsewhere["cwd"]), *(
                path for path in written if not path.startswith(allowed))])
        return known[name]
    return leaves


# ------------------------------------------------------------------------------------ kills, disks

@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_killed_a_command_goes_on(run, commands, undisturbed, tmp_path, record_property, name):
    """Ctrl-C, SIGTERM, SIGKILL, each as soon as the command gets further; the next start goes on with it."""
    command, out, rng, landed = commands[name], tmp_path / "out", np.random.default_rng(0), 0
    command.prepare(out)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process, before = run(*command.words(out), start=True), command.progress(out)
        while process.poll() is None and command.progress(out) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))  # somewhere in a step, a validation or a file being written
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        if process.returncode == 0:
            break
        landed += 1
        if number != signal.SIGKILL:
            assert process.returncode == 130 and "stopped; the same command goes on" in error and "Traceback" not in error
    assert landed
    run(*command.words(out))
    assert command.result(out) == undisturbed(name).result
    assert not [*out.rglob("*.part"), *out.rglob("*lock")]
    record_property("tried", (f"Ctrl-C, SIGTERM, SIGKILL: {name}", landed, "went on, ended as undisturbed"))


LIMITS = {"data.py extract": 50_000, "data.py pack": 100_000, "pretrain.py (banks, training)": 300_000,
          "curate.py": 2000, "evaluate.py": 2000}


@pytest.mark.parametrize("name", LIMITS)
def test_a_full_disk_is_said_and_made_room_for(run, commands, undisturbed, tmp_path, record_property, name):
    """No file may grow beyond a limit: a checkpoint, a bank, an index, a WAV, a JSON."""
    command, out = commands[name], tmp_path / "out"
    command.prepare(out)
    words = [*command.words(out), "--workers", 0]
    if name == "curate.py":  # has its banks, lacks its index
        run(*words)
        (out / "ac.jsonl").unlink()
    done = run(*words, check=False, largest_file=LIMITS[name])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the same command goes on" in done.stderr and ("File too large" in done.stderr or "disk full" in done.stderr)
    assert not list(out.rglob("*.part"))  # what can't be finished takes no room
    run(*command.words(out))
    assert command.result(out) == undisturbed(name).result
    assert not list(out.rglob("*.part"))
    record_property("tried", (f"full disk: {name}", 1, "said, went on, ended as undisturbed"))


def test_a_full_disk_in_a_bank(run, commands, undisturbed, tmp_path, record_property):
    name = "pretrain.py (banks, training)"
    command, out = commands[name], tmp_path / "out"
    command.prepare(out)
    done = run(*command.words(out), "--workers", 0, check=False, largest_file=8000)
    assert done.returncode == 1 and "embeddings.npy: can't be written" in done.stderr and "; it needs" in done.stderr
    run(*command.words(out))
    assert command.result(out) == undisturbed(name).result
    record_property("tried", ("full disk: a bank", 1, "said, went on, ended as undisturbed"))


# ------------------------------------------------------------------------------------------ ranks

def test_when_one_of_two_ranks_is_killed_the_other_ends(run, commands, tmp_path, record_property):
    command, out, whole = commands["pretrain.py (banks, training)"], tmp_path / "out", tmp_path / "whole"
    for folder in (out, whole):
        command.prepare(folder)
    run(*command.words(whole), ranks=2)
    for lost in (0, 1):
        process, size = run(*command.words(out), ranks=2, start=True), size_of(out / "run/log.jsonl")
        while process.poll() is None and size_of(out / "run/log.jsonl") < size + 3000:
            time.sleep(0.01)
        ranks, began = ranks_of(process), time.time()
        os.kill(ranks[lost], signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
        waited = time.time() - began
        assert process.returncode != 0 and waited < 60
        assert re.search(rf"rank +: {lost} ", error) and "SIGKILL" in error
        assert not Path(f"/proc/{ranks[1 - lost]}").exists()
        how = f"the other ended after {waited:.0f} s, with torchrun's report; went on, ended as undisturbed"
        record_property("tried", (f"rank {lost} of 2 killed", 1, how))
    run(*command.words(out), ranks=2)
    assert command.result(out) == command.result(whole)


def ranks_of(torchrun):
    """The processes that a torchrun has started -> {rank: process id}."""
    ranks = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables, status = environment.read_bytes().decode().split("\0"), (environment.parent / "status").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        rank = next((word[5:] for word in variables if word.startswith("RANK=")), None)
        if rank and f"PPid:\t{torchrun.pid}\n" in status:
            ranks[int(rank)] = int(environment.parent.name)
    return ranks


# ----------------------------------------------------------------------------- files, two runs

def unlinked(folder):
    """A copy instead of the link to a folder."""
    source = os.path.realpath(folder)
    folder.unlink()
    shutil.copytree(source, folder)


def test_a_sound_that_goes_away_is_skipped_and_counted(run, commands, tmp_path, record_property):
    command, out = commands["pretrain.py (banks, training)"], tmp_path / "out"
    command.prepare(out)
    unlinked(out / "audio")
    rows = [row for name in ("train", "val", "test") for row in (out / f"{name}.jsonl").read_text().splitlines(True)]
    (out / "train.jsonl").write_text("".join(rows))         # 112 clips: a lost one is not yet 1 %
    words = [*command.words(out), "--epochs", 2]
    run(*words, "--steps", 3)
    sound = out / json.loads(rows[0])["audio"]
    sound.unlink()
    done = run(*words)
    assert done.stderr.count(f"skipped: {sound}") >= 1 and done.stdout.count("skipped 1") >= 1
    record_property("tried", ("a sound goes away", 1, "skipped, named, counted each epoch"))


def test_a_sound_that_changes_ends_the_run(run, commands, tmp_path, record_property):
    command, out = commands["pretrain.py (banks, training)"], tmp_path / "out"
    command.prepare(out)
    unlinked(out / "audio")
    run(*command.words(out), "--steps", 3)
    sound = out / json.loads((out / "train.jsonl").read_text().splitlines()[1])["audio"]
    sound.write_bytes(sound.read_bytes() + bytes(2000))
    done = run(*command.words(out), check=False)
    assert done.returncode == 1 and f"{sound} is not the file it was" in done.stderr
    record_property("tried", ("a sound changes", 1, "refused: it would be another run"))


def test_frames_that_change_make_the_bank_anew(run, commands, tmp_path, record_property):
    command, out = commands["pretrain.py (banks, training)"], tmp_path / "out"
    command.prepare(out)
    unlinked(out / "frames")
    run(*command.words(out), "--steps", 2)
    bank = next(out.glob("banks/train-*/embeddings.npy"))
    before = np.load(bank).copy()
    frame = out / json.loads((out / "train.jsonl").read_text().splitlines()[0])["frames"][0]
    shutil.copy(out / json.loads((out / "train.jsonl").read_text().splitlines()[5])["frames"][0], frame)
    run(*command.words(out), "--steps", 4)
    after = np.load(bank)
    assert not np.array_equal(before[0], after[0]) and np.array_equal(before[1:], after[1:])
    record_property("tried", ("a frame changes", 1, "its bank is made anew"))


def test_an_array_made_anew_leaves_the_old_one_to_who_reads_it(tmp_path):
    path = tmp_path / "bank.npy"
    new_array(path, np.float16, (2, 2))
    np.load(path, mmap_mode="r+")[:] = 1
    reader = np.load(path, mmap_mode="r")
    new_array(path, np.float16, (2, 2))
    assert (reader == 1).all() and not np.load(path).any()


def test_rows_of_a_bank_that_a_power_cut_lost_are_made_again(world, small_clip, tmp_path):
    """They are marked as done, and hold zeros or anything: what is no unit vector is not done."""
    clips, clip = read_index(world / "train.jsonl")[:8], load_clip(small_clip)
    bank = frame_bank(tmp_path / "bank", clips, clip, CPU, 0)
    whole = np.array(bank.embeddings)
    rows = np.load(bank.path, mmap_mode="r+")
    rows[5], rows[9], rows[20] = 0, np.nan, 3
    rows.flush()
    again = frame_bank(tmp_path / "bank", clips, clip, CPU, 0).embeddings
    assert np.abs(again.astype(float) - whole).max() < 2e-3 and np.array_equal(again[[4, 6]], whole[[4, 6]])


@pytest.mark.parametrize("name", ["pretrain.py (banks, training)", "data.py extract", "data.py pack"])
def test_a_second_run_in_the_same_folder_is_refused(run, commands, undisturbed, tmp_path, record_property, name):
    command, out = commands[name], tmp_path / "out"
    command.prepare(out)
    process = run(*command.words(out), start=True)
    while process.poll() is None and not (size_of(out / "run/log.jsonl") if "pretrain" in name else command.progress(out)):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    done = run(*command.words(out), check=False)
    os.kill(process.pid, signal.SIGCONT)
    assert done.returncode == 1 and f"is held by {command.words(out)[0]}" in done.stderr
    assert f"process {process.pid} on " in done.stderr and "since 20" in done.stderr
    process.communicate(timeout=120)
    assert process.returncode == 0 and command.result(out) == undisturbed(name).result
    record_property("tried", (f"two runs, one folder: {name}", 1, "the second is refused, the first ends as undisturbed"))


# ------------------------------------------------------------------------------ untrusted input

@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_outside_the_commands_folder(undisturbed, record_property, name):
    """Every file that Python opens for writing, every folder it makes and every name it changes."""
    assert undisturbed(name).outside == []
    record_property("tried", (f"written outside its folder: {name}", 1, "nothing"))


# --------------------------------------------------------------------------------- determinism

def test_worker_processes_change_nothing_and_neither_does_chance(run, commands, undisturbed, tmp_path):
    name, out = "pretrain.py (banks, training)", tmp_path / "out"
    commands[name].prepare(out)
    run(*commands[name].words(out), "--workers", 3)  # the undisturbed run has one
    assert commands[name].result(out) == undisturbed(name).result


def test_embeddings_do_not_depend_on_the_batch(world, commands, tmp_path):
    start = tmp_path / "out"
    commands["evaluate.py"].prepare(start)
    encoder, front_end, _ = starting_encoder(Settings(init=str(start / "start.pt")), None)
    paths = [clip.audio for clip in read_index(world / "test.jsonl")]
    whole, _ = embed_all(paths, front_end.load, lambda wave, length: encoder(front_end(wave, length)), 32, CPU)
    alone = torch.cat([embed_all([path], front_end.load, lambda wave, length: encoder(front_end(wave, length)), 32, CPU)[0]
                       for path in paths])
    assert (whole - alone).abs().max() < 1e-5


# -------------------------------------------------------------------------------- quiet errors

@pytest.mark.parametrize(("numbers", "said"), [
    ({}, None), ({"loss": 8.3}, "is that of guessing"), ({"temperature": 1e-4}, "the temperature, 0.0001"),
    ({"temperature": 3.0}, "the temperature, 3"), ({"input_mean": -1.2}, "has mean -1.20"),
    ({"input_std": 0.1}, "and std 0.10"), ({"padding": 0.97}, "97 % of what the encoder hears is padding"),
    ({"loss": float("nan"), "guessing": float("inf")}, None)])
def test_what_an_epochs_numbers_give_away(numbers, said):
    found = doubts(**{"loss": 5.0, "guessing": 8.32} | numbers)
    assert len(found) == (said is not None) and all(said in doubt for doubt in found)


def test_a_run_says_what_is_wrong_with_its_input_within_an_epoch(run, commands, tmp_path):
    """AudioSet's mean and std at another level; a second of sound in 20 s; rates that change nothing."""
    command, out = commands["pretrain.py (banks, training)"], tmp_path / "out"
    command.prepare(out)
    done = run(*command.words(out), "--mean", 4, "--frames", 2000, "--stride-time", 160, "--epochs", 1, "--lr-weights", 0,
               "--lr-biases", 0)
    assert "warning: the encoder's input has mean" in done.stdout and "data.py stats" in done.stdout
    assert "95 % of what the encoder hears is padding" in done.stdout
    warnings = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines() if '"warning"' in line]
    assert len(warnings) >= 2 and {row["step"] for row in warnings} == {4}


def test_targets_that_are_all_alike_are_refused(tmp_path):
    row = np.full(16, 0.25, np.float16)
    np.save(tmp_path / "alike.npy", np.stack([row] * 30))
    np.save(tmp_path / "differ.npy", np.eye(16, dtype=np.float16))
    with pytest.raises(ValueError, match="all alike"):
        AudioSamples([], [Bank(str(tmp_path / "alike.npy"), np.arange(30), np.arange(31))], None)
    AudioSamples([], [Bank(str(tmp_path / "differ.npy"), np.arange(16), np.arange(17))], None)
    np.save(tmp_path / "zero.npy", np.zeros((4, 16), np.float16))
    with pytest.raises(ValueError, match="not a unit vector"):
        Bank(str(tmp_path / "zero.npy"), np.arange(4), np.arange(5)).draw(0, np.random.default_rng(0))


@pytest.mark.parametrize(("flag", "value"), [("--sample-rate", 44_100), ("--mean", -4.9), ("--std", 5.8), ("--frames", 1000)])
def test_fine_tuning_refuses_another_front_end_than_its_checkpoints(run, commands, tmp_path, flag, value):
    out = tmp_path / "out"
    commands["finetune.py"].prepare(out)
    commands["evaluate.py"].prepare(tmp_path / "other")
    done = run("finetune.py", "--source", "gc", "--data", out, "--out", out / "run", "--init", tmp_path / "other/start.pt",
               flag, value, check=False)
    assert done.returncode == 1 and f"{flag} {value}" in done.stderr and "was trained with" in done.stderr


def test_a_checkpoint_whose_front_end_does_not_fit_its_encoder_is_refused(commands, tmp_path):
    commands["evaluate.py"].prepare(tmp_path / "out")
    path = tmp_path / "out/start.pt"
    checkpoint = load_checkpoint(path, ["pretrain"])
    checkpoint["front_end"]["frames"] = 100
    save_checkpoint(path, checkpoint)
    with pytest.raises(ValueError, match="start.pt: not a whole checkpoint .*100×32 values"):
        starting_encoder(Settings(init=str(path)), None)
