"""Make the numbers and pictures of README.md anew: whatever it reports is what these runs printed.

    python tests/readme.py                           # everything; two hours on two cores
    python tests/readme.py toy figures               # only these parts
    python tests/readme.py none                      # no run: fill README.md from what the last ones printed

Each part's output is kept in assets/<part>.txt, and README.md's blocks between <!-- name --> and <!-- end --> are
written from there. The runs themselves live in out/readme, and what is there is not done again; delete it first for
figures of time. `heads` and a part of `bench` need ESC-50 or ESC-10 (--esc50), `bench` also faiss-cpu.
"""
import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS, WORK = ROOT / "assets", ROOT / "out" / "readme"
LADDER, TRAINED = "out/toy/ladder/seed", "--checkpoint out/toy/pretrain/checkpoint.pt"
PARTS = {
    "toy": ["pretrain.py --data toy",
            f'evaluate.py --task search --audio data/toy/audio --query "a deep hum , twice" --top 5 {TRAINED}',
            f'evaluate.py --task tag --audio data/toy/audio/test_77.wav --labels "hum, chirp, hiss" {TRAINED}'],
    "figures": ["figures.py --out assets"],
    "faults": ["-m pytest -q -n auto tests/test_fuzz.py tests/test_faults.py"],
    "ladder": ["finetune.py ladder --seeds 3",
               "evaluate.py --task curve --out assets --compare " + " ".join(
                   f"{LADDER}0/{row}/checkpoint.pt" for row in ("vip-AnT", "VA-Rand")),
               "evaluate.py --task scaling --data toy --target 95 --out assets --compare " + " ".join(
                   f"{LADDER}{seed}/+ATGC{few}/checkpoint.pt" for seed in range(3) for few in (1, 5, 20, ""))],
    # these want ESC-50 or ESC-10, bench faiss-cpu, too
    "bench": ["tests/bench.py step", "tests/bench.py input", "tests/bench.py mining --rounds 3"],
    "heads": ["finetune.py --head esc10 --data data/esc50", "finetune.py --head esc10 --data data/esc50 --last-layers 0"],
}


SNIPPETS = {  # the code that README.md shows: file, its first line, its last
    "the front end": ("data.py", "x = fbank(floating(waves)", "return ((x - self.mean)"),
    "the ear": ("clip_load.py", "encoder = blank_audio_encoder(clip, frames", "return inherit(encoder, state"),
    "the loss": ("model.py", "a, b = F.normalize(a.float()", "+ F.cross_entropy(scale * b"),
    "the step": ("train.py", "for group in optimizer.param_groups:", "optimizer.zero_grad()"),
    "the bank": ("bank.py", "vectors, states = embeddings[rank::size]", "embed(items, read, encode, embeddings, state"),
    "stage 1": ("pretrain.py", "start = audio_encoder_from_clip if", "samples = AudioSamples(clips, [train_bank]"),
    "the captions": ("curate.py", "best = {}", "return order, [best"),
    "the start": ("finetune.py", "learner = AudioLearner(encoder, front_end)", "learner.log_scale.data.copy_"),
    "the ranks": ("evaluate.py", "similarity = (audio @ captions.T)", "return a2t, (similarity"),
}


# ---------------------------------------------------------------------------------------- runs

def run(part):
    """Run a part's commands in out/readme; their output goes to the screen and into assets/<part>.txt."""
    lines = []
    for command in PARTS[part]:
        words = re.findall(r'"([^"]*)"|(\S+)', command)
        words = [quoted or plain for quoted, plain in words]
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        print(f"$ python {command}", flush=True)
        began, own = time.time(), []
        where = ROOT if part == "faults" else WORK
        with subprocess.Popen([sys.executable, *words], cwd=where, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                own.append(line)
        if process.returncode:
            sys.exit(f"this failed: python {command}")
        lines += [f"$ python {command}\n", *own, f"# {time.time() - began:.0f} s on {machine()}\n"]
    (ASSETS / f"{part}.txt").write_text("".join(lines))


def machine():
    """The processor, as its maker calls it, and how many cores may be used."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{len(os.sched_getaffinity(0)) if names else os.cpu_count()} cores of {names[0] if names else platform.machine()}"


# --------------------------------------------------------------------------------------- blocks

def outputs(part):
    """What a part has printed -> [(command, its lines, seconds)], none where it was not run."""
    path = ASSETS / f"{part}.txt"
    found = re.findall(r"^\$ python (.*?)\n(.*?)^# (\d+) s on", path.read_text() if path.exists() else "", re.MULTILINE | re.DOTALL)
    return [(command, text.splitlines(), int(seconds)) for command, text, seconds in found]


def duration(seconds):
    return f"{seconds // 60} minutes" if seconds >= 600 else f"{seconds // 60} minutes {seconds % 60} seconds"


def code(lines):
    return "```\n" + "\n".join(lines).strip("\n") + "\n```"


def value(lines, start, column=-2):
    """A number in % out of the table row that begins so; columns are the variants, then chance."""
    row = next(line for line in lines if line.strip().startswith(start))
    return re.findall(r"(\d+\.\d)(?: \[.*?\])?", row)[column]


def quick_start():
    (_, lines, seconds), (search, found, _), (tag, tagged, _) = outputs("toy")
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("audio-text: ")):]
    table = [line for line in table if not line.startswith("saved in")]
    a2t, v2t = value(lines, "audio -> text R@1"), value(lines, "frame -> text R@1")
    chance = value(lines, "audio -> text R@1", -1)
    return {
        "quick start": f"It took {duration(seconds)} and ended with\n\n{code(table)}",
        "what it found": f"The encoder has never seen a caption with a sound, and finds the right one of 144 things for "
                         f"{a2t} % of the held-out\nsounds (chance: {chance} %); CLIP itself, looking at the clips' "
                         f"frames, finds {v2t} %.",
        "search": code([f"$ python {search}", *found, "", f"$ python {tag}", *tagged])}


def ladder():
    (_, lines, _), (_, curve, _), (_, fit, _) = outputs("ladder")
    begin = next(i for i, line in enumerate(lines) if line.startswith("the toy world, "))
    end = next(i for i, line in enumerate(lines) if line.startswith("Fig. 5"))
    by_epoch = "; ".join(re.sub(r": image->audio precision@1 by epoch: ", " ", line) for line in curve if "by epoch" in line)
    line = next(line for line in fit if "log2" in line).strip()
    return {"ladder": f"{code(lines[begin:end])}",
            "fig 5 and 7": f"Image-to-audio precision@1 after each epoch, seed 0: {by_epoch}.\nThree seeds: {line}."}


def bench():
    found = {command: " ".join(lines) for command, lines, _ in outputs("bench")}
    step, clips, mined = (next((text for command, text in found.items() if what in command), "")
                          for what in ("step", "input", "mining"))
    rows = ["| what | here | yardstick | ratio |", "|---|---|---|---|"]
    if match := re.search(r"fp32: ([\d.]+) clips/s, torch.nn.TransformerEncoder ([\d.]+); speed ratio ([\d.]+)", step):
        rows.append("| the paper's step in fp32, batch 8: forward, loss, backward, LARS | {} clips/s | {}, "
                    "`torch.nn.TransformerEncoder` of the same size | {} |".format(*match.groups()))
    if match := re.search(r"process: ([\d.]+) GiB, torch.nn.TransformerEncoder ([\d.]+); ratio ([\d.]+)", step):
        rows.append("| its peak memory | {} GiB | {} GiB | {} |".format(*match.groups()))
    for place, what in (("from the files", "clips into the step on one core, from Ogg files"),
                        ("from the pack", "the same from a pack")):
        if match := re.search(place + r": (\d+) clips/s a core, soundfile \+ Kaldi (\d+); speed ratio ([\d.]+)", clips):
            rows.append("| {} | {} clips/s | {}, soundfile and Kaldi's filterbanks clip by clip | {} |"
                        .format(what, *match.groups()))
    if match := re.search(r"decoding: ([\d,]+) clips/s from the files, ([\d,]+) from the pack", clips):
        rows.append("| what a core decodes, filterbanks on the device | {} clips/s | {} from the pack | |"
                    .format(*match.groups()))
    if match := re.search(r"top 10: ([\d.]+) s, faiss ([\d.]+) s; speed ratio ([\d.]+)", mined):
        rows.append("| exact top 10 of 50,000 × 50,000 × 512 | {} s | {} s, `faiss.IndexFlatIP` | {} |"
                    .format(*match.groups()))
    return {"bench": "\n".join(rows)}


def heads():
    (mean, minutes), (probe, fewer) = (re.search(r"mean ([\d.]+ ± [\d.]+), 10 classes.*; ([\d.]+) min", lines[-1]).groups()
                                       for _, lines, _ in outputs("heads"))
    return {"heads": f"""
On the 400 recordings of ESC-10 alone, two CPU cores took {minutes} minutes for the first and {fewer} for the second. Accuracy
over the five folds (chance: 10 %): {mean} % and {probe} %.
""".strip("\n")}


def faults():
    (_, lines, _), = outputs("faults")
    begin = next(i for i, line in enumerate(lines) if "what was tried" in line)
    rows = [line for line in lines[begin + 1:] if re.match(r"\S.*  +\d+", line)]
    return {"faults": code(rows)}


def snippets():
    """Lines of the files that README.md explains, as they stand there."""
    found = {}
    for name, (file, first, last) in SNIPPETS.items():
        lines = (ROOT / file).read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
        end = next(i for i, line in enumerate(lines[begin:], begin) if line.strip().startswith(last))
        found[name] = "```python\n" + textwrap.dedent("\n".join(lines[begin:end + 1])) + "\n```"
    return found


def files():
    """Lines of code of each file, for the table of files."""
    lesson = ["data", "clip_load", "model", "bank", "train", "pretrain", "curate", "finetune", "evaluate"]
    counts = {path.stem: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    return {f"lines of {name}": str(count) for name, count in counts.items()} | {
        "lines in all": f"{sum(counts.values()):,}",
        "lines of the lesson": f"{sum(counts[name] for name in lesson):,}"}


def blocks():
    """Name of a block in README.md -> its text, as far as the runs are there."""
    found = files() | snippets()
    for part, make in (("toy", quick_start), ("ladder", ladder), ("bench", bench), ("heads", heads), ("faults", faults)):
        if outputs(part):
            found |= make()
    return found


def fill(text):
    """README.md with its blocks written anew, as far as the runs are there."""
    made = blocks()

    def anew(match):
        if match[1] not in made:
            return match[0]
        inner = made[match[1]]
        around = "\n" if "\n" in inner else ""
        return f"<!-- {match[1]} -->{around}{inner}{around}<!-- end -->"

    return re.sub(r"<!-- ([\w' ]+) -->(.*?)<!-- end -->", anew, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"{', '.join(PARTS)}, or none (all)")
    parser.add_argument("--esc50", default="data/esc50", help="folder of ESC-50, or of ESC-10 (data/esc50)")
    args = parser.parse_args()
    for place in (ASSETS, WORK / "data", WORK / "assets"):
        place.mkdir(parents=True, exist_ok=True)
    if Path(args.esc50).is_dir() and not (WORK / "data/esc50").exists():
        (WORK / "data/esc50").symlink_to(Path(args.esc50).resolve())
    for part in args.parts:
        if part != "none":
            run(part)
    for picture in (WORK / "assets").glob("*.png"):
        shutil.copy(picture, ASSETS)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
