"""Tokenizer, download, weights, and the three changes."""
import gzip
import hashlib
import http.server
import importlib
import json
import os
import pickle
import sys
import threading
import types

import pytest
import torch
from conftest import torchscript_archive

import clip_load
import evaluate
from clip_load import (
    Tokenizer,
    audio_encoder_from_clip,
    download,
    load_clip,
    resize_positions,
)
from data import FrontEnd
from model import CLIP


@pytest.fixture
def letters(tmp_path):
    """A vocabulary of three merges: l o, lo w</w>, e r</w>."""
    path = tmp_path / "vocab.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("#version\nl o\nlo w</w>\ne r</w>\n")
    return path


def test_bpe_by_hand(letters):
    """Ids: 256 bytes, 256 that end a word, 3 merges, start, end. "low" is one token; "lower" is lo, w, er."""
    tokenizer = Tokenizer(letters)
    w = list(clip_load.byte_symbols().values()).index("w")
    assert tokenizer.vocab_size == 512 + 3 + 2
    assert tokenizer(["low lower"])[0, :7].tolist() == [515, 513, 512, w, 514, 516, 0]


def test_every_byte_has_its_own_visible_symbol():
    symbols = clip_load.byte_symbols()
    assert len(set(symbols.values())) == 256 and symbols[ord("a")] == "a"
    assert not any(symbol.isspace() for symbol in symbols.values())


def test_ids_are_clips(shared):
    tokenizer = Tokenizer(shared / "data/clip/bpe_simple_vocab_16e6.txt.gz")
    for row in json.loads((shared / "golden/tokens.json").read_text()):
        assert tokenizer(row["text"])[0].tolist() == (row["ids"] + [0] * 77)[:77], row["text"]


def test_long_text_is_cut_and_keeps_its_end(letters):
    tokenizer = Tokenizer(letters, context_length=6)
    assert tokenizer(["low low low low low low low"]).tolist() == [[515, 513, 513, 513, 513, 516]]


def test_a_vocabulary_without_merges_is_bytes_alone(tmp_path):
    (tmp_path / "v.gz").write_bytes(b"")
    assert Tokenizer(tmp_path / "v.gz").vocab_size == 512 + 2


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"v\none two three\n"), gzip.compress(b"v\na b")[:-6]],
                         ids=["not gzip", "three symbols", "cut off"])
def test_broken_vocabulary_is_named(tmp_path, content):
    (tmp_path / "v.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.gz"):
        Tokenizer(tmp_path / "v.gz")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves b"x" * 3,000,000; honours Range; `cut` answers end early."""
    content, cut, ranges = b"x" * 3_000_000, 0, True

    def do_GET(self):
        wanted = self.headers.get("Range") if self.ranges else None
        start = int(wanted[6:-1]) if wanted else 0
        if start == len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        body = self.content[start:]
        if type(self).cut:
            type(self).cut -= 1
            body = body[:1_500_000]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.cut, Server.ranges = 0, True
    yield f"http://127.0.0.1:{server.server_port}/weights.pt"
    server.shutdown()


DIGEST = hashlib.sha256(Server.content).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_was_cut_off(url, tmp_path, ranges):
    Server.cut, Server.ranges = 1, ranges
    with pytest.raises(ConnectionError, match="again"):
        download(url, tmp_path / "w.pt", DIGEST)
    assert not (tmp_path / "w.pt").exists() and (tmp_path / "w.pt.part").stat().st_size == 1_500_000
    assert download(url, tmp_path / "w.pt", DIGEST).read_bytes() == Server.content
    assert os.listdir(tmp_path) == ["w.pt"]


def test_download_that_was_killed_before_the_rename_is_finished(url, tmp_path):
    (tmp_path / "w.pt.part").write_bytes(Server.content)
    assert download(url, tmp_path / "w.pt", DIGEST).read_bytes() == Server.content


def test_download_with_a_wrong_hash_never_gets_the_name(url, tmp_path):
    with pytest.raises(ValueError, match="SHA-256"):
        download(url, tmp_path / "w.pt", "0" * 64)
    assert os.listdir(tmp_path) == []


def test_cached_weights_that_fail_their_hash_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_load, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python clip_load\.py"):
        clip_load.cached("ViT-B/32")
    (tmp_path / "ViT-B-32.pt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt: SHA-256.*delete"):
        clip_load.cached("ViT-B/32")


def test_without_a_network_the_command_says_what_to_do(run, tmp_path):
    done = run("clip_load.py", check=False, env={"HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 1 and "run the same command again" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archive_loads_to_the_same_outputs_as_its_state_dict(tmp_path):
    torch.manual_seed(0)
    clip = CLIP(64, 16, 64, 2, 16, 600, 64, 1, 32)
    torch.save({k: v.half() for k, v in clip.state_dict().items()}, tmp_path / "plain.pt")
    torchscript_archive(clip, tmp_path / "script.pt")
    plain, script = load_clip(tmp_path / "plain.pt"), load_clip(tmp_path / "script.pt")
    images, tokens = torch.randn(3, 3, 64, 64), torch.randint(600, (3, 16))
    assert torch.equal(plain.encode_image(images), script.encode_image(images))
    assert torch.equal(plain.encode_text(tokens), script.encode_text(tokens))
    assert script.visual.proj.dtype == torch.float32


def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"visual.conv1.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        load_clip(tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"bare\.pt"):
        load_clip(tmp_path / "bare.pt")
    assert not (tmp_path / "ran").exists()


def test_an_archive_of_modules_that_hold_each_other_is_refused(tmp_path):
    module = torch.nn.Module()
    vars(module)["self"] = module
    torch.save(module, tmp_path / "circle.pt")
    with pytest.raises(ValueError, match=r"circle\.pt: not the weights of a CLIP"):
        load_clip(tmp_path / "circle.pt")


def authors_file(path, encoder, clip, cfg):
    """The authors' checkpoint: a pickled settings object beside four state dicts, the kernel with three channels."""
    state = {}
    for key, value in encoder.state_dict().items():
        for ours, theirs in (("transformer.", "encoder."), ("ln_pre.", "pre_encoder.ln."), ("conv1.", "pre_encoder.conv1."),
                             ("ln_post.", "post_encoder.ln."), ("proj", "post_encoder.proj"),
                             ("positional_embedding", "misc.positional_embedding"),
                             ("class_embedding", "misc.class_embedding")):
            if key.startswith(ours):
                state[theirs + key[len(ours):]] = value
    three = state["pre_encoder.conv1.weight"].repeat(1, 3, 1, 1)
    noise = torch.randn_like(three)
    state["pre_encoder.conv1.weight"] = three + noise - noise.mean(1, keepdim=True)  # different channels, the same mean
    image = {"post_encoder.proj": clip.visual.proj.half()}
    torch.save({"cfg": cfg, "model": (image, state, {}, {"loss_head.logit_scale": torch.tensor(3.5)})}, path)


@pytest.fixture
def omegaconf(monkeypatch):
    """A module of that name with a class whose objects pickle as OmegaConf's do; gone again when the file is read."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__, "__init__": lambda self: vars(self).update(
        _content={"lr": 0.2}, _metadata=None)})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    return module.DictConfig


def test_the_authors_checkpoint_gives_the_features_of_the_encoder_it_holds(
        run, tmp_path, small_clip, world, omegaconf, monkeypatch):
    clip = load_clip(small_clip)
    encoder = clip_load.audio_encoder_from_clip(clip)
    authors_file(tmp_path / "00071478.pth", encoder, clip, omegaconf())
    monkeypatch.undo()
    done = run("clip_load.py", "import-vipant", tmp_path / "00071478.pth", tmp_path / "out.pt", "--clip", small_clip,
               "--vocab", world / "vocab.txt.gz")
    assert "next: python evaluate.py" in done.stdout
    model = evaluate.Model(tmp_path / "out.pt")
    x = torch.randn(2, 1, 1000, 128)
    assert torch.allclose(model.encoder(x), encoder(x), atol=1e-5) and model.log_scale == 3.5
    assert model.front_end == FrontEnd(44_100, 128, 1000, -4.93839311, 5.75751113)
    assert model.identity["row"] == "vip-AnT"


def test_the_authors_checkpoint_needs_its_own_clip_and_its_own_form(tmp_path, small_clip):
    clip = load_clip(small_clip)
    authors_file(tmp_path / "a.pth", clip_load.audio_encoder_from_clip(clip), clip, {})
    clip.visual.proj.data += 1
    with pytest.raises(ValueError, match=r"a\.pth: .*it was trained against another CLIP"):
        clip_load.import_vipant(tmp_path / "a.pth", clip)
    for content in ({"model": 3}, {"cfg": {}}, {"model": ({}, {"x": torch.zeros(1)}, {}, {})}, [1]):
        torch.save(content, tmp_path / "b.pth")
        with pytest.raises(ValueError, match=r"b\.pth: not a checkpoint of the authors'"):
            clip_load.import_vipant(tmp_path / "b.pth", clip)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "importlib.import_module"])
def test_code_in_the_authors_checkpoint_is_refused_and_nothing_runs(tmp_path, small_clip, name):
    module, function = name.rsplit(".", 1)

    class Evil:
        def __reduce__(self):
            return getattr(importlib.import_module(module), function), (f"touch {tmp_path}/ran",)
    clip = load_clip(small_clip)
    authors_file(tmp_path / "evil.pth", clip_load.audio_encoder_from_clip(clip), clip, Evil())
    with pytest.raises(ValueError, match=rf"evil\.pth.*{function}, which weights have no use for; refused"):
        clip_load.import_vipant(tmp_path / "evil.pth", clip)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_no_clip_are_named(tmp_path, small_clip):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not the weights of a CLIP"):
        load_clip(tmp_path / "other.pt")
    weights = torch.load(small_clip, weights_only=True)
    torch.save(weights | {"token_embedding.weight": torch.zeros(9, 0)}, tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"narrow\.pt: not the weights of a CLIP"):
        load_clip(tmp_path / "narrow.pt")
    (tmp_path / "cut.pt").write_bytes(small_clip.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        load_clip(tmp_path / "cut.pt")


def test_resize_to_the_same_grid_changes_nothing():
    pos = torch.randn(1 + 49, 8)
    assert torch.equal(resize_positions(pos, (7, 7), (7, 7)), pos)


def test_resize_by_hand():
    """Rows are time: two rows become four, bilinear with align_corners=False; the class position stays."""
    pos = torch.tensor([[9.0], [0.0], [4.0]])
    assert resize_positions(pos, (2, 1), (4, 1)).flatten().tolist() == [9, 0, 1, 3, 4]


def test_kernel_is_averaged_over_colours(small_clip):
    clip = load_clip(small_clip)
    encoder = audio_encoder_from_clip(clip, 60, 32, (8, 8))
    grey = torch.randn(1, 1, 16, 16)
    rgb = torch.nn.functional.conv2d(grey.expand(1, 3, 16, 16), clip.visual.conv1.weight)
    assert torch.allclose(torch.nn.functional.conv2d(grey, encoder.conv1.weight) * 3, rgb, atol=1e-5)
