"""README.md of a dataset: its content, how it was packed, how to read it with and without md2.

The YAML in front is for the Hugging Face Hub and its `datasets` library, which without it refuses a shard where only
some of the first samples have `depth.png`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from shards.manifest import MANIFEST, Manifest
from shards.sample import DEPTH, INTRINSICS, META, STEREO_TRANSLATION

_COMPONENTS = {
    INTRINSICS: "fx, fy, cx, cy in pixels of the stored images, float32 little-endian; pixel centres at integers",
    STEREO_TRANSLATION: "x translation in metres from the target camera to the partner's, float32 little-endian",
    DEPTH: "ground truth, 16-bit PNG, metres x 256, 0 = no measurement, native resolution",
    META: "drive, frame, side, native size, origin of each component",
}
_CREATIVE_COMMONS = re.compile(r"\bCC (BY(?:-(?:NC|SA|ND))*|0) (\d\.\d)")
_SIZES = [("n<1K", 1000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000)]
"""The Hub's names for numbers of samples."""
_FRONT_MATTER = re.compile(r"---\n.*?\n---\n+", re.DOTALL)
_LICENCE = "## Licence\n\n"
_NO_LICENCE = """\
The images' own licence applies. md2 does not know it: add it here, by hand, before you share the dataset.
"""


def card(manifest: Manifest, url: str = "URL", licence: str | None = None) -> str:
    """Return the text of a dataset's README.md: YAML, then Markdown.

    Args:
        manifest: of the dataset.
        url: the dataset's place in the examples. Keep the default if the same dataset must give the same bytes.
        licence: text of the section on the licence; None: one that asks for it.
    """
    size = "native size" if manifest.size is None else f"{manifest.size[0]} x {manifest.size[1]} pixels"
    parts = manifest.parts
    example = "train" if "train" in parts else parts[0]
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(manifest, licence), sort_keys=False, allow_unicode=True)}---\n",
        f"# {manifest.split.name}\n\n"
        "Training samples for self-supervised depth (Monodepth2) as WebDataset tar shards, packed by md2 "
        f"{manifest.md2_version}. `{MANIFEST}` is the machine-readable form, with the sha256 of every file.\n",
        _parts_table(manifest),
        f"Images: RGB, {size}, {manifest.encoding}. "
        f"Frames: {', '.join(f'{f:+d}' if f else '0' for f in manifest.frames)}"
        f"{', and the stereo partner' if manifest.stereo else ''}. Samples are in random order (seed {manifest.seed}). "
        f"Skipped because input was missing: {manifest.skipped} (report.json, if present, lists them).\n",
        "The cameras' intrinsics are a guess from a field of view.\n" if manifest.intrinsics else "",
        _depth(manifest),
        _components(manifest),
        _reading(url, example, manifest),
        f"{_LICENCE}{licence or _NO_LICENCE}",
    ]
    return "\n".join(section for section in sections if section)


def without_front_matter(text: str) -> str:
    """Return the Markdown of a card."""
    return text[found.end() :] if (found := _FRONT_MATTER.match(text)) else text


def licence_of(text: str) -> str | None:
    """Return the text on the licence in a card; None if nobody has written one."""
    found = text.partition(_LICENCE)[2]
    return found if found.strip() not in ("", _NO_LICENCE.strip()) else None


def licence_name(licence: str | None) -> str:
    """Return the Hub's name of a licence, from a text about it: `cc-by-nc-sa-3.0`, or `other`; `unknown` of None."""
    known = _CREATIVE_COMMONS.search(licence or "")
    return f"cc-{known[1]}-{known[2]}".lower() if known else "other" if licence else "unknown"


def _front_matter(manifest: Manifest, licence: str | None) -> dict[str, Any]:
    """What the Hub and `datasets` read: https://huggingface.co/docs/hub/datasets-cards."""
    samples = sum(shard.samples for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards)
    return {
        "pretty_name": manifest.split.name,
        "license": licence_name(licence),
        "task_categories": ["depth-estimation"],
        "tags": ["webdataset", "monocular-depth", "self-supervised", *(["stereo"] if manifest.stereo else [])],
        "size_categories": [next((name for name, end in _SIZES if samples < end), "n>1M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": part, "path": f"{part}/*.tar"} for part in manifest.parts],
            }
        ],
        "dataset_info": {
            "features": _features(manifest),
            "splits": [
                {
                    "name": part,
                    "num_bytes": sum(shard.bytes for shard in manifest.part(part)),
                    "num_examples": manifest.samples(part),
                }
                for part in manifest.parts
            ],
            "download_size": size,
            "dataset_size": size,
        },
    }


def _features(manifest: Manifest) -> list[dict[str, Any]]:
    """Each component with its type, missing or not; of JSON the fields that prep writes."""
    names = sorted({*manifest.components, *manifest.optional_components})
    sources = [{"name": name, "dtype": "string"} for name in names if _is_image(name)]
    meta = [
        {"name": "drive", "dtype": "string"},
        {"name": "frame", "dtype": "int64"},
        {"name": "side", "dtype": "string"},
        {"name": "native_size", "list": "int64"},
        {"name": "pose", "list": "float64"},
        {"name": "sources", "struct": sources},
    ]
    types: dict[str, dict[str, Any]] = {name: {"dtype": "image"} for name in names if _is_image(name)}
    types[META] = {"struct": meta}
    columns = [{"name": name, **types.get(name, {"dtype": "binary"})} for name in names]
    return [*columns, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]


def _is_image(component: str) -> bool:
    return component.endswith((".jpg", ".png", ".ppm"))


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

With the `datasets` library, which knows the components from the head of this file (missing ones are None):

    import datasets
    samples = datasets.load_dataset("{url}", split="{part}", streaming=True)

or with nothing but tar: `tar -tf {part}/000000.tar`. The `.idx` beside each tar is NVIDIA DALI's index for
`fn.readers.webdataset`.
"""
