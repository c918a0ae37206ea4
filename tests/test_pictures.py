"Pictures in the notebooks: there, described, small, and in step with the code that draws them."

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import pictures
from pictures import ALT, alike, compacted, is_picture, updated

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIBRARY = [n for n in NOTEBOOKS if n.stem[0].isdigit()]
LARGEST = 160 * 1024  # bytes of a picture


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda n: n.stem)
def test_every_library_notebook_shows_a_picture_and_says_what_is_seen(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert any(map(is_picture, cells)), "give a cell that draws the tag `picture`, then run .ci/pictures"
    for cell in cells:
        if not is_picture(cell):
            assert not cell.get("outputs"), f"cell {cell.id} keeps outputs: run .ci/pictures"
            continue
        assert cell.outputs, f"the picture of cell {cell.id} is not saved: run .ci/pictures"
        for output in cell.outputs:
            assert set(output.data) == {"image/png"}
            assert output.metadata["image/png"]["alt"] == ALT.search(cell.source)[1].strip()
            assert len(base64.b64decode(output.data["image/png"])) < LARGEST


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if any(map(is_picture, nbformat.read(n, 4).cells))], ids=lambda n: n.stem)
def test_pictures_are_in_step_with_the_code(notebook):
    assert updated(notebook) == notebook.read_text(encoding="utf-8"), f"run .ci/pictures {notebook.stem}"


def notebook(path: Path, *cells) -> Path:
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def drawing(text: str):
    code = f"#| fig-alt: a line\nimport matplotlib.pyplot as plt\n\nfig, ax = plt.subplots(figsize=(3, 2))\nax.plot({text})"
    return new_code_cell(code, metadata=dict(tags=["picture"]))


def test_of_a_notebook_only_what_pictures_need_is_run_and_only_pictures_are_kept(tmp_path):
    noisy = new_code_cell("1 / 0", outputs=[nbformat.v4.new_output("stream", text="old")])
    cells = (new_code_cell("#| export\nrise = [1, 2, 3]"), noisy, drawing("rise"))
    path = notebook(tmp_path / "a.ipynb", *cells)
    plt.subplots()  # of another test in this process
    path.write_text(updated(path))
    saved = nbformat.read(path, 4).cells
    assert [len(c.outputs) for c in saved] == [0, 0, 1]
    assert saved[2].outputs[0].metadata["image/png"]["alt"] == "a line"
    assert updated(path) == path.read_text()  # again, and nothing is new

    saved[0].source = saved[0].source.replace("3]", "9]")
    other = notebook(tmp_path / "b.ipynb", *saved)
    assert nbformat.reads(updated(other), 4).cells[2].outputs != saved[2].outputs


def test_the_command_says_what_is_out_of_date_and_draws_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "nbs").mkdir()
    path = notebook(tmp_path / "nbs/a.ipynb", drawing("[1, 2]"))
    before = path.read_text()
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    for given, said, fails in (["--check"], "Out of date: a.ipynb", True), ([], "Drawn anew: a.ipynb", False), (["--check"], "Out of date: nothing", False):
        monkeypatch.setattr(sys, "argv", ["pictures.py", *given])
        with pytest.raises(SystemExit) as end:
            pictures.main()
        assert said in capsys.readouterr().out and bool(end.value.code) == fails
        assert (path.read_text() == before) == (fails and given == ["--check"])


def test_a_picture_that_a_test_must_run_for_is_refused(tmp_path):
    path = notebook(tmp_path / "a.ipynb", new_code_cell("rise = [1, 2]"), drawing("rise"))
    with pytest.raises(SystemExit, match="NameError: name 'rise' is not defined. A picture cell may use what the notebook exports"):
        updated(path)


def test_a_few_pixels_do_not_make_another_picture():
    def png(pixels):
        out = io.BytesIO()
        Image.fromarray(pixels.astype("uint8")).save(out, "PNG")
        return out.getvalue()

    picture = np.full((100, 200, 3), 255)
    picture[50:52, 20:180] = 0  # a line
    faint, moved = picture.copy(), picture.copy()
    faint[50, 20:180] = 20  # drawn by another rasterizer
    moved[50:52, 20:180], moved[60:62, 20:180] = 255, 0
    assert alike(png(picture), png(faint)) and not alike(png(picture), png(moved))
    assert not alike(png(picture), png(picture[:, :150]))


def test_pictures_of_a_rendered_report_become_smaller_and_look_the_same(tmp_path):
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.plot(range(5)), fig.savefig(tmp_path / "a.png"), plt.close(fig)
    png = (tmp_path / "a.png").read_bytes()
    shown = new_output("display_data", {"image/png": base64.b64encode(png).decode(), "text/plain": "a line"})
    report = tmp_path / "report.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("plot()", outputs=[shown])]), report)
    text = compacted(report)
    report.write_text(text, encoding="utf-8")
    (data,) = (o.data for c in nbformat.read(report, 4).cells for o in c.outputs)
    smaller = base64.b64decode(data["image/png"])
    assert len(smaller) < len(png) and alike(smaller, png) and data["text/plain"] == "a line"
    assert compacted(report) == text
