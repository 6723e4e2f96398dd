"""The page of `md2 predict --html`, in a real browser: what it reads under the pointer, and how the cloud turns."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browse, command
from PIL import Image

from md2.inference.predictor import DepthMap
from md2.inference.viewer import MOST_SAMPLES, Viewer

WIDTH, HEIGHT = 640, 200
CAMERA = (400.0, 410.0, 310.0, 95.0)
PATCH = (slice(60, 76), slice(400, 416))
"""A green square before a grey wall."""
CLOUD = (1232, 560)
SIZE = (1280, 1100)
"""Of the browser's window."""


def scene(factor: float = 1.0, unit: str = "metres") -> DepthMap:
    rows, columns = np.indices((HEIGHT, WIDTH))
    depth = (12 + 0.01 * columns + 0.005 * rows).astype(np.float32) * factor
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    depth[PATCH], image[PATCH] = 6 * factor, (0, 255, 0)
    return DepthMap(image, depth, unit)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "depth.html"
    viewer = Viewer(path, "magma", 80.0)
    viewer.add("street", scene(), CAMERA)
    viewer.add("</script><script>console.error('name')</script>", scene(0.1, "unknown"), CAMERA)
    viewer.write()
    return path


def visit(chromium: str, page: str, folder: Path) -> Any:
    """What a page that a server on loopback shows sends back to it, in real time: a frame takes as long as it takes."""
    sent: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(page.encode() if self.path == "/" else b"")

        def do_POST(self) -> None:
            sent.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(b"")

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        words = command(chromium, folder, SIZE, address)
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                return json.loads(sent.get(timeout=90))
            finally:
                browser.terminate()
                browser.wait(20)
                server.shutdown()


VISITOR = """
const move = (id, x, y, more) => {
  const box = $(id).getBoundingClientRect();
  const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  $(id).dispatchEvent(new PointerEvent("pointermove", { ...place, ...more }));
};
const frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
function green() {
  const canvas = $("cloud");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let [n, x, y] = [0, 0, 0];
  for (let i = 0; i < data.length; i += 4)
    if (data[i] < 100 && data[i + 1] > 150) {
      n += 1; x += (i / 4) % canvas.width; y += Math.floor(i / 4 / canvas.width);
    }
  return [n, x / n, y / n];
}
const image = () => $("cloud").toDataURL();
async function visit() {
  await show(0);
  const seen = { readings: [], green: [] };
  for (const [id, x, y] of POINTS) { move(id, x, y); seen.readings.push($("reading").value); }
  const turned = image();
  $("cloud").dispatchEvent(new MouseEvent("dblclick"));
  await frame();
  const first = image();
  seen.turned = turned !== first;
  seen.green.push(green());
  move("cloud", 0.5, 0.5, { movementX: 120, movementY: 0, buttons: 0 });
  await frame();
  seen.still = image() === first;
  move("cloud", 0.5, 0.5, { movementX: 120, movementY: 60, buttons: 1 });
  await frame();
  seen.green.push(green());
  $("cloud").dispatchEvent(new WheelEvent("wheel", { deltaY: 400 }));
  await frame();
  seen.green.push(green());
  $("cloud").dispatchEvent(new MouseEvent("dblclick"));
  await frame();
  seen.back = image() === first;
  $("samples").children[1].click();
  await new Promise((resolve) => setTimeout(resolve, 500));
  move("image", 0.5, 0.5);
  seen.readings.push($("reading").value);
  seen.name = $("name").textContent;
  await fetch("seen", { method: "POST", body: JSON.stringify(seen) });
}
visit();
"""
POINTS = [("image", 0.2, 0.3), ("disparity", 0.9, 0.95), ("image", 408 / WIDTH, 68 / HEIGHT)]


def place(column: float, row: float, depth: float, yaw: float, pitch: float, away: float, pivot: float) -> list[float]:
    """Where the cloud's canvas shows a pixel's point after turns about (0, 0, pivot), seen from `away` before it."""
    fx, fy, cx, cy = CAMERA
    point = np.array([(column - cx) / fx * depth, (row - cy) / fy * depth, depth - pivot])
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    x, y, z = about_x @ about_y @ point + [0, 0, away]
    scale = min(CLOUD[0] / WIDTH, CLOUD[1] / HEIGHT)
    left, top = (CLOUD[0] - WIDTH * scale) / 2, (CLOUD[1] - HEIGHT * scale) / 2
    return [left + (fx * x / z + cx + 0.5) * scale, top + (fy * y / z + cy + 0.5) * scale]


def test_depth_under_the_pointer_and_a_cloud_that_turns(chromium: str, page: Path, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    visitor = f"<script>{VISITOR.replace('POINTS', json.dumps(POINTS))}</script></body>"
    seen = visit(chromium, text.replace("</body>", visitor), tmp_path)

    depth = scene().depth
    for (_, x, y), reading in zip(POINTS, seen["readings"], strict=False):
        column, row, metres = re.fullmatch(r"x (\d+), y (\d+): depth ([\d.]+) m", reading).groups()  # type: ignore[union-attr]
        assert (int(column), int(row)) == pytest.approx((x * WIDTH, y * HEIGHT), abs=1)
        assert float(metres) == pytest.approx(depth[int(row), int(column)], abs=0.06)
    assert seen["readings"][2].endswith("depth 6.00 m")
    assert re.search(r"depth 1\.\d\d \(the model's own unit\)", seen["readings"][3])
    assert seen["name"].startswith("</script>"), "a name is text"

    assert seen["turned"], "at first the cloud is seen from the side"
    assert seen["still"], "no button is pressed"
    assert seen["back"], "a double click undoes all turns"
    pivot = float(np.median(depth))
    yaw, pitch = -120 / 300, 60 / 300
    views = [(0.0, 0.0, pivot), (yaw, pitch, pivot), (yaw, pitch, pivot / np.exp(-400 / 800))]
    for (count, *centre), (a, b, away) in zip(seen["green"], views, strict=True):
        assert count > 30
        assert centre == pytest.approx(place(407.5, 67.5, 6.0, a, b, away, pivot), abs=2.5)


def test_the_page_runs_its_own_script_only_and_fetches_nothing(chromium: str, page: Path, tmp_path: Path) -> None:
    in_time = ("--virtual-time-budget=20000", "--run-all-compositor-stages-before-draw")
    assert browse(chromium, page, tmp_path, SIZE, *in_time) == []
    with Image.open(tmp_path / "shot.png") as screenshot:
        pixels = np.asarray(screenshot.convert("RGB")).astype(int)
    green = (pixels[..., 1] > 200) & (pixels[..., 0] < 90) & (pixels[..., 2] < 90)
    assert green[:550].any(), "the image"
    assert green[550:].any(), "the cloud"
    foreign = page.read_text().replace("</body>", "<script>console.error('x')</script></body>")
    (tmp_path / "foreign.html").write_text(foreign)
    complaints = browse(chromium, tmp_path / "foreign.html", tmp_path, SIZE, *in_time)
    assert any("Content Security Policy" in line for line in complaints)


def test_samples_are_spread_over_all_predictions(tmp_path: Path) -> None:
    viewer = Viewer(tmp_path / "p.html", "magma", 80.0)
    small = DepthMap(np.zeros((4, 6, 3), np.uint8), np.ones((4, 6), np.float32), "metres")
    for number in range(100):
        viewer.add(str(number), small, CAMERA)
    viewer.write()
    text = (tmp_path / "p.html").read_text()
    names = [int(name) for name in re.findall(r'"name": "(\d+)"', text)]
    assert MOST_SAMPLES / 2 < len(names) <= MOST_SAMPLES
    assert len(set(np.diff(names))) == 1
    assert names[0] == 0
    assert names[-1] > 80
    assert f"Depth of {len(names)} of 100 images" in text
