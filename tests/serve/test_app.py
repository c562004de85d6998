# SPDX-License-Identifier: Apache-2.0
"""The comparison page: what it computes, what it refuses, and its use in a real browser."""

import importlib.util
import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import dcae_jax
from dcae_jax import files, main
from dcae_jax.api.generator import SampleSettings
from dcae_jax.errors import UserError
from dcae_jax.jobs import sample
from dcae_jax.runtime import process
from dcae_jax.serve import app, compare

needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"), reason="gradio is not installed: pip install gradio"
)
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER and importlib.util.find_spec("selenium")),
    reason="no browser: apt-get install chromium chromium-driver; pip install selenium",
)
LEVELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
LEVELS[:, :30] //= 4  # the left half is darker


@pytest.fixture
def ae(alone, autoencoder_export):
    return dcae_jax.load_autoencoder(autoencoder_export)


def test_views_are_the_image_its_reconstructions_and_differences(ae):
    """Catches scores or pixels of padding, and a time that includes the compilation."""
    shown, rows = compare.views(LEVELS, {"a": ae, "b": ae})
    assert list(shown) == ["original", "a", "difference: a", "b", "difference: b"]
    np.testing.assert_array_equal(shown["a"], ae.reconstruct(LEVELS))
    np.testing.assert_array_equal(shown["difference: b"], files.difference(LEVELS, shown["b"]))
    assert [len(row) for row in rows] == [len(compare.HEAD)] * 2
    assert rows[0][:5] == ["a", rows[1][1], rows[1][2], "3x4x8", "75x"]
    assert float(rows[1][5]) < 5000
    with pytest.raises(UserError, match="9000x1000 is more than 8.4 million pixels"):
        compare.views(np.broadcast_to(np.uint8(0), (1000, 9000, 3)), {"a": ae})


def test_too_many_samples_are_refused(alone, generator_run):
    """Catches a request that occupies the page for hours."""
    model = dcae_jax.load_generator(generator_run)
    grid, line = compare.samples(model, 1, 2, SampleSettings(2.0, 2, 5))
    np.testing.assert_array_equal(grid, sample.grid(model.sample([1, 1], 2.0, 2, 5)))
    assert line.startswith("2 of class 1, 32x32, seed 5")
    for count, steps, words in ((17, 2, "at most 16 samples"), (1, 251, "250 steps")):
        with pytest.raises(UserError, match=words):
            compare.samples(model, 1, count, SampleSettings(steps=steps))


def test_a_model_that_is_none_is_one_line(tmp_path, capsys, monkeypatch):
    """Catches a traceback, and a page that starts without its models."""
    monkeypatch.setattr(app.errors, "require", lambda *_, **__: None)
    assert main.main(["dcae-jax", "app", str(tmp_path / "none")]) == process.MISTAKE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--model='{tmp_path}/none': there is no such file" in said


# --- a running page -------------------------------------------------------------------------------


@pytest.fixture
def page(ae, generator_run, tmp_path):
    """(address, its folder) of a page with an autoencoder and a generator."""
    models = {"first": ae, "drawing": dcae_jax.load_generator(generator_run)}
    folder = str(tmp_path / "page")
    os.mkdir(folder)
    blocks, url = app.serve(models, folder, "127.0.0.1", 0)
    yield url.rstrip("/"), folder
    blocks.close(verbose=False)


def _get(url, data=None, **headers):
    """(status, body) of a GET, or of a POST of `data`."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _upload(url, data, name="photo.png"):
    part = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = part.encode() + data + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return _get(f"{url}/gradio_api/upload", body, **kind)


def _event(url, fn_index, data):
    """The last message about a call of the page's function."""
    call = {"data": data, "fn_index": fn_index, "session_hash": "s", "event_data": None}
    kind = {"Content-Type": "application/json"}
    status, body = _get(f"{url}/gradio_api/queue/join", json.dumps(call).encode(), **kind)
    assert status == 200, body
    _, stream = _get(f"{url}/gradio_api/queue/data?session_hash=s")
    messages = [
        json.loads(line[6:]) for line in stream.decode().splitlines() if line[:5] == "data:"
    ]
    return next(m for m in messages if m["msg"] == "process_completed")


def _png(levels):
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


@needs_gradio
def test_no_file_of_the_host_can_be_read(page, autoencoder_export, tmp_path, monkeypatch):
    """Catches a file route that serves the disk, other servers' files, or grows without bound."""
    url, folder = page
    status, body = _upload(url, _png(LEVELS))
    assert status == 200
    (path,) = json.loads(body)
    assert path.startswith(folder) and _get(f"{url}/gradio_api/file={path}")[1] == _png(LEVELS)
    secret = tmp_path / "secret.png"
    secret.write_bytes(_png(LEVELS))
    model = f"{autoencoder_export}/model.json"
    for there in ("/etc/passwd", secret, model, f"{folder}/../secret.png", "pyproject.toml"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            status, body = _get(f"{url}/{route}{there}")
            assert status in (403, 404), (route, there, status)
    for route in (
        "file=http://127.0.0.1:1/x",
        "file=https://a.example/x",
        "proxy=https://a.example/x",
    ):
        status, body = _get(f"{url}/gradio_api/{route}")
        assert (status, body) == (403, b"this page fetches nothing from other servers")
    for there in (str(secret), "http://127.0.0.1:1/x.png", "https://a.example/x.png"):
        value = {"path": there, "meta": {"_type": "gradio.FileData"}}
        answer = _event(url, 0, [value, ["first"]])
        assert not answer["success"] and "data" not in answer["output"]
        assert "://" not in there or "fetches nothing" in answer["output"]["error"]
    value = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert _event(url, 0, [value, ["first"]])["success"]  # so the refusals above mean something
    assert _upload(url, bytes(app.MOST_UPLOAD + 1))[0] == 413
    assert _get(f"{url}/", Host="a.example")[0] == 403 and _get(f"{url}/")[0] == 200
    config = json.loads(_get(f"{url}/config")[1])
    assert not config["analytics_enabled"] and not config.get("is_space")
    monkeypatch.setattr(app, "MOST_STORED", 10)
    assert _upload(url, _png(LEVELS))[0] == 403


@needs_gradio
def test_a_bad_upload_is_one_line(page):
    """Catches a traceback, and the server's folders in a message."""
    url, folder = page
    for data, words in ((b"hello", "photo.png is not an image"), (_png(LEVELS)[:-60], "cannot be")):
        (path,) = json.loads(_upload(url, data)[1])
        value = {"path": path, "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}}
        answer = _event(url, 0, [value, ["first"]])
        assert not answer["success"] and words in answer["output"]["error"], answer
        assert folder not in answer["output"]["error"] and "\n" not in answer["output"]["error"]


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1300"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _wait(find, seconds=180):
    """What `find` returns, once that is not empty."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.2)
    return found


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_a_person_compares_and_samples(page, browser, ae, generator_run, tmp_path):
    """Catches an upload that does nothing, a slider that does not move or has two equal sides, a
    zoom of one side alone, and samples of other settings than those shown.
    """
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    def all_of(css):
        return browser.find_elements(By.CSS_SELECTOR, css)

    def pixels_of(image):
        return np.asarray(Image.open(io.BytesIO(_get(image.get_attribute("src"))[1])))

    url, _ = page
    photo = tmp_path / "photo.png"
    photo.write_bytes(_png(LEVELS))
    browser.get(url)
    _wait(lambda: all_of("#upload input[type=file]"))[0].send_keys(str(photo))
    sides = left, right = _wait(lambda: all_of("#slider img")[1:] and all_of("#slider img"))
    np.testing.assert_array_equal(pixels_of(left), LEVELS)
    np.testing.assert_array_equal(pixels_of(right), ae.reconstruct(LEVELS))
    assert "first" in all_of("#scores")[0].text and "3x4x8" in all_of("#scores")[0].text

    def clip():  # percent of the right image that is hidden
        text = right.value_of_css_property("clip-path")
        return float(text.rpartition(" ")[2].rstrip("%)"))

    assert clip() == pytest.approx(50, abs=1)
    handle = all_of("#slider [role=none] .outer, #slider .handle-wrap, #slider .outer")[0]
    ActionChains(browser).drag_and_drop_by_offset(handle, -left.size["width"] // 4, 0).perform()
    assert clip() == pytest.approx(25, abs=5)
    browser.execute_script(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, bubbles: true,"
        " cancelable: true, clientX: 400, clientY: 500}))",
        left,
    )
    still = "matrix(1, 0, 0, 1, 0, 0)"
    _wait(
        lambda: (
            still not in (scales := [i.value_of_css_property("transform") for i in sides])
            and scales[0] == scales[1]
        )
    )

    all_of("#right input")[0].click()
    (choice,) = [c for c in _wait(lambda: all_of("[role=option]")) if "difference" in c.text]
    choice.click()
    expected = files.difference(LEVELS, ae.reconstruct(LEVELS))
    _wait(lambda: np.array_equal(pixels_of(all_of("#slider img")[1]), expected))
    browser.save_screenshot(str(tmp_path / "compare.png"))

    (tab,) = [t for t in all_of("[role=tab]") if t.text == "Sample"]
    tab.click()
    _wait(lambda: all_of("#sample")[0].is_displayed())
    browser.execute_script("document.querySelector('#steps input[type=number]').select()")
    all_of("#steps input[type=number]")[0].send_keys("2\t")
    all_of("#label input")[0].send_keys("\b2\t")
    all_of("#sample")[0].click()
    (drawn,) = _wait(lambda: all_of("#samples img"))
    model = dcae_jax.load_generator(generator_run)
    grid = sample.grid(model.sample([2] * 4, 1.5, 2, 0))
    np.testing.assert_allclose(pixels_of(drawn).astype(int), grid, atol=1)
    assert "4 of class 2, 32x32, seed 0" in all_of("#drawn")[0].text
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors  # nor anything that was asked of another server and refused
