"""Predict depth with an exported ONNX file, using NumPy, Pillow and ONNX Runtime alone.

    md2 export RUN --to onnx --out depth.onnx
    python examples/depth_onnx.py depth.onnx street.png street

writes `street_disparity.png` (grey, bright is near) and, if the model knows its unit, `street_depth.png` (16-bit,
metres x 256, KITTI's convention), both at the image's size.
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, source: str, name: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    image = Image.open(source).convert("RGB")
    small = image.resize((int(about["width"]), int(about["height"])), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, dtype=np.float32).transpose(2, 0, 1)[None] / 255

    (disparity,) = session.run(["disparity"], {"image": pixels})  # 1 / depth
    disparity = np.asarray(Image.fromarray(disparity[0, 0]).resize(image.size, Image.Resampling.BILINEAR))

    near, far = np.percentile(disparity, 95), disparity.min()
    grey = (np.clip((disparity - far) / (near - far), 0, 1) * 255).astype(np.uint8)
    Image.fromarray(grey).save(f"{name}_disparity.png")
    print(f"{name}_disparity.png: bright is near")
    if about["unit"] == "metres":
        metres = 1 / disparity
        Image.fromarray(np.clip(np.rint(metres * 256), 1, 65535).astype(np.uint16)).save(f"{name}_depth.png")
        print(f"{name}_depth.png: {metres.min():.2f} to {metres.max():.2f} metres")
    else:
        print("no depth in metres: the model learned from one camera, so its unit is unknown")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: depth_onnx.py MODEL.onnx IMAGE NAME")
    main(*sys.argv[1:])
