"""The page: the images of sample.py, and nothing that a hostile or impatient visitor can break."""

import asyncio
import errno
import io
import json
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, invoke, start
from PIL import Image
from visitor import NEW, Visitor

pytest.importorskip("gradio")

DIGITS, EMOJI = (PROJECT / f"pretrained/{name}.safetensors" for name in ("digits", "emoji"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def page_of(model: Path, folder: Path, ends: int = signal.SIGTERM, code: int = 143):
    """Serve a model's page: (its process, its port)."""
    port = free_port()
    (folder / "pretrained").symlink_to(model.parent)  # so that it shows no path of this machine
    command, files = f"python app.py pretrained/{model.name} --port {port}", folder / "files"
    files.mkdir()
    with start(command, folder, env={"TMPDIR": str(files)}) as process:
        process.wait_until(lambda: can_connect(port), "page", timeout=120, pause=0.1)
        yield process, port
        window = Visitor(port).open("/gradio_api/heartbeat/one")  # as each has one
        process.send(ends)
        process.finish(code)
        window.close()
        assert not list(files.glob("ddpm-page-*"))
        assert len(process.output.splitlines()) < 3, process.output


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with page_of(DIGITS, tmp_path_factory.mktemp("page")) as found:
        yield found


def can_connect(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def files_of(message: dict) -> list[Path]:
    return [Path(item["image"]["path"]) for item in message["output"]["data"][1]]


def downloads(visitor: Visitor, message: dict) -> list[bytes]:
    return [visitor.ask("GET", f"/gradio_api/file={path}")[1] for path in files_of(message)]


def in_a_control(cause: Exception) -> Exception:
    """Return an error as Gradio wraps what a control ends in."""
    error = ValueError("Could not preprocess /home/me")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("source", "sampling", "count", "edit"),
    [
        (
            EMOJI,
            {"sampler": "dpm++", "timesteps": 3, "class_label": ["Flags", "Food & Drink"]},
            2,
            {},
        ),
        (EMOJI, {"sampler": "ddim", "timesteps": 2, "eta": 0.5}, 3, {}),
        (
            DIGITS,
            {"sampler": "unipc", "timesteps": 5},
            2,
            {"image": Path("photo.png"), "strength": 0.7},
        ),
        (
            DIGITS,
            {"sampler": "ddpm", "timesteps": 4, "variance": "small"},
            2,
            {"inpaint": Path("photo.png"), "mask": Path("mask.png"), "resample": 2, "jump": 2},
        ),
    ],
)
def test_its_images_are_those_of_the_command_that_it_shows(
    source, sampling, count, edit, tmp_path, monkeypatch
):
    from generation import resolve_precision
    from page.board import write_mask
    from page.draw import command_line, draw, make_plan
    from weights import load_model

    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    write_mask(Path("photo.png"), {}, "the lower half", Path("mask.png"))
    assert (np.asarray(Image.open("mask.png")) == 255).nonzero()[0].tolist() == [
        row for row in range(10, 20) for _ in range(20)
    ]
    model, seeds = load_model(source), list(range(7, 7 + count))
    precision = resolve_precision(model.config, torch.device("cpu"))
    plan = make_plan(
        model, sampling, source=str(source), precision=precision, count=count, edit=edit
    )
    frames = list(draw(plan, seeds, tmp_path))
    assert [frame.done for frame in frames] == list(range(1, frames[0].calls + 1))
    made = sorted(path.read_bytes() for path, _ in frames[-1].files)
    assert len(made) == count * len(plan.labels)
    line = command_line(str(source), sampling, seeds, edit).removeprefix("python ")
    line = line.replace(" INPAINT ", " photo.png ").replace(" IMAGE ", " photo.png ")
    invoke(f"{line.replace(' MASK ', ' mask.png ')} --output-dir by-hand", tmp_path, monkeypatch)
    by_hand = [p.read_bytes() for p in Path("by-hand").rglob("*.png") if p.stem.isdigit()]
    assert sorted(by_hand) == made


def test_a_request_has_limits(tmp_path, monkeypatch):
    import page.draw
    from weights import load_model

    model = load_model(DIGITS)
    how = {"source": "x", "precision": "float32", "edit": {}}
    with pytest.raises(ValueError, match="65 images: at most 64"):
        page.draw.make_plan(model, {}, count=65, **how)
    with pytest.raises(ValueError, match="2 classes of 40 images"):
        labels = {"class_label": ["Flags", "Objects"]}
        page.draw.make_plan(load_model(EMOJI), labels, count=40, **how)
    monkeypatch.setattr(page.draw, "SECONDS", 0)
    plan = page.draw.make_plan(model, {"timesteps": 50}, count=1, **how)
    with pytest.raises(ValueError, match="stopped after 0 s, at step 1 of 50"):
        list(page.draw.draw(plan, [0], tmp_path))


def png(size: tuple[int, int], mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "png")
    return file.getvalue()


def upload(visitor: Visitor, name: str, content: bytes) -> tuple[int, bytes]:
    body = (
        f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n--b--\r\n"
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    return visitor.ask("POST", "/gradio_api/upload", body, **kind)


def with_image(path: str, kind: str = "Variations of an image") -> list:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [kind, *NEW[1:8], {"background": file, "layers": [], "composite": None}, *NEW[9:]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError("dataset.root: nothing at data/x"), "dataset.root: nothing at data/x"),
        (ValueError("--strength 2 is outside"), "strength 2 is outside"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/home/me"), "this is not an image"),
        (TypeError("an int"), "this request cannot be read"),
        (in_a_control(OSError("image file is truncated")), "this is not an image"),
        (in_a_control(Image.DecompressionBombError("x")), "more than 16,777,216 pixels"),
    ],
)
def test_an_error_is_told_in_a_line(error, told, monkeypatch):
    import gradio

    from cli import describe
    from page import Page
    from weights import load_model

    async def fails(*_, **__):
        raise error

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the page sets both for its process
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    page = Page(load_model(DIGITS), source="x", precision="auto", explain=describe)
    monkeypatch.setattr(gradio.Blocks, "process_api", fails)
    with pytest.raises(gradio.Error) as found:
        asyncio.run(page.process_api())
    assert told in found.value.message and "/home/me" not in found.value.message
    assert not found.value.print_exception


def test_hostile_requests_are_refused_in_a_line(server):
    process, port = server
    visitor = Visitor(port)
    (good,) = [m for m in visitor.draw() if m["msg"] == "process_completed"]
    assert good["success"]
    changed = lambda i, value: [*NEW[:i], value, *NEW[i + 1 :]]
    wrong = [changed(i, value) for i in (0, 4) for value in ("../../etc", 7, None, [], {"a": 1})]
    wrong += [changed(i, v) for i in (1, 2, 5) for v in ("x", -1, 10**400, None, [1], {})]
    wrong += [changed(6, "x"), changed(3, ["no class"]), changed(3, "all"), changed(8, "x")]
    wrong += [changed(8, {"background": 5}), NEW[:5], "NEW", None, 5]
    wrong += [with_image("/etc/passwd"), with_image("../../../etc/passwd"), with_image("")]
    bomb, text = (
        upload(visitor, *file) for file in (("b.png", png((5000, 5000))), ("t.png", b"no"))
    )
    wrong += [with_image(json.loads(body)[0]) for status, body in (bomb, text) if status == 200]
    for data in wrong:
        other = Visitor(port)
        status, body = other.join(data)
        if status == 200:
            last = list(other.listen())[-1]
            assert last["msg"] == "process_completed" and not last["success"], f"{data}"
            body = json.dumps(last).encode()
        assert len(body) < 700 and b"Traceback" not in body and b"/tmp/" not in body, body
    plain = [
        visitor.ask("POST", "/gradio_api/queue/join", b"{"),
        visitor.ask("POST", "/gradio_api/queue/join", b"[]"),
        visitor.join(NEW, fn_index=10**6),
        visitor.join(NEW, fn_index="x"),
        visitor.join(NEW, session_hash=None),
        visitor.ask("POST", "/gradio_api/queue/join", b"0" * (11 * 2**20)),
        upload(visitor, "large.png", b"0" * (11 * 2**20)),
        visitor.ask("GET", "/gradio_api/file=/etc/passwd"),
        visitor.ask("GET", "/gradio_api/file=../../../../etc/passwd"),
        visitor.ask("GET", f"/gradio_api/file={PROJECT / 'cli.py'}"),
        visitor.ask("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        visitor.ask("GET", "/static/../../../../etc/passwd"),
        visitor.ask("GET", "/", host="elsewhere.example"),
        visitor.ask("POST", "/gradio_api/queue/join", NEW, origin="http://elsewhere.example"),
        visitor.ask("GET", "/", origin="null"),
        visitor.ask("BREW", "/"),
        visitor.ask("POST", "/gradio_api/run/draw", {"data": NEW}),
        visitor.ask("POST", "/gradio_api/call/draw", {"data": NEW}),
        visitor.ask("GET", "/openapi.json"),
    ]
    for status, body in plain:
        assert status >= 400, (status, body)
        assert b"Traceback" not in body and b"root:" not in body
    assert len(wrong) + len(plain) >= 50
    assert "Traceback" not in process.output, process.output
    images, again = downloads(visitor, good), downloads(visitor, visitor.draw()[-1])
    assert images == again
    assert json.loads(Image.open(io.BytesIO(images[3])).info["recipe"])["seed"] == 3


def test_who_leaves_frees_the_model(server):
    _, port = server
    one, other = Visitor(port), Visitor(port)
    assert one.join([*NEW[:1], 64, *NEW[2:4], "ddpm", 1000, *NEW[6:]])[0] == 200
    waiting = one.listen()
    heard = []
    for message in waiting:
        heard.append(message["msg"])
        if heard.count("process_generating") == 3:
            break
    assert other.join(NEW)[0] == 200
    second = iter(other.listen())
    ranks = [m["rank"] for m in (next(second),) if m["msg"] == "estimation"]
    assert ranks == [0]  # it sees that it is next
    waiting.close()
    left = time.monotonic()
    last = list(second)[-1]
    assert last["success"] and len(files_of(last)) == 4
    assert time.monotonic() - left < 20  # a thousand steps of 64 would take minutes


@pytest.mark.slow
def test_twenty_visitors_for_a_minute_lose_nothing(server):
    _, port = server
    end, counts, ranks, faults = time.monotonic() + 60, [0] * 20, set(), []

    def visit(i: int) -> None:
        try:
            while time.monotonic() < end:
                data = [*NEW[:1], 2, i, *NEW[3:]]
                heard = Visitor(port).draw(data)
                ranks.update(m["rank"] for m in heard if m["msg"] == "estimation")
                seeds = [int(path.stem) for path in files_of(heard[-1])]
                assert seeds == [i, i + 1], heard[-1]
                counts[i] += 1
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and min(counts) > 0, (faults, counts)
    assert max(ranks) >= 10  # they have seen where they were


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def open_page(browser, port: int, width: int):
    """Return a window of the page, which may ask nobody else."""
    window = browser.new_page(viewport={"width": width, "height": 800})
    local = f"http://127.0.0.1:{port}/", "data:", "blob:"
    window.on("request", lambda r: r.url.startswith(local) or pytest.fail(r.url))
    window.goto(f"http://127.0.0.1:{port}")
    return window, window.get_by_role("button", name="Draw", exact=True)


@pytest.mark.slow
def test_in_a_browser_at_three_widths(browser, tmp_path):
    """Draw by keyboard; docs/page.png is this test's 1280.png."""
    with page_of(EMOJI, tmp_path, signal.SIGINT, 130) as (_, port):
        for width in (360, 820, 1280):
            window, button = open_page(browser, port, width)
            button.focus()
            window.keyboard.press("Enter")
            window.get_by_text("The same images").wait_for(timeout=60_000)
            images = window.locator(".images img")
            images.last.wait_for()
            assert images.count() == 16
            assert window.evaluate("document.documentElement.scrollWidth") <= width
            window.wait_for_timeout(500)
            window.screenshot(path=tmp_path / f"{width}.png", full_page=True)
            window.close()


@pytest.mark.slow
def test_in_a_browser_a_part_is_filled_and_health_measured(server, browser, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    window, button = open_page(browser, server[1], 1280)
    (tmp_path / "photo.png").write_bytes(png((300, 200)))
    window.get_by_label("Fill a part").check()
    window.get_by_text("Upload an image").wait_for()
    window.wait_for_timeout(1000)  # it is drawn before it listens
    window.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    window.get_by_text("Upload an image").wait_for(state="hidden")
    filled = window.get_by_text("--inpaint INPAINT --mask MASK")
    for _ in range(5):  # the canvas does not say when it listens
        window.wait_for_timeout(2000)
        box = window.locator("canvas").first.bounding_box()
        middle = box["y"] + box["height"] / 2
        window.mouse.move(box["x"] + 0.4 * box["width"], middle)
        window.mouse.down()
        window.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=10)
        window.mouse.up()
        window.wait_for_timeout(1000)
        button.click()
        with suppress(playwright.TimeoutError):
            filled.wait_for(timeout=15_000)
            break
    window.screenshot(path=tmp_path / "filled.png", full_page=True)
    assert filled.is_visible()
    window.get_by_text("Health of the model").click()
    window.get_by_role("button", name="Measure").click()
    window.locator("img[src*=health]").wait_for(timeout=120_000)
