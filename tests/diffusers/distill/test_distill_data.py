"""What `distill` learns from: pictures, captions, sizes, and their place on the disk."""

from __future__ import annotations

import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from deltaconv_core.diffusers.distill import samples as samples_module
from deltaconv_core.diffusers.distill.accelerated import AcceleratedProcesses
from deltaconv_core.diffusers.distill.batches import Batches
from deltaconv_core.diffusers.distill.buckets import corner, fit, make_buckets, nearest
from deltaconv_core.diffusers.distill.cache import Cache, read
from deltaconv_core.diffusers.distill.families import Cut, PixArt, StableDiffusionXL
from deltaconv_core.diffusers.distill.options import Options
from deltaconv_core.diffusers.distill.pictures import find_pictures, open_picture
from deltaconv_core.diffusers.distill.samples import Sample, Samples, encode_samples
from deltaconv_core.diffusers.distill.teacher import load_teacher
from deltaconv_core.errors import DeltaConvError
from testing.distill_command import SIZES, draw, save_pipeline

# ---- sizes ----


@pytest.mark.parametrize(("resolution", "step", "ratio"), [(512, 64, 2.0), (1024, 32, 2.5), (100, 8, 1.0)])
def test_buckets(resolution, step, ratio):
    buckets = make_buckets(resolution, step, ratio)
    square = resolution // step * step
    assert (square, square) in buckets
    for height, width in buckets:
        assert height % step == width % step == 0 and height * width <= resolution**2
        assert max(height, width) <= ratio * min(height, width)
        assert (width, height) in buckets
    assert len(buckets) == 1 or max(width / height for height, width in buckets) > 0.8 * ratio


def test_a_resolution_that_is_too_small():
    with pytest.raises(DeltaConvError, match="at least 64 pixels.*got 63"):
        make_buckets(63, 64, 2.0)


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (1, 1000), (1000, 1), (37, 91), (2000, 999)])
def test_a_picture_covers_its_bucket(size):
    buckets = make_buckets(128, 16, 2.0)
    bucket = nearest(size, buckets)
    ratio = math.log(size[1] / size[0])
    assert all(
        abs(math.log(bucket[1] / bucket[0]) - ratio) <= abs(math.log(w / h) - ratio) + 1e-9
        for h, w in buckets
    )
    scaled, (top, left) = corner(size, bucket)
    assert scaled[0] >= bucket[0] and scaled[1] >= bucket[1]
    assert scaled[0] == bucket[0] or scaled[1] == bucket[1]
    assert 0 <= top <= scaled[0] - bucket[0] and 0 <= left <= scaled[1] - bucket[1]
    assert fit(Image.new("RGB", size[::-1]), bucket).size == bucket[::-1]


def test_the_middle_is_cut_out():
    picture = Image.new("RGB", (100, 20), "black")
    picture.paste("white", (40, 0, 60, 20))
    assert fit(picture, (20, 20)).getextrema() == ((255, 255),) * 3
    assert corner((20, 100), (20, 20)) == ((20, 100), (0, 40))


# ---- pictures ----


def test_pictures_lie_upright_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "gray.png")
    for name in ("turned", "clear", "gray"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = {picture.caption: picture for picture in find_pictures(tmp_path)}
    assert found["turned"].size == (40, 20)
    turned = open_picture(found["turned"].path)
    assert turned.size == (20, 40) and turned.mode == "RGB"
    top, bottom = turned.getpixel((10, 5)), turned.getpixel((10, 35))
    assert top[2] > 200 > 60 > top[0] and bottom[0] > 200 > 60 > bottom[2]
    assert open_picture(found["clear"].path).getextrema() == ((255, 255),) * 3
    assert open_picture(found["gray"].path).getpixel((0, 0)) == (7, 7, 7)


def save(path, color="red"):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (8, 8), color).save(path)


def write_table(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def test_captions_of_all_kinds(tmp_path):
    """Beside the picture, or in the table of its folder or of one above, the nearest first."""
    for name in ("a.png", "b.PNG", "deep/c.webp", "deep/d.jpg", "deep/er/e.bmp"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeff beside Ä\n", encoding="utf-8")
    rows = [
        {"file_name": "b.PNG", "text": "two\u2028lines"},
        {"file_name": "./deep/../deep/c.webp", "text": "far"},
    ]
    write_table(tmp_path / "metadata.jsonl", *rows, {"file_name": "deep/d.jpg", "text": "D", "more": 1})
    rows = [{"file_name": "c.webp", "text": "near"}, {"file_name": "er/e.bmp", "text": "E"}]
    write_table(tmp_path / "deep/metadata.jsonl", *rows)
    captions = {picture.path.name: picture.caption for picture in find_pictures(tmp_path)}
    assert captions == {
        "a.png": "beside Ä", "b.PNG": "two\u2028lines", "c.webp": "near", "d.jpg": "D", "e.bmp": "E",
    }  # fmt: skip


def test_another_column(tmp_path):
    save(tmp_path / "a.png")
    write_table(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x", "prompt": "y"})
    assert find_pictures(tmp_path, "prompt")[0].caption == "y"


def no_folder(folder):
    folder.rmdir()


def no_captions(folder):
    for name in "abcde":
        save(folder / f"{name}.png")


def no_picture_any_more(folder):
    (folder / "a.png").write_bytes(b"\x89PNG nothing")
    (folder / "a.txt").write_text("a")


def not_utf8(folder):
    save(folder / "a.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")


def table_of_others(folder):
    save(folder / "a.png")
    write_table(folder / "metadata.jsonl", {"file_name": "b.png", "text": "x"})


def table_without_text(folder):
    save(folder / "a.png")
    write_table(folder / "metadata.jsonl", {"file_name": "a.png", "caption": "x"})


def table_without_json(folder):
    save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "there is no folder"),
        (lambda folder: None, "there are no pictures in"),
        (no_captions, "5 of 5 pictures .* have no caption: a.png, b.png, c.png and 2 more"),
        (no_picture_any_more, "a.png is not a picture that can be read"),
        (not_utf8, "a.txt is not UTF-8 text"),
        (table_of_others, "line 1: there is no file .*b.png"),
        (table_without_text, "line 1: expected texts for file_name and text"),
        (table_without_json, "line 2 is not JSON"),
    ],
)
def test_bad_data(tmp_path, spoil, message):
    folder = tmp_path / "data"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(DeltaConvError, match=message):
        find_pictures(folder)


def test_pictures_that_break_off_or_are_deep(tmp_path):
    save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    Image.new("I;16", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(DeltaConvError, match=r"b\.png is not a picture that can be read"):
        open_picture(tmp_path / "b.png")
    with pytest.raises(DeltaConvError, match=r"c\.png has more than 8 bits"):
        open_picture(tmp_path / "c.png")


def test_what_no_person_put_there_is_passed_over(tmp_path):
    """macOS, Jupyter, NAS servers and archives leave files with the endings of pictures and of tables."""
    data = draw(tmp_path / "data", SIZES[:2])
    expected = find_pictures(data)
    (data / "._0.png").write_bytes(b"\0\5\x16\7" + b"\0" * 90)
    (data / "._0.txt").write_bytes(b"\0\5\x16\7\xb0")
    for folder in (
        ".ipynb_checkpoints",
        "@eaDir/0.png",
        "__MACOSX",
        ".thumbnails/a",
        "#recycle",
        "lost+found",
    ):
        save(data / folder / "0-checkpoint.png")
        (data / folder / "metadata.jsonl").write_text("{")
    told = []
    assert find_pictures(data, tell=told.append) == expected and not told


def test_pictures_of_stereo_cameras_are_read(tmp_path):
    """PIL's MPO: several JPEGs in one file called .jpg; the first is taken."""
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (16, 8), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    (tmp_path / "a.txt").write_text("x")
    assert find_pictures(tmp_path)[0].size == (8, 16)
    assert open_picture(tmp_path / "a.jpg").getpixel((8, 4))[0] > 200


def test_the_folder_itself_may_have_such_a_name(tmp_path):
    assert len(find_pictures(draw(tmp_path / ".data" / "@eaDir"))) == len(SIZES)


def test_pictures_that_are_left_out_are_counted_aloud(tmp_path):
    data = draw(tmp_path / "data", SIZES[:1])
    for name in ("a.gif", "b.HEIC", "c.avif", "d.jxl", "notes.md"):
        (data / name).write_bytes(b"x")
    (data / "more").symlink_to(draw(tmp_path / "elsewhere"), target_is_directory=True)
    told = []
    assert len(find_pictures(data, tell=told.append)) == 1
    assert len(told) == 1 and "4 in a format that is not read (a.gif, b.HEIC, c.avif and 1 more)" in told[0]
    assert "1 linked folders (more)" in told[0]


def test_captions_under_another_ending_are_named(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "b.caption").write_text("a cat")
    with pytest.raises(DeltaConvError, match=r"2 of 2 .* there is b\.caption, .*rename the \.caption files"):
        find_pictures(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n",
        b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") * 7 + b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a" + b"\x01\0" * 2 + b"\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
        b"P6 1 1 255 abc",
    ],
)
def test_the_content_decides_and_no_program_is_started(tmp_path, monkeypatch, content):
    """PIL would start Ghostscript (`gs`) on PostScript, whatever the file is called."""
    ran = tmp_path / "ran"
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {ran}\necho 10.0\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:/usr/bin:/bin")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "b.jpg", "c.tiff"):
        (data / name).write_bytes(content)
        (data / name).with_suffix(".txt").write_text("x")
        with pytest.raises(DeltaConvError, match=f"{name} is not a picture that can be read"):
            open_picture(data / name)
    with pytest.raises(DeltaConvError, match="a.png is not a picture that can be read"):
        find_pictures(data)
    assert not ran.exists()


def link_to_nothing(data):
    (data / "x.png").symlink_to("/mnt/unplugged/x.png")


def table_with_a_long_name(data):
    write_table(data / "metadata.jsonl", {"file_name": "x" * 5000, "text": "a"})


def table_with_half_a_letter(data):
    (data / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "\\ud800"}')


def deep_table(data):
    (data / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a", "x": ' + "[" * 500 + "]" * 500 + "}"
    )


def caption_that_is_a_loop(data):
    (data / "0.txt").unlink()
    (data / "0.txt").symlink_to("0.txt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (link_to_nothing, "cannot read .*x.png: no file, or a link to one that is not there"),
        (table_with_a_long_name, "line 1: there is no file"),
        (table_with_half_a_letter, "line 1 is not JSON .*surrogates"),
        (deep_table, "line 1 is not JSON .*levels deep"),
        (caption_that_is_a_loop, "0.png"),
    ],
)
def test_files_that_cannot_be_reached(tmp_path, spoil, message):
    data = draw(tmp_path / "data", SIZES[:1])
    spoil(data)
    with pytest.raises(DeltaConvError, match=message) as refused:
        find_pictures(data)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["0.txt", "metadata.jsonl", "0.png"])
def test_files_that_may_not_be_read(tmp_path, monkeypatch, name):
    """root may read all, so the system's answer is made up."""
    data = draw(tmp_path / "data", SIZES[:1])
    write_table(data / "metadata.jsonl", {"file_name": "0.png", "text": "a"})
    if name == "0.txt":
        (data / "metadata.jsonl").unlink()
    monkeypatch.setattr("io.open", refusing(name, io.open))
    monkeypatch.setattr("builtins.open", refusing(name, open))
    with pytest.raises(DeltaConvError, match=f"{name}.*Permission denied"):
        find_pictures(data)


def refusing(name, own):
    def opened(file, *args, **more):
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", str(file))
        return own(file, *args, **more)

    return opened


# ---- encoding, once ----


class Alone:
    """What `encode` and `Batches` ask of processes, without accelerate."""

    device = torch.device("cpu")

    def __init__(self, number=0, count=1):
        self.number, self.count = number, count

    part = AcceleratedProcesses.part

    def wait(self):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_pipeline(kind, folder / kind) for kind in ("sd", "xl", "pixart")}


@pytest.fixture
def counted(monkeypatch):
    """How often pictures and captions were encoded."""
    import diffusers
    import transformers

    counts = {"pictures": 0, "captions": 0}

    def count(owner, method, what):
        own = getattr(owner, method)

        def counting(self, *args, **kwargs):
            counts[what] += 1
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(diffusers.AutoencoderKL, "encode", "pictures")
    count(transformers.CLIPTextModel, "forward", "captions")
    return counts


def encoded(model, data, cache, resolution=32, processes=None):
    options = Options(model=model, data=data)
    teacher = load_teacher(options, torch.float32)
    parts = Cache(cache), processes or Alone(), lambda items, what: items
    return teacher, encode_samples(teacher, find_pictures(data), (resolution, 2.0), *parts)


def test_only_what_changed_is_encoded_again(models, tmp_path, counted):
    data, cache = draw(tmp_path / "data"), tmp_path / "cache"

    def calls(**options):
        counted.update(pictures=0, captions=0)
        teacher, samples = encoded(options.pop("model", models["sd"]), data, cache, **options)
        assert teacher.pipeline is None
        return (counted["pictures"], counted["captions"]), samples.fingerprint

    first, fingerprint = calls()
    assert first == (len(SIZES), len(SIZES) + 1)
    assert calls() == ((0, 0), fingerprint)
    save(data / "1.png", "green")
    assert calls()[0] == (1, 0)
    (data / "2.txt").write_text("another cat")
    changed, other = calls()
    assert changed == (0, 1) and other != fingerprint
    assert calls(resolution=48)[0] == (len(SIZES), 0)
    assert calls(resolution=48) == ((0, 0), calls(resolution=48)[1])
    next((cache / "latents").rglob("*.safetensors")).unlink()
    assert sum(calls()[0] + calls(resolution=48)[0]) == 1


def other_weights(vae):
    from safetensors.torch import load_file, save_file

    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, file)


def other_scale(vae):
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.5}))


@pytest.mark.parametrize("change", [other_weights, other_scale])
def test_another_vae_encodes_again(models, tmp_path, counted, change):
    data, cache = draw(tmp_path / "data", SIZES[:1]), tmp_path / "cache"
    encoded(models["sd"], data, cache)
    copy = tmp_path / "other"
    copy.mkdir()
    for path in models["sd"].rglob("*"):
        target = copy / path.relative_to(models["sd"])
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    change(copy / "vae")
    counted.update(pictures=0, captions=0)
    encoded(copy, data, cache)
    assert counted == {"pictures": 1, "captions": 0}


def test_processes_share_the_encoding(models, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(samples_module, "PATIENCE", 0)
    data = draw(tmp_path / "data")
    for number in range(2):
        with pytest.raises(DeltaConvError, match=f"process {number} does not see"):
            encoded(models["sd"], data, tmp_path / str(number), processes=Alone(number, 2))
        shutil.copytree(tmp_path / str(number), tmp_path / "both", dirs_exist_ok=True)
    assert counted == {"pictures": 6, "captions": 7}
    encoded(models["sd"], data, tmp_path / "both")
    assert counted == {"pictures": 6, "captions": 7}


def test_a_latent_is_what_the_vae_says(models, tmp_path):
    import diffusers
    from diffusers.image_processor import VaeImageProcessor

    data = draw(tmp_path / "data", [(32, 32)])
    _, samples = encoded(models["sd"], data, tmp_path / "cache")
    vae = diffusers.AutoencoderKL.from_pretrained(models["sd"], subfolder="vae")
    pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(Image.open(data / "0.png"))
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(read(samples.samples[0].latent)["latent"], expected)


def test_a_damaged_entry_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"half")
    with pytest.raises(DeltaConvError, match=r"x\.safetensors in the cache is no longer whole; delete"):
        read(tmp_path / "x.safetensors")


# ---- batches ----


def batches_of(models, tmp_path, kind="sd", number=0, count=1, size=2, dropout=0.0, seed=0):
    from deltaconv_core.diffusers.distill.network import DiffusersNetwork

    teacher, samples = encoded(models[kind], draw(tmp_path / "data"), tmp_path / "cache")
    network = DiffusersNetwork(teacher, list(teacher.sites.attentions)[:1])
    return network, Batches(network, samples, size, seed, dropout, Alone(number, count))


def test_parts_of_a_batch_make_it_whole(models, tmp_path):
    _, whole = batches_of(models, tmp_path, dropout=0.5, size=4)
    parts = [batches_of(models, tmp_path, number=i, count=2, dropout=0.5, size=4)[1] for i in range(2)]
    for number in range(6):
        expected, pair = whole(number), [part(number) for part in parts]
        for name in ("noisy", "target", "snr"):
            assert torch.equal(torch.cat([getattr(part, name) for part in pair]), getattr(expected, name))
        texts = [part.inputs.conditioning["encoder_hidden_states"] for part in pair]
        assert torch.equal(torch.cat(texts), expected.inputs.conditioning["encoder_hidden_states"])


def test_an_epoch_sees_every_picture(models, tmp_path):
    _, batches = batches_of(models, tmp_path)
    assert batches.order.per_epoch == 4
    for epoch in range(3):
        seen = [i for number in range(4 * epoch, 4 * epoch + 4) for i in batches.order(number)]
        assert set(seen) == set(range(6))


def test_dropped_captions(models, tmp_path):
    network, _ = batches_of(models, tmp_path)
    _, samples = encoded(models["sd"], tmp_path / "data", tmp_path / "cache")
    empty = read(samples.empty)["embeds"]
    batches = Batches(network, samples, 2, 0, 0.25, Alone())
    dropped = [
        torch.equal(text[None], empty)
        for number in range(100)
        for text in batches(number).inputs.conditioning["encoder_hidden_states"]
    ]
    assert 30 < sum(dropped) < 70


def test_noise_and_target(models, tmp_path):
    """Noisy latents are what diffusers' scheduler makes; for v too."""
    import diffusers

    network, _ = batches_of(models, tmp_path)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 500, 999])
    scheduler = diffusers.DDPMScheduler.from_pretrained(models["sd"], subfolder="scheduler")
    for prediction, target in (("epsilon", noise), ("v", scheduler.get_velocity(clean, noise, steps))):
        network.prediction = prediction
        batch = network.batch(clean, noise, steps, {})
        torch.testing.assert_close(batch.noisy, scheduler.add_noise(clean, noise, steps))
        torch.testing.assert_close(batch.target, target)
        signal = scheduler.alphas_cumprod[steps]
        torch.testing.assert_close(batch.snr, signal / (1 - signal))


def test_what_sdxl_and_pixart_are_told():
    cuts = [Cut((100, 50), (3, 0), (64, 32)), Cut((32, 64), (0, 5), (32, 64))]
    texts = {"embeds": torch.zeros(2, 5, 8), "pooled": torch.zeros(2, 4), "mask": torch.ones(2, 5)}
    ids = StableDiffusionXL().conditioning(texts, cuts)["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[100, 50, 3, 0, 64, 32], [32, 64, 0, 5, 32, 64]]
    added = PixArt(sized=True).conditioning(texts, cuts)["added_cond_kwargs"]
    assert added["resolution"].tolist() == [[64, 32], [32, 64]]
    assert added["aspect_ratio"].tolist() == [[2.0], [0.5]]
    assert PixArt(sized=False).conditioning(texts, cuts)["added_cond_kwargs"]["resolution"] is None


def test_groups_have_one_size():
    cuts = [Cut((8, 8), (0, 0), target) for target in ((8, 8), (16, 8), (8, 8))]
    samples = Samples([Sample(SimpleNamespace(name=""), SimpleNamespace(name=""), cut) for cut in cuts], None)
    assert samples.groups() == [[0, 2], [1]]
