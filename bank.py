"""Embeddings that are made once and then only looked up: banks of what frozen CLIP says of frames and captions.

CLIP never changes, so it runs once over the data; no training ever sees an image or a text. A bank is an array on
disk, filled by all ranks together, and which of its rows belong to which clip.

D  embedding     M  rows of a bank     N  clips or other items     B  a batch of them
"""
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from clip_load import fingerprint
from data import Unreadable, load_image
from processes import (
    Claim,
    barrier,
    is_array,
    new_array,
    ranks,
    stamp,
    worker_starts,
    write_whole,
)

TO_DO, DONE, UNREADABLE = 0, 1, 2  # state of a row


class Readable(torch.utils.data.Dataset):
    """Items read one by one for inference: row -> (row, tensors), or (row, None, why) where it can't be read."""

    def __init__(self, items, read):
        self.items, self.read = items, read

    def __getitem__(self, row):
        try:
            return row, self.read(self.items[row])
        except Unreadable as error:
            return row, None, str(error)


def split_readable(samples):
    """Collate for Readable: (rows, batch of tensors), (rows, reasons) of the unreadable."""
    good, bad = [s for s in samples if s[1] is not None], [s for s in samples if s[1] is None]
    return ([s[0] for s in good], default_collate([s[1] for s in good]) if good else None,
            [s[0] for s in bad], [s[2] for s in bad])


@torch.no_grad()
def embed(items, read, encode, out, state, device, workers, description=None, unit=True):
    """Fill out (M, D) with embeddings of items, of length 1 if `unit`; state (M,) becomes DONE or UNREADABLE.

    Rows whose state is not 0 are done already. The ranks share the rest. read(item) -> tensor(s), in worker
    processes; encode(tensors) -> (B, D). With a description there is a progress bar.
    """
    rank, size = ranks()
    todo = np.arange(rank, len(state), size)  # a rank's share depends on no other rank's progress
    todo = todo[np.asarray(state)[todo] == TO_DO]
    if not len(todo):
        return
    loader = DataLoader(Readable(items, read), batch_size=128, sampler=todo.tolist(), num_workers=workers,
                        collate_fn=split_readable, worker_init_fn=worker_starts)
    with tqdm(total=len(todo), desc=description, disable=rank > 0 or not description, unit="") as bar:
        for rows, tensors, bad, reasons in loader:
            if rows:
                tensors = tensors if isinstance(tensors, (tuple, list)) else [tensors]
                features = encode(*(tensor.to(device) for tensor in tensors))                # (B, D)
                features = F.normalize(features.float(), dim=1) if unit else features.float()
                out[rows] = features.cpu().numpy()
                state[rows] = DONE  # after its rows: who is killed in between does them again
            for row, reason in zip(bad, reasons):
                state[row] = UNREADABLE
                bar.write(f"skipped: {reason}", file=sys.stderr)
            bar.update(len(rows) + len(bad))


def embed_all(items, read, encode, dimensions, device, workers=0, description=None, unit=True):
    """Embeddings of items in memory, the same on every rank: (N, D) float32, (N,) bool readable."""
    out, state = np.zeros((len(items), dimensions), np.float32), np.zeros(len(items), np.uint8)
    embed(items, read, encode, out, state, device, workers, description, unit=unit)
    out, state = torch.from_numpy(out).to(device), torch.from_numpy(state).to(device)
    if dist.is_initialized():
        dist.all_reduce(out)  # a sum: one rank filled a row, the others left it 0
        dist.all_reduce(state)
    return out.cpu(), state.cpu() == DONE


def is_unit(vectors):
    """Which vectors (..., D) have length 1, but for the rounding of fp16 -> (...,) bool; one that holds NaN has not."""
    vectors = vectors.astype(np.float32)
    return np.abs((vectors * vectors).sum(-1) - 1) < 0.01


class Bank:
    """Frozen target embeddings on disk, (M, D) fp16 unit vectors, and the rows that belong to each clip."""

    def __init__(self, path, rows, starts):
        self.path, self.rows, self.starts = path, rows, starts
        self.embeddings = np.load(path, mmap_mode="r")                                       # (M, D)

    def __reduce__(self):  # a worker process opens the file itself
        return Bank, (self.path, self.rows, self.starts)

    def of(self, i):
        """Rows that belong to clip i; empty if none of its frames could be read."""
        return self.rows[self.starts[i]:self.starts[i + 1]]

    def draw(self, i, rng):
        """One of clip i's embeddings -> (D,) float32. Raises ValueError where its length is not 1."""
        row = rng.choice(self.of(i))
        target = self.embeddings[row]
        if not is_unit(target):
            raise ValueError(f"{self.path}: row {row} is not a unit vector, so the file is damaged; delete its folder "
                             f"to make it anew")
        return torch.from_numpy(target.astype(np.float32))

    def check(self):
        """Raises ValueError where all targets are alike, so that there is nothing to learn from them."""
        if len(self.rows) == 0:
            return
        sample = np.linspace(0, len(self.rows) - 1, 1000).astype(int)  # of 7 million rows a thousand will do
        some = self.embeddings[self.rows[sample]].astype(np.float32)                              # (1000, D)
        if np.abs(some - some[0]).max() < 1e-3:
            raise ValueError(f"{self.path}: its rows are all alike, so there is nothing to learn; do the frames, or "
                             f"the captions, differ?")


@contextmanager
def shared_arrays(folder, note, made_of, arrays):
    """Arrays in files of `folder` that all ranks fill together, and that a killed run leaves to the next one.

    note: name of a file that holds `made_of`, a dict of what decides the content. Where it says otherwise, or an array
    is not whole, all arrays begin anew as zeros. arrays: {name: (dtype, shape)}. No other run gets the folder until
    every rank is done. Yields the arrays, mapped into memory.
    """
    paths, note, made_of = {name: folder / f"{name}.npy" for name in arrays}, folder / note, json.dumps(made_of)
    if ranks()[0] == 0:
        lock = Claim(folder / "lock", wait=True)
        fits = note.exists() and note.read_bytes() == made_of.encode()
        if not (fits and all(is_array(paths[name], *kind) for name, kind in arrays.items())):
            note.unlink(missing_ok=True)  # written last: arrays without it are not whole
            for name, kind in arrays.items():
                new_array(paths[name], *kind)
            write_whole(note, lambda part: part.write_text(made_of))
    barrier()
    yield [np.load(path, mmap_mode="r+") for path in paths.values()]
    barrier()
    if ranks()[0] == 0:
        lock.close()


def stored(folder, made_of, items, read, encode, dimensions, device, workers=0):
    """Unit embeddings of items kept in `folder` -> path of the file, (M, D) fp16, and which rows could be made (M,).

    Built once; reused when made of the same (as shared_arrays says), carried on with when a build was cut short.
    """
    folder, (rank, size) = Path(folder), ranks()
    arrays = {"embeddings": (np.float16, (len(items), dimensions)), "state": (np.uint8, (len(items),))}
    with shared_arrays(folder, "bank.json", made_of, arrays) as (embeddings, state):
        vectors, states = embeddings[rank::size], state[rank::size]  # this rank's share, as `embed` cuts it
        states[states != DONE] = TO_DO  # what could not be read last time is tried again, and named again
        for i in range(0, len(states), 2 ** 16):  # what a power cut lost is made again; in pieces, to spare memory
            states[i:i + 2 ** 16][~is_unit(vectors[i:i + 2 ** 16])] = TO_DO
        embed(items, read, encode, embeddings, state, device, workers, f"bank {folder}")
        assert states.all(), "everything is embedded or unreadable by now"
    return folder / "embeddings.npy", np.asarray(state) == DONE


def frame_bank(folder, clips, clip, device, workers):
    """Bank of CLIP's embeddings of all frames of all clips, kept in `folder`.

    It is made anew when a file changes (names, sizes, times). Raises ValueError where over 1 % of the clips have no
    readable frame.
    """
    frames = [frame for c in clips for frame in c.frames]
    digest = hashlib.sha256(str(clip.image_size).encode())
    if ranks()[0] == 0:  # in shared_arrays only rank 0 compares it
        for frame in frames:
            digest.update(os.fsencode(f"{frame} {stamp(frame)}\n"))
    made_of = {"clip": fingerprint(clip), "files": digest.hexdigest(), "frames": len(frames), "clips": len(clips)}
    path, done = stored(folder, made_of, frames, partial(load_image, size=clip.image_size), clip.encode_image,
                        clip.visual.proj.shape[1], device, workers)
    rows = np.flatnonzero(done)
    starts = np.searchsorted(rows, np.cumsum([0] + [len(c.frames) for c in clips]))  # (N + 1,) positions in `rows`
    empty = int((np.diff(starts) == 0).sum())
    if ranks()[0] == 0 and len(rows) < len(frames):
        print(f"{folder}: {len(frames) - len(rows)} of {len(frames)} frames unreadable, {empty} of {len(clips)} clips "
              f"left out for it", file=sys.stderr)
    if empty > 0.01 * len(clips):
        raise ValueError(f"{empty} of {len(clips)} clips have no readable frame, over 1 %; see the messages above "
                         f"(delete {folder} to try again)")
    return Bank(path, rows, starts)


def text_embeddings(folder, texts, clip, tokenizer, device):
    """Unit text embeddings of CLIP, kept in `folder`, (M, D) fp16 -> their path."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    made_of = {"clip": fingerprint(clip), "tokens": tokenizer.vocab_size, "texts": digest, "count": len(texts)}
    path, _ = stored(folder, made_of, texts, lambda text: tokenizer([text])[0], clip.encode_text,
                     clip.text_projection.shape[1], device)
    return path


def caption_bank(folder, clips, captions, clip, tokenizer, device):
    """Bank of CLIP's embeddings of captions, each a row, for clips whose captions are among them."""
    row = {caption: i for i, caption in enumerate(captions)}
    path = text_embeddings(folder, captions, clip, tokenizer, device)
    rows = np.array([row[caption] for c in clips for caption in c.captions], dtype=np.int64)
    return Bank(path, rows, np.cumsum([0] + [len(c.captions) for c in clips]))
