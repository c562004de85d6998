# SPDX-License-Identifier: Apache-2.0
"""A page that compares autoencoders on your own images, and samples from diffusion models.

    dcae-jax app runs/phase1 runs/phase3           at http://127.0.0.1:7860
    dcae-jax app runs/phase3 OWNER/NAME runs/usit  with a model of the hub, and a generator

Models are workdirs, checkpoints, exports, published folders or hub names. The page is for this
machine alone; --host=0.0.0.0 opens it to the network, without a password. It makes no link through
a server of others, reports nothing, and serves no file but those uploaded to it and made from them.
"""

import logging
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from dcae_jax import errors, files
from dcae_jax.api import autoencoder, generator
from dcae_jax.api.autoencoder import Autoencoder
from dcae_jax.api.generator import Generator, SampleSettings
from dcae_jax.checkpoints import weights as checkpoint_weights
from dcae_jax.data import transforms
from dcae_jax.diffusion import samplers
from dcae_jax.errors import UserError
from dcae_jax.runtime import process
from dcae_jax.serve import compare, inputs

MOST_UPLOAD = 20_000_000  # bytes of a file
MOST_STORED = 1_000_000_000  # bytes of all uploads and results; then uploads are refused
KEEP = 1800  # seconds until they are removed
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CSS = """
.gradio-container {max-width: 1200px !important}
#scores {overflow-x: auto}
#scores th, #scores td {white-space: nowrap; padding: 4px 12px}
"""
# The browser asks no other server for anything.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status. Raises UserError."""
    parser = process.parser("dcae-jax app", __doc__)
    parser.add_argument("models", nargs="+", help="autoencoders and diffusion models")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    given = parser.parse_args(arguments)
    errors.require("the page needs gradio", "gradio")
    process.choose_platform()
    process.use_compile_cache()
    with tempfile.TemporaryDirectory(prefix="dcae_jax-app-") as folder:
        with inputs.naming_the_flag():
            models = {path: load(path, given.dtype) for path in given.models}
        page, url = serve(models, folder, given.host, given.port)
        logging.info("%s (Ctrl-C ends it)", url)
        if given.host not in LOOPBACK:
            logging.warning("anybody who reaches %s can use this page", given.host)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return process.DONE


def load(path: str, dtype: str) -> Autoencoder | Generator:
    """The model in `path`, of either kind. Raises UserError."""
    if checkpoint_weights.kind_of(path) == "generator":
        return generator.load_generator(path, dtype=dtype)
    return autoencoder.load_autoencoder(path, dtype)


def serve(
    models: dict[str, Autoencoder | Generator], folder: str, host: str, port: int
) -> tuple[Any, str]:
    """Starts the page: (gradio's Blocks, its address). Files are kept in the empty `folder`.

    Raises UserError if the port is taken.
    """
    # gradio serves whatever is in these folders, and by default shares them with other programs.
    os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "files")
    os.environ["GRADIO_EXAMPLES_CACHE"] = os.path.join(folder, "examples")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio's requests to itself
    errors.require("the page needs gradio", "gradio")
    import gradio as gr  # pyright: ignore[reportMissingImports]  # an extra

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    page = build(
        {k: v for k, v in models.items() if isinstance(v, Autoencoder)},
        {k: v for k, v in models.items() if isinstance(v, Generator)},
    )
    page.queue(max_size=16, default_concurrency_limit=1)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            footer_links=[],
            max_file_size=MOST_UPLOAD,
            state_session_capacity=16,
            theme=gr.themes.Default(**fonts),
            css=CSS,
            # As starlette.middleware.Middleware: (factory, arguments, keywords).
            app_kwargs={"middleware": [(guard, (), {"folder": folder, "host": host})]},
        )
    except OSError as error:
        raise UserError(f"--port={port} is taken at {host}; choose another, or 0") from error
    return page, url


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as found:
        return found.getsockname()[1]


def build(autoencoders: dict[str, Autoencoder], generators: dict[str, Generator]) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr  # pyright: ignore[reportMissingImports]  # an extra

    def message(error: UserError) -> Exception:
        return gr.Error(str(error), duration=None, print_exception=False)

    def reconstruct(path: str | None, chosen: list[str]) -> tuple:
        if not path or not chosen:
            raise message(UserError("choose an image and at least one model"))
        try:
            pixels = inputs.read_image(path)
            shown, rows = compare.views(pixels, {name: autoencoders[name] for name in chosen})
        except UserError as error:
            raise message(UserError(str(error).replace(path, os.path.basename(path)))) from error
        left = gr.Dropdown(list(shown), value=compare.ORIGINAL)
        right = gr.Dropdown(list(shown), value=chosen[0])
        return shown, _markdown(rows), left, right, pair(shown, compare.ORIGINAL, chosen[0])

    def pair(shown: compare.Views | None, left: str, right: str) -> tuple | None:
        return (shown[left], shown[right]) if shown else None

    def draw(
        name: str, label: float, count: float, steps: float, guidance: float, seed: float, how: str
    ) -> tuple[np.ndarray, str]:
        try:
            settings = SampleSettings(guidance, int(steps), int(seed or 0), how)
            return compare.samples(generators[name], int(label or 0), int(count), settings)
        except UserError as error:
            raise message(error) from error

    hidden: dict[str, Any] = {"api_visibility": "private"}
    with gr.Blocks(title="dcae_jax", analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        with gr.Tab("Reconstruct"):
            if not autoencoders:
                gr.Markdown("No autoencoder was named on the command line.")
            with gr.Row(visible=bool(autoencoders)):
                # A file, not an image component: gradio would open it with any of Pillow's readers.
                kinds = list(transforms.EXTENSIONS)
                file = gr.File(label="Image", file_types=kinds, height=140, elem_id="upload")
                _refuse_urls(file, gr.Error("this page fetches nothing from other servers"))
                names = list(autoencoders)
                with gr.Column(scale=2):
                    chosen = gr.CheckboxGroup(names, value=names, label="Models")
                    button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
            scores = gr.Markdown(elem_id="scores")
            state = gr.State(time_to_live=KEEP)
            with gr.Row(visible=bool(autoencoders)):
                left = gr.Dropdown([], label="Left", elem_id="left")
                right = gr.Dropdown([], label="Right", elem_id="right")
            slider = gr.ImageSlider(
                label="Drag the line; the wheel zooms both",
                format="png",
                max_height=560,
                interactive=False,
                visible=bool(autoencoders),
                elem_id="slider",
            )
            outputs = [state, scores, left, right, slider]
            gr.on([button.click, file.upload], reconstruct, [file, chosen], outputs, **hidden)
            for choice in (left, right):
                choice.input(pair, [state, left, right], slider, **hidden)
        with gr.Tab("Sample"):
            if not generators:
                gr.Markdown("No diffusion model was named on the command line.")
            else:
                _sample_tab(gr, generators, draw, hidden)
    return page


def _sample_tab(gr: Any, generators: dict[str, Generator], draw: Any, hidden: dict) -> None:
    """The controls of the second tab."""
    names = list(generators)
    most = max(model.num_classes for model in generators.values())
    known = sorted(
        {how for model in generators.values() for how in samplers.SAMPLERS[model.objective]}
    )
    with gr.Row():
        with gr.Column():
            name = gr.Dropdown(names, value=names[0], label="Model", elem_id="generator")
            label = gr.Number(
                0, precision=0, minimum=0, maximum=most, label="Class", elem_id="label"
            )
            count = gr.Slider(1, compare.MOST_SAMPLES, 4, step=1, label="Samples", elem_id="count")
            steps = gr.Slider(1, compare.MOST_STEPS, 30, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(0, 10, 1.5, step=0.1, label="Guidance (1: none)")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed")
            how = gr.Dropdown([("default", ""), *known], value="", label="Sampler")
            button = gr.Button("Sample", variant="primary", elem_id="sample")
        with gr.Column(scale=2):
            shown = gr.Image(
                format="png",
                label="Samples",
                interactive=False,
                height=520,
                buttons=["download", "fullscreen"],  # not "share", which posts to a site
                elem_id="samples",
            )
            line = gr.Markdown(elem_id="drawn")
    given = [name, label, count, steps, guidance, seed, how]
    button.click(draw, given, [shown, line], **hidden)


def _markdown(rows: list[list[str]]) -> str:
    lines = [compare.HEAD, ["---"] * len(compare.HEAD), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines
    )


# --- what the page refuses ------------------------------------------------------------------------


def _refuse_urls(file: Any, refused: Exception) -> None:
    """Keeps gradio from downloading what a request names instead of an upload."""
    move = file.async_move_resource_to_block_cache

    async def move_upload(path: Any) -> Any:
        if "://" in str(path):
            raise refused
        return await move(path)

    file.async_move_resource_to_block_cache = move_upload


def guard(app: Any, folder: str, host: str) -> Any:
    """An ASGI application around gradio's, which refuses requests and adds POLICY to answers."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        reason = refusal(scope, folder, host) if scope["type"] == "http" else ""
        if not reason:
            return await app(scope, receive, answer)
        head = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 403, "headers": head})
        await send({"type": "http.response.body", "body": reason.encode()})

    return run


def refusal(scope: Any, folder: str, host: str) -> str:
    """Why a request is refused; '' if it is not."""
    path, asked = scope["path"], dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    if host in LOOPBACK and re.sub(r":\d+$", "", asked).strip("[]") not in LOOPBACK:
        return f"this page is at localhost, not at {asked}"  # another site's name for 127.0.0.1
    if any(part in path for part in ("file=http:", "file=https:", "proxy=", "file/http")):
        return "this page fetches nothing from other servers"
    if path.rstrip("/").endswith("/upload") and stored(folder) > MOST_STORED:
        return f"the page holds {MOST_STORED} bytes; they are removed after {KEEP} seconds"
    return ""


def stored(folder: str) -> int:
    """Bytes of the files below `folder`."""
    return sum(files.size(path) or 0 for path in _paths(folder))


def _paths(folder: str) -> Iterator[str]:
    for name in files.walk(folder):
        yield os.path.join(folder, name)
