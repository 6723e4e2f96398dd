"""Depth from an exported ONNX file with NumPy, Pillow and ONNX Runtime alone.

md2 export RUN --to onnx --out depth.onnx
python examples/depth_onnx.py depth.onnx street.png street_depth.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, source: str, target: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    image = Image.open(source).convert("RGB")
    small = image.resize((int(about["width"]), int(about["height"])), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.float32).transpose(2, 0, 1)[None] / 255

    depth, disparity = session.run(["depth", "disparity"], {"image": pixels})

    near, far = np.percentile(disparity, 95), disparity.min()
    grey = (np.clip((disparity[0, 0] - far) / (near - far), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(grey).resize(image.size, Image.Resampling.BILINEAR).save(target)
    print(f"depth {depth.min():.2f} to {depth.max():.2f}, unit: {about['unit']}; bright is near: {target}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: depth_onnx.py MODEL.onnx IMAGE OUT.png")
    main(*sys.argv[1:])
