"""Draw the pictures that are kept in notebooks: `python docs/pictures.py [--check] [NAME...]`, or make those of rendered reports
smaller: `python docs/pictures.py --compact REPORT...`.

A cell with the tag `picture` shows pictures that stay in the file, so that they are seen wherever notebooks are read. Of its outputs the pictures are
kept, of all other cells nothing. Such a cell uses what the notebook exports, what cells with the tag `setup` make, and what it makes itself. Nothing
else is run, none of the tests, so that to draw all pictures takes a minute or two. Its line `#| fig-alt: ...` says in words what is to be seen.

A picture that looks like the saved one is not written again: another processor or another font rasterizer changes a few pixels, and no file.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from execnb.nbio import nb2str, read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ALT = re.compile(r"^#\s*\|\s*fig-alt:\s*(.+)$", re.M)
EXPORT = re.compile(r"^#\s*\|\s*exports?i?\b", re.M)


def tagged(cell: dict, tag: str) -> bool:
    return cell["cell_type"] == "code" and tag in cell["metadata"].get("tags", [])


def is_picture(cell: dict) -> bool:
    return tagged(cell, "picture")


def compact(png: bytes) -> bytes:
    "The same picture in 256 colors, without what says who made it and when."
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT).save(out, "PNG", optimize=True)
    return out.getvalue()


def alike(one: bytes, other: bytes) -> bool:
    "Do two pictures look the same? At half their size no more than one pixel in 500 may differ visibly."
    a, b = (Image.open(io.BytesIO(png)).convert("RGB") for png in (one, other))
    if max(abs(i - j) for i, j in zip(a.size, b.size)) > 2:
        return False
    half = (max(a.width // 2, 1), max(a.height // 2, 1))
    a, b = (np.asarray(picture.resize(half, Image.Resampling.BOX), dtype=int) for picture in (a, b))
    return (np.abs(a - b).max(-1) > 32).mean() < 0.002


def draw(path: Path) -> dict[str, list[bytes]]:  # cell -> its pictures
    "Run what a notebook exports, its setup and its picture cells, in their order."
    plt.close("all")  # a figure that this process left open would be shown with the first one here
    shell, drawn = CaptureShell(path, mpl_format="png"), {}
    with working_directory(path.parent):
        for cell in read_nb(path).cells:
            exported = cell.cell_type == "code" and EXPORT.search(cell.source)
            if not (exported or tagged(cell, "setup") or is_picture(cell)):
                continue
            outputs = shell.run(cell.source)
            if shell.exc:
                raise SystemExit(
                    f"{path.name}, cell {cell.id}: {type(shell.exc).__name__}: {shell.exc}. A picture cell may use what"
                    " the notebook exports, what cells with the tag `setup` make, and what it imports or makes itself."
                )
            if is_picture(cell):
                pngs = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
                drawn[cell.id] = [compact(base64.b64decode(png)) for png in pngs]
    return drawn


def output(png: bytes, alt: str) -> dict:
    "A picture as a notebook keeps it."
    data = {"image/png": base64.b64encode(png).decode()}
    return dict(data=data, metadata={"image/png": {"alt": alt}}, output_type="display_data")


def updated(path: Path) -> str:
    "The text of a notebook with its pictures as they are drawn now, and without other outputs."
    nb, drawn = read_nb(path), draw(path)
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, before = [], cell.outputs
        if not is_picture(cell):
            continue
        alt, new = ALT.search(cell.source), drawn[cell.id]
        if not alt or not new:
            lacks = "draws nothing" if alt else "has no line '#| fig-alt: ...'"
            raise SystemExit(f"{path.name}, cell {cell.id} has the tag `picture` and {lacks}.")
        saved = [base64.b64decode(o["data"]["image/png"]) for o in before if "image/png" in o.get("data", {})]
        if len(saved) == len(new) and all(map(alike, saved, new)):
            new = saved
        cell.outputs = [output(png, alt[1].strip()) for png in new]
    return nb2str(nb)


def compacted(path: Path) -> str:
    "The text of a rendered notebook, all of its pictures in 256 colors."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        for data in (o["data"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})):
            png = base64.b64decode(data["image/png"])
            if Image.open(io.BytesIO(png)).mode != "P":  # else it is compact already
                data["image/png"] = base64.b64encode(compact(png)).decode()
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures that are kept in notebooks.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a picture is out of date")
    parser.add_argument("--compact", action="store_true", help="of rendered notebooks, which are named by their paths, make the pictures smaller")
    parser.add_argument("names", nargs="*", help="notebooks, as 12_factorization; all where none is named")
    args = parser.parse_args()
    if args.compact:
        for path in map(Path, args.names):
            path.write_text(compacted(path), encoding="utf-8")
        return
    stale = []
    for path in [ROOT / f"nbs/{name}.ipynb" for name in args.names] or sorted((ROOT / "nbs").glob("*.ipynb")):
        if not any(map(is_picture, read_nb(path).cells)):
            continue
        text = updated(path)
        if text != path.read_text(encoding="utf-8"):
            stale.append(path.name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    print("Out of date:" if args.check else "Drawn anew:", ", ".join(stale) or "nothing")
    sys.exit(args.check and bool(stale))


if __name__ == "__main__":
    main()
