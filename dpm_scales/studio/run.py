"""`dpm-scales studio`: open a page in the browser with processes, schedules, samples and edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpm_scales.cli.output import complain
from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.errors import require

if TYPE_CHECKING:
    import socket

    from dpm_scales.studio.page import Studio

HELP = """\
usage: {0} [MODEL|FOLDER ...] [port=N] [host=NAME] [configs=DIR]
                        [allow=PACKAGE,...] [device=NAME]

Open a page: an image under any process with a slider for the scale, schedules edited and exported as configs, samples
and trajectories of models, inpainting, and osmosis with a brush. It needs pip install 'dpm-scales[studio]'.

  MODEL        a run folder, an export, a checkpoint, or hf://OWNER/NAME; for samples and inpainting
  FOLDER       a folder that holds runs or exports
  port=N       by default 7860; 0 for any free one
  host=NAME    by default 127.0.0.1, which only this machine reaches
  configs=DIR  your own configs, as train's --config-dir: those in DIR/process are offered too
  allow=NAMES  packages whose classes models and your configs may name
  device=NAME  of the models; by default cuda if there is one, else cpu

examples:
  {0}
  {0} runs/demo
  {0} runs port=8000 configs=my_configs allow=mynet

Nothing is fetched from elsewhere or sent there, and uploads are not kept."""
HELP_FLAGS = ("-h", "--help")
OPTIONS = ("port", "host", "configs", "allow", "device")
INSTALL = "pip install 'dpm-scales[studio]'"
MAX_PORT = 65535


def run(argv: Sequence[str]) -> None:
    """Serve the page until it is interrupted; `argv` are the arguments after `dpm-scales studio`.

    Raises: UserError for arguments that can't be used, and without Gradio, before anything listens.
    """
    from dpm_scales.studio import server

    usage = f"{program('studio')} [MODEL|FOLDER ...]"
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(program("studio")))
        return
    asked = split_words(argv, 10**6, OPTIONS, (), usage)
    port = asked.number("port", server.PORT, 0)
    require(port <= MAX_PORT, f"port={port}: allowed are 0 to {MAX_PORT}")
    host = asked.options.get("host", server.LOOPBACK)
    require(find_spec("gradio") is not None, f"the studio needs Gradio: {INSTALL}")
    studio = prepare(asked.words, asked.options)
    with server.listen(host, port) as listening, serving(studio, listening, host) as uvicorn_server:
        if not server.is_loopback(host):
            complain(f"warning: host={host} lets others on the network use this page, which has no password")
        print(f"studio: {address(listening)}  (Ctrl-C ends it)", flush=True)
        try:
            uvicorn_server.run(sockets=[listening])
        except KeyboardInterrupt:
            print("\nstudio: ended")


def prepare(words: Sequence[str], options: dict[str, str]) -> Studio:
    """Return the processes and models of the page. Raises UserError for models, configs or devices that don't exist."""
    from dpm_scales.cli.options import pick_device
    from dpm_scales.models.trust import trusted_names
    from dpm_scales.studio.drawn import Models, find_models
    from dpm_scales.studio.laws import Laws, names_of

    allow = trusted_names(list(names_of(options.get("allow", ""))))
    folder = Path(options["configs"]) if "configs" in options else None
    models = Models(find_models(words), allow, pick_device(options.get("device", "auto")))
    laws = Laws(folder, allow)
    for place in list(models.places)[:1]:
        models.load(place)  # a model that can't be read is reported before the page opens
    from dpm_scales.studio.page import Studio

    return Studio(laws, models)


@contextmanager
def serving(studio: Studio, listening: socket.socket, host: str) -> Iterator[Any]:
    """Yield a uvicorn server for the page, not yet running; its folder of pictures is removed afterwards."""
    from dpm_scales.studio import server

    with server.private_folder() as folder:
        import uvicorn

        from dpm_scales.studio import page

        app = server.application(page.build(studio), folder, host, page.CSS, page.theme())
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none")
        yield uvicorn.Server(config)


def address(listening: socket.socket) -> str:
    """Return the address of the page."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
