"""The server of a page."""

from __future__ import annotations

import socket
import threading
from typing import Any

from ofadiff.page.blocks import STYLE

# Fonts that systems have: nothing is fetched from elsewhere.
FONTS = ("system-ui", "sans-serif")
FIXED_FONTS = ("ui-monospace", "monospace")


def check_address(host: str, port: int) -> None:
    """Raises ValueError if a server cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ValueError(
            f"--host {host} is no address of this machine; 127.0.0.1 is the one that only it sees"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            raise ValueError(
                f"nothing can listen at --host {host} --port {port} ({error.strerror}); choose another --port"
            ) from None


def serve(page: Any, host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> str:
    """Starts a page's server, in threads of its own, and returns the page's address.

    Args:
        page: What `make_page` gave.
        host: Address to listen at; `127.0.0.1` is seen by this machine alone.
        port: Port to listen at.
        share: Whether Gradio makes a public address for it too, over its makers' servers.

    Raises:
        OSError: If the port is taken.
    """
    import gradio as gr

    theme = gr.themes.Default(font=FONTS, font_mono=FIXED_FONTS)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme,
        css=STYLE,
        show_error=True,
        quiet=True,
        inbrowser=False,
        inline=False,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
    )
    return address


def until_interrupted(page: Any) -> None:
    """Waits for Ctrl-C, then ends a page's server."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
