"""Mining against brute force, pools of captions, what each source leaves behind, and a language model's captions."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, flat, tiny_language_model
from PIL import Image

import curate
from clip_load import Tokenizer, fingerprint, load_clip
from curate import (
    Generation,
    caption_pool,
    clean,
    continuations,
    generate,
    mine,
    top_captions,
    union,
)
from readers import read_index


def unit(count, dimensions, seed):
    """Random unit vectors in fp16."""
    x = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def brute_force(images, captions, k):
    """All cosines in float64, sorted one row at a time, ties by index."""
    cosines = images.astype(np.float64) @ captions.astype(np.float64).T
    order = np.stack([np.lexsort((np.arange(len(captions)), -row))[:k] for row in cosines])
    return np.take_along_axis(cosines, order, 1).astype(np.float32), order


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """2,000 images and 3,000 captions on disk, some captions alike; and the right answer."""
    folder = tmp_path_factory.mktemp("vectors")
    images, captions = unit(2000, 64, 0), unit(3000, 64, 1)
    captions[[100, 2000, 2999]] = captions[7]
    captions[500:540] = captions[400]  # more ties than a shortlist holds
    images[3], images[1999] = captions[7], captions[400]
    np.save(folder / "images.npy", images)
    np.save(folder / "captions.npy", captions)
    return folder, brute_force(images, captions, 10)


@pytest.mark.parametrize(("rows", "columns"), [(2000, 3000), (50, 3000), (64, 100), (999, 7)])
def test_mining_equals_brute_force_whatever_the_blocks(vectors, tmp_path, rows, columns):
    folder, (cosines, indices) = vectors
    found = mine(folder / "images.npy", folder / "captions.npy", tmp_path, 10, rows=rows, columns=columns)
    assert np.array_equal(found[1], indices) and np.array_equal(found[0], cosines)


@pytest.mark.parametrize("rough", [torch.float16, torch.bfloat16])
def test_mining_is_exact_whatever_the_shortlist_is_computed_in(vectors, monkeypatch, rough):
    """All images look at the same 300 captions, which differ by less than such a type can tell."""
    images, captions = np.load(vectors[0] / "images.npy")[:300].astype(float), np.load(vectors[0] / "captions.npy")
    near = images[5] + np.random.default_rng(2).normal(size=(300, 64)) * 1e-3
    captions[600:900] = near / np.linalg.norm(near, axis=1, keepdims=True)
    images += images[5]
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float16)
    cosines, indices = brute_force(images, captions, 10)
    monkeypatch.setattr(curate, "rough_type", lambda device: rough)
    found = top_captions(images, captions, 10, columns=999)
    assert np.array_equal(found[1], indices) and np.array_equal(found[0], cosines)


def test_ties_are_ranked_by_index(vectors):
    folder, _ = vectors
    images, captions = np.load(folder / "images.npy"), np.load(folder / "captions.npy")
    assert top_captions(images[[3, 1999]], captions, 10)[1][:, :4].tolist() == [[7, 100, 2000, 2999], [400, 500, 501, 502]]


def test_a_pool_smaller_than_k_is_taken_whole(tmp_path):
    np.save(tmp_path / "i.npy", unit(5, 16, 0))
    np.save(tmp_path / "c.npy", unit(3, 16, 1))
    cosines, indices = mine(tmp_path / "i.npy", tmp_path / "c.npy", tmp_path / "out", 10)
    assert indices.shape == (5, 3) and (np.sort(indices, 1) == [0, 1, 2]).all() and (np.diff(cosines, axis=1) <= 0).all()


DRIVER = """import sys, time
sys.path.insert(0, {root!r})
import curate, processes
search = curate.top_captions
def slowly(*args):
    time.sleep({pause})
    return search(*args)
curate.top_captions = slowly
def main():
    processes.start_ranks()
    curate.mine({folder!r} + "/images.npy", {folder!r} + "/captions.npy", {out!r}, 10, rows=50)
processes.run(main)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_mining_killed_and_resumed_or_shared_by_ranks_is_the_same(vectors, tmp_path, run, ranks):
    folder, (cosines, indices) = vectors
    driver, out = tmp_path / "driver.py", tmp_path / "out"
    driver.write_text(DRIVER.format(root=str(ROOT), folder=str(folder), out=str(out), pause=0.1))
    process = subprocess.Popen([sys.executable, str(driver)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "mined.json").exists() and np.load(out / "done.npy").sum() > 200):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = np.load(out / "done.npy")
    assert 0 < before.sum() < 2000
    np.lib.format.open_memmap(out / "cosines.npy", "r+")[0] = 7  # were it done again, this would be gone
    driver.write_text(DRIVER.format(root=str(ROOT), folder=str(folder), out=str(out), pause=0))
    run(driver, ranks=ranks)
    assert np.load(out / "done.npy").all() and (np.load(out / "cosines.npy")[0] == 7).all()
    assert np.array_equal(np.load(out / "indices.npy"), indices)
    assert np.array_equal(np.load(out / "cosines.npy")[1:], cosines[1:])


def test_a_clips_captions_are_the_union_over_its_frames():
    """Two frames, three captions each; caption 5 found twice keeps its better cosine; equal cosines go by index."""
    cosines = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.1]])
    indices = np.array([[9, 5, 2], [5, 1, 8]])
    assert union(cosines, indices, -1.0) == ([9, 5, 1, 2, 8], [0.5, 0.4, 0.3, 0.2, 0.1])
    assert union(cosines, indices, 0.3) == ([9, 5, 1], [0.5, 0.4, 0.3])


# ------------------------------------------------------------------------------ the pool, the pairs

@pytest.fixture
def flags(world, small_clip):
    return {"--data": world, "--clip": small_clip, "--vocab": world / "vocab.txt.gz", "--leave-out": "none",
            "--workers": 0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_mined_captions_are_those_that_clip_likes_best(run, flags, world, small_clip, ranks):
    for name in ("banks", "mined"):
        shutil.rmtree(world / name, ignore_errors=True)  # what another run made would be used
    done = run("curate.py", *flat(flags | {"--source": "ac", "--preview": 3}), ranks=ranks)
    clips = read_index(world / "ac.jsonl", need=("audio", "frames", "captions"))
    pool = caption_pool("ac", world)
    assert len(clips) == 64 and f"pool of {len(pool)} captions" in done.stdout and "pairs (paper: 1080078)" in done.stdout
    assert f"{sum(len(c.captions) for c in clips)} pairs" in done.stdout and "next: python finetune.py" in done.stdout
    assert all(10 <= len(c.captions) <= 40 and len(set(c.captions)) == len(c.captions) for c in clips)
    rows = [json.loads(line) for line in (world / "ac.jsonl").read_text().splitlines()]
    assert all(row["scores"] == sorted(row["scores"], reverse=True) for row in rows)
    with Image.open(world / "ac.png") as sheet:
        assert sheet.height > 300
    bank = next((world / "banks").glob("ac-[0-9a-f]*")) / "embeddings.npy"
    frames = next((world / "banks").glob("train-*")) / "embeddings.npy"
    cosines = np.load(frames)[:4].astype(np.float64) @ np.load(bank).astype(np.float64).T  # of the first clip's frames
    assert rows[0]["captions"][0] == pool[cosines.max(0).argmax()]
    assert rows[0]["scores"][0] == pytest.approx(cosines.max(), abs=1e-4)


def test_what_audiocaps_tests_with_gets_no_captions(leaking, world, small_clip):
    settings = curate.Settings(source="ac", data=str(leaking), clip=str(small_clip), vocab=str(world / "vocab.txt.gz"),
                               leave_out=str(leaking), workers=0)
    _, count, found, _ = curate.mined_captions(settings, leaking, torch.device("cpu"))
    assert count == 4 and [bool(found(i)[0]) for i in range(6)] == [True, False, True, True, False, True]


def test_prompts_differ_by_source(world, small_clip):
    """Captions of sounds are searched as "the sound of …", those of pictures as "a photo of …"."""
    clip = load_clip(small_clip)
    tokenizer = Tokenizer(world / "vocab.txt.gz", clip.context_length)
    for source, prompt in (("ac", "the sound of"), ("vc", "a photo of"), ("fc", "a photo of")):
        curate.mined_captions(curate.Settings(source=source, data=str(world), clip=str(small_clip), leave_out="none",
                                              vocab=str(world / "vocab.txt.gz"), workers=0), world, torch.device("cpu"))
        bank = np.load(world / "banks" / f"{source}-{fingerprint(clip)}" / "embeddings.npy")
        text = torch.nn.functional.normalize(clip.encode_text(tokenizer([f"{prompt} {caption_pool(source, world)[0]}"])))
        assert np.abs(bank[0] - text[0].numpy()).max() < 2e-3


def test_gold_labels_and_random_captions_come_with_the_gold_clips(run, flags, world):
    gold = read_index(world / "gold.jsonl", need=("audio", "captions"))
    clips = {}
    for source in ("gc", "gl", "rc"):
        done = run("curate.py", *flat({"--data": world, "--source": source}))
        clips[source] = read_index(world / f"{source}.jsonl", need=("audio", "captions"))
        assert f"{len(gold)} of {len(gold)} clips with captions" in done.stdout
    assert [c.captions for c in clips["gc"]] == [c.captions for c in gold]
    assert [c.captions for c in clips["gl"]] == [c.labels for c in gold]
    right = np.mean([c.captions == g.captions for c, g in zip(clips["rc"], gold)])
    assert right < 0.2 and {c.captions[0] for c in clips["rc"]} <= {g.captions[0] for g in gold}


def test_an_empty_pool_and_a_threshold_that_nothing_reaches_are_said(run, flags, world, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("audio", "frames"):
        (own / name).symlink_to(world / name)
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()[:8]]
    del rows[2]["frames"]
    (own / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own / "ac.txt").write_text("\n \n")
    flags |= {"--data": own, "--source": "ac"}
    done = run("curate.py", *flat(flags), check=False)
    assert done.returncode == 1 and "ac.txt: no caption in it" in done.stderr and "Traceback" not in done.stderr
    (own / "ac.txt").write_text("a hum\na deep buzz\n" + "a very long caption " * 30 + "\na hum\n", encoding="utf-8")
    done = run("curate.py", *flat(flags))
    assert "7 of 7 clips with captions, 21 pairs" in done.stdout and "7 of 8 clips train" in done.stdout
    assert "pool of 3 captions, 1 of them cut to 16 tokens" in done.stdout
    done = run("curate.py", *flat(flags | {"--threshold": 0.99}), check=False)
    assert done.returncode == 1 and "lower --threshold" in done.stderr
    done = run("curate.py", *flat(flags | {"--source": "vc"}), check=False)
    assert done.returncode == 1 and "mscoco" in done.stderr
    done = run("curate.py", *flat(flags | {"--source": "fc"}), check=False)
    assert done.returncode == 1 and "python curate.py generate --out" in done.stderr


# -------------------------------------------------------------------------------- free captions

def test_what_a_model_wrote_is_cleaned_by_hand():
    text = ' A dog runs on the beach.\n- "Two cats   sleep."\n3. See http://x.y for more here\n- no\n• A man sits\n- cut of'
    assert clean(text) == ["A dog runs on the beach.", "Two cats sleep.", "A man sits"]


def test_generation_goes_on_where_it_was_cut_short(tmp_path, monkeypatch):
    """A tiny GPT-2 with random weights babbles; a run cut in two gives the same captions as one in a piece."""
    tiny_language_model(tmp_path / "model")
    (tmp_path / "primers.txt").write_text("a dog runs\ntwo cats sleep\n")
    whole = Generation(model=str(tmp_path / "model"), out=str(tmp_path / "whole.txt"), count=60, shots=2, batch=4,
                       data=str(tmp_path / "primers.txt"), tokens=24)
    cpu = torch.device("cpu")
    generate(whole, cpu)
    captions = (tmp_path / "whole.txt").read_text().splitlines()
    assert len(captions) == 60 == len({caption.lower() for caption in captions})
    parts = replace(whole, out=str(tmp_path / "parts.txt"))

    def cut(*args):  # 60 captions of 4 tokens and more take at least 3 batches of 4 × 24 tokens
        if args[-1] == 2:
            raise KeyboardInterrupt
        return continuations(*args)

    monkeypatch.setattr(curate, "continuations", cut)
    with pytest.raises(KeyboardInterrupt):
        generate(parts, cpu)
    monkeypatch.undo()
    assert json.loads((tmp_path / "parts.txt.json").read_text())["batches"] == 2
    with open(tmp_path / "parts.txt", "a") as file:
        file.write("what a killed run wrote after its last note\n")
    generate(parts, cpu)
    assert (tmp_path / "parts.txt").read_text().splitlines() == captions
    with pytest.raises(ValueError, match="was made otherwise"):
        generate(replace(parts, temperature=2.0), cpu)
    os.truncate(tmp_path / "parts.txt", 100)
    with pytest.raises(ValueError, match="is shorter than when"):
        generate(parts, cpu)
