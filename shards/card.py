"""README.md of a dataset: its content, how it was packed, how to read it with and without md2."""

from __future__ import annotations

from shards.manifest import MANIFEST, Manifest
from shards.sample import DEPTH, INTRINSICS, META, STEREO_TRANSLATION

_COMPONENTS = {
    INTRINSICS: "fx, fy, cx, cy in pixels of the stored images, float32 little-endian; pixel centres at integers",
    STEREO_TRANSLATION: "x translation in metres from the target camera to the partner's, float32 little-endian",
    DEPTH: "ground truth, 16-bit PNG, metres x 256, 0 = no measurement, native resolution",
    META: "drive, frame, side, native size, origin of each component",
}
_NO_LICENCE = """\
The images' own licence applies. md2 does not know it: add it here, by hand, before you share the dataset.
"""


def card(manifest: Manifest, url: str = "URL", licence: str | None = None) -> str:
    """Return the Markdown text of a dataset's README.md.

    Args:
        manifest: of the dataset.
        url: the dataset's place in the examples. Keep the default if the same dataset must give the same bytes.
        licence: text of the section on the licence; None: one that asks for it.
    """
    size = "native size" if manifest.size is None else f"{manifest.size[0]} x {manifest.size[1]} pixels"
    parts = manifest.parts
    example = "train" if "train" in parts else parts[0]
    sections = [
        f"# {manifest.split.name}\n\n"
        "Training samples for self-supervised depth (Monodepth2) as WebDataset tar shards, packed by md2 "
        f"{manifest.md2_version}. `{MANIFEST}` is the machine-readable form, with the sha256 of every file.\n",
        _parts_table(manifest),
        f"Images: RGB, {size}, {manifest.encoding}. "
        f"Frames: {', '.join(f'{f:+d}' if f else '0' for f in manifest.frames)}"
        f"{', and the stereo partner' if manifest.stereo else ''}. Samples are in random order (seed {manifest.seed}). "
        f"Skipped because input was missing: {manifest.skipped} (report.json, if present, lists them).\n",
        _depth(manifest),
        _components(manifest),
        _reading(url, example, manifest),
        f"## Licence\n\n{licence or _NO_LICENCE}",
    ]
    return "\n".join(section for section in sections if section)


def _parts_table(manifest: Manifest) -> str:
    lines = ["| part | samples | shards | bytes |", "|---|---|---|---|"]
    for part in manifest.parts:
        shards = manifest.part(part)
        lines.append(f"| {part} | {manifest.samples(part):,} | {len(shards)} | {sum(s.bytes for s in shards):,} |")
    return "\n".join(lines) + "\n"


def _depth(manifest: Manifest) -> str:
    if manifest.depth is None:
        return ""
    meaning = {
        "camera_z": "z in the target camera",
        "lidar_x": "the lidar's forward x, as in the published Eigen evaluation",
    }[manifest.depth.convention]
    return f"Ground truth: {manifest.depth.source}; the depth stored is {meaning}.\n"


def _components(manifest: Manifest) -> str:
    total = sum(shard.samples for shard in manifest.shards)
    lines = ["## A sample", "", "| file | what | samples |", "|---|---|---|"]
    counts = dict.fromkeys(manifest.components, total) | manifest.optional_components
    for name, count in sorted(counts.items()):
        lines.append(f"| `KEY.{name}` | {_COMPONENTS.get(name) or _image(name)} | {count:,} |")
    return "\n".join(lines) + "\n"


def _image(component: str) -> str:
    stem = component.partition(".")[0]
    if stem == "0":
        return "target frame"
    if stem == "s":
        return "stereo partner: the same time step from the other camera"
    if stem[:1] in ("m", "p") and stem[1:].isdigit():
        return f"frame t{'-' if stem[0] == 'm' else '+'}{stem[1:]}"
    return "-"


def _reading(url: str, part: str, manifest: Manifest) -> str:
    depth = ""
    if manifest.depth is not None:
        depth = f"""
        if "{DEPTH}" in sample:
            depth = numpy.asarray(Image.open(io.BytesIO(sample["{DEPTH}"]))) / 256.0  # metres, 0 = no measurement"""
    return f"""\
## Reading it

    md2 train CONFIG data.url={url}
    md2 shards show {url}

Without md2, with the `webdataset` library (not with its `.decode("pil")`, which cuts 16-bit depth to 8 bits):

    import io, numpy, webdataset
    from PIL import Image
    for sample in webdataset.WebDataset("{part}/000000.tar", shardshuffle=False):
        image = Image.open(io.BytesIO(sample["{manifest.image_component(0)}"]))
        intrinsics = numpy.frombuffer(sample["{INTRINSICS}"], "<f4"){depth}

or with nothing but tar: `tar -tf {part}/000000.tar`. The `.idx` beside each tar is NVIDIA DALI's index for
`fn.readers.webdataset`.
"""
